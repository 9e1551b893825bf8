"""FAISS types under one contract: int64 keys in, best inner products out, settings and filters per call.

Shape suffixes: N queries, D dimensions, K results, R rows of the shard.
"""

from typing import Any

import faiss as _faiss
import numpy as np
from numpy.typing import NDArray

# FAISS's stubs lack the keyword constructors and several types.
faiss: Any = _faiss

# Product quantisers split the vector into equal parts; nearly every number of parts divides one of these.
_PROBE_DIMS = (960, 1344)


def make_index(dim: int, factory: str) -> Any:
    """An untrained FAISS index of `dim` dimensions for inner products. Raises ValueError if it cannot be."""
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(f"FAISS cannot make {factory!r}: {reason(error)}") from error
    if index.metric_type != faiss.METRIC_INNER_PRODUCT:
        # Some types ignore the metric asked for and rank by a distance, best first the other way round.
        raise ValueError(f"FAISS has no inner-product form of {factory!r}")
    return index


def check_factory(factory: str) -> None:
    """Raises ValueError if FAISS has no index of this factory string for inner products, in any dimension."""
    problem: ValueError | None = None
    for dim in _PROBE_DIMS:
        try:
            make_index(dim, factory)
            return
        except ValueError as error:
            problem = problem or error
    assert problem is not None
    raise problem


def rows_to_train(index: Any) -> int:
    """The fewest rows that can train `index`: IVF lists, product-quantiser centroids; 0 if none."""
    if index.is_trained:
        return 0
    needed = 1
    for part in _parts(index):
        if isinstance(part, faiss.IndexIVF):
            needed = max(needed, part.nlist)
        quantiser = getattr(part, "pq", None)
        if quantiser is not None and hasattr(quantiser, "ksub"):
            needed = max(needed, quantiser.ksub)
    return needed


def seed_training(index: Any, seed: int) -> None:
    """Makes the k-means of an IVF index in `index` start from `seed`."""
    for part in _parts(index):
        if isinstance(part, faiss.IndexIVF):
            part.cp.seed = seed


def with_keys(index: Any) -> Any:
    """`index`, or `index` in an IDMap2 where its type cannot store keys of its own."""
    inner = index
    while isinstance(inner, faiss.IndexPreTransform):
        inner = faiss.downcast_index(inner.index)
    if isinstance(inner, faiss.IndexIVF) or isinstance(index, faiss.IndexIDMap):
        return index
    return faiss.IndexIDMap2(index)


def load_index(path: str) -> Any:
    """The index in the local file `path`: mapped into memory where its type allows, else read.

    Mapped pages are shared between processes and come in on first use, so that opening is instant at any
    size.
    """
    try:
        return faiss.read_index(path, faiss.IO_FLAG_MMAP_IFC)
    except RuntimeError:
        return faiss.read_index(path)


def serialise(index: Any) -> NDArray[np.uint8]:
    """The bytes of `index` as `faiss.write_index` would write them, `(bytes,)` uint8."""
    data: NDArray[np.uint8] = faiss.serialize_index(index)
    return data


def deserialise(data: NDArray[np.uint8]) -> Any:
    """The index in `data`."""
    # No downcast_index: its result does not own the memory, and what FAISS reads has its true type already.
    return faiss.deserialize_index(data)


def reason(error: RuntimeError) -> str:
    """The readable end of a FAISS message, which begins with a C++ signature and a path."""
    return " ".join(str(error).rsplit("Error: ", 1)[-1].split())


class KeySelector:
    """The rows of a shard that pass a filter, in the form that FAISS tests row by row.

    Args:
        mask_R: bool `(R,)`, True for the rows that pass.
        start: key of the shard's first row.
    """

    def __init__(self, mask_R: NDArray[np.bool_], start: int) -> None:
        self.count = int(np.count_nonzero(mask_R))
        self.positions = np.flatnonzero(mask_R).astype(np.int64)
        self._mask_R, self._start = mask_R, start

    def by_position(self) -> Any:
        """The selector over positions `0 .. R-1`."""
        return faiss.IDSelectorBitmap(np.packbits(self._mask_R, bitorder="little"))

    def by_key(self) -> Any:
        """The selector over keys `start .. start+R-1`."""
        # Bits of keys below `start` are never read; the pages of zeros they lie in are never materialised.
        first = self._start // 8
        bits = np.packbits(np.concatenate([np.zeros(self._start % 8, np.bool_), self._mask_R]), bitorder="little")
        bitmap = np.zeros(first + len(bits), np.uint8)
        bitmap[first:] = bits
        return faiss.IDSelectorBitmap(bitmap)


class FaissShard:
    """One loaded FAISS index whose key of row `i` is `start + i`. Searches never change it: any thread may
    search.

    `filter_by` says how a filter is answered: `selector` (FAISS skips the rows that fail; IVF probes every
    list, because at 1 % selectivity the usual probes find less than half), `storage` (HNSW: exact over the
    vectors it keeps, because its graph falls apart under a filter), `none` (the type cannot: the caller
    scores the rows).
    """

    def __init__(self, index: Any, start: int, nprobe: int, ef_search: int) -> None:
        self.start, self.nprobe, self.ef_search = start, nprobe, ef_search
        self.index = index
        self.rows, self.dim = int(self.index.ntotal), int(self.index.d)
        inner = self.index
        if isinstance(inner, faiss.IndexIDMap):
            inner = faiss.downcast_index(inner.index)
        self._inner = inner
        ivf = faiss.try_extract_index_ivf(self.index)
        self._every_list = int(ivf.nlist) if ivf is not None else 0
        self._storage = faiss.downcast_index(inner.storage) if isinstance(inner, faiss.IndexHNSW) else None
        self.filter_by = self._how_to_filter()

    def search(
        self, x_ND: NDArray[np.float32], k: int, selector: KeySelector | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Scores and keys `(N, k)`, key -1 where FAISS found no more. Order among ties is FAISS's own."""
        if selector is None:
            return self._run(self.index, x_ND, k, self._parameters(self._inner, None, self.nprobe))
        if self.filter_by == "storage":
            scores, positions = self._run(self._storage, x_ND, k, faiss.SearchParameters(sel=selector.by_position()))
            return scores, np.where(positions >= 0, positions + self.start, -1)
        parameters = self._parameters(self._inner, selector.by_key(), self._every_list)
        return self._run(self.index, x_ND, k, parameters)

    def _how_to_filter(self) -> str:
        if self._storage is not None:
            return "storage"
        if isinstance(self._inner, faiss.IndexRefine):
            return "none"  # its selector would see positions where the id map has keys
        if any(isinstance(part, faiss.IndexHNSW) for part in _parts(self._inner)):
            return "none"  # a graph below a transformation
        # Asked rather than listed: which types take a selector changes between FAISS releases.
        nobody = faiss.IDSelectorBitmap(np.zeros(1, np.uint8))
        try:
            self.index.search(np.zeros((1, self.dim), np.float32), 1, params=self._parameters(self._inner, nobody, 1))
        except RuntimeError:
            return "none"
        return "selector"

    def _parameters(self, index: Any, selector: Any, nprobe: int) -> Any:
        """Per-call settings: setting `index.nprobe` instead would race with the searches of other threads."""
        chosen = {} if selector is None else {"sel": selector}
        if isinstance(index, faiss.IndexIVF):
            return faiss.SearchParametersIVF(nprobe=nprobe, **chosen)
        if isinstance(index, faiss.IndexHNSW):
            return faiss.SearchParametersHNSW(efSearch=self.ef_search, **chosen)
        if isinstance(index, faiss.IndexPreTransform):
            inner = self._parameters(faiss.downcast_index(index.index), selector, nprobe)
            if inner is None or self.index is not index:
                return inner  # below an id map the selector must lie on top to be translated
            return faiss.SearchParametersPreTransform(index_params=inner)
        if isinstance(index, faiss.IndexRefine):
            base = self._parameters(faiss.downcast_index(index.base_index), selector, nprobe)
            factor = index.k_factor
            return faiss.IndexRefineSearchParameters(k_factor=factor, base_index_params=base) if base else None
        return faiss.SearchParameters(**chosen) if chosen else None

    @staticmethod
    def _run(
        index: Any, x_ND: NDArray[np.float32], k: int, parameters: Any
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        scores, keys = index.search(x_ND, k, params=parameters)
        return scores, keys


def _parts(index: Any) -> list[Any]:
    """`index` and the indexes it wraps, outermost first."""
    found: list[Any] = []
    part: Any = faiss.downcast_index(index)
    while part is not None:
        found.append(part)
        if isinstance(part, faiss.IndexPreTransform | faiss.IndexIDMap):
            part = faiss.downcast_index(part.index)
        elif isinstance(part, faiss.IndexRefine):
            part = faiss.downcast_index(part.base_index)
        else:
            part = None
    return found
