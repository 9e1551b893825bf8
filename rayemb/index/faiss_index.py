"""FAISS types under one contract: int64 keys in, best inner products out, settings and filters per call.

Shape suffixes: N queries, D dimensions, K results, R rows of the shard.
"""

from typing import Any

import faiss as _faiss
import numpy as np
from numpy.typing import NDArray

from rayemb.index.selection import Selection

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


class FaissShard:
    """One loaded FAISS index whose key of row `i` is `start + i`. Searches never change it: any thread may
    search.

    `takes_selector`: whether FAISS can be told to skip rows; else the caller drops or scores them.
    `is_graph`: HNSW, whose graph falls apart where few rows pass.
    """

    def __init__(self, index: Any, start: int, nprobe: int, ef_search: int) -> None:
        self.start, self.nprobe, self.ef_search = start, nprobe, ef_search
        self.index = index
        self.rows, self.dim = int(self.index.ntotal), int(self.index.d)
        inner = self.index
        if isinstance(inner, faiss.IndexIDMap):
            inner = faiss.downcast_index(inner.index)
        self.inner = inner
        self.ivf = faiss.try_extract_index_ivf(self.index)
        self.is_graph = isinstance(inner, faiss.IndexHNSW)
        self.takes_selector = self._takes_selector()

    def search(
        self, x_ND: NDArray[np.float32], k: int, selection: Selection | None = None, *, ef_search: int | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Scores and keys `(N, k)`, key -1 where FAISS found no more. Order among ties is FAISS's own.

        With a `selection` only of its rows; IVF probes `nprobe` lists then too.
        """
        ef_search = ef_search or self.ef_search
        if selection is None or self.inner is self.index:
            by_key = selection.by_key if selection else None
            scores, keys = self.index.search(x_ND, k, params=self._parameters(self.inner, by_key, ef_search))
            return scores, keys
        # Past the id map, whose translation of each position costs more than the test of its bit.
        parameters = self._parameters(self.inner, selection.by_position, ef_search)
        scores, positions = self.inner.search(x_ND, k, params=parameters)
        return scores, np.where(positions >= 0, positions + self.start, -1)

    def transformed(self, x_ND: NDArray[np.float32]) -> NDArray[np.float32]:
        """Queries as the IVF index inside sees them: after PCA, OPQ and the like."""
        index = self.index
        while isinstance(index, faiss.IndexPreTransform):
            for i in range(index.chain.size()):
                x_ND = faiss.downcast_VectorTransform(index.chain.at(i)).apply(x_ND)
            index = faiss.downcast_index(index.index)
        return x_ND

    def _takes_selector(self) -> bool:
        if isinstance(self.inner, faiss.IndexRefine):
            return False  # its selector would see positions where the id map has keys
        if not self.is_graph and any(isinstance(part, faiss.IndexHNSW) for part in _parts(self.inner)):
            return False  # a graph below a transformation
        # Asked rather than listed: which types take a selector changes between FAISS releases.
        try:
            self.search(np.zeros((1, self.dim), np.float32), 1, Selection(np.zeros(self.rows, np.bool_), self.start))
        except RuntimeError:
            return False
        return True

    def _parameters(self, index: Any, selector: Any, ef_search: int) -> Any:
        """Per-call settings: setting `index.nprobe` instead would race with the searches of other threads."""
        chosen = {} if selector is None else {"sel": selector}
        if isinstance(index, faiss.IndexIVF):
            return faiss.SearchParametersIVF(nprobe=self.nprobe, **chosen)
        if isinstance(index, faiss.IndexHNSW):
            return faiss.SearchParametersHNSW(efSearch=ef_search, **chosen)
        if isinstance(index, faiss.IndexPreTransform):
            inner = self._parameters(faiss.downcast_index(index.index), selector, ef_search)
            if inner is None or (self.index is not index and selector is None):
                return inner  # an id map hands it on as it is
            return faiss.SearchParametersPreTransform(index_params=inner)
        if isinstance(index, faiss.IndexRefine):
            base = self._parameters(faiss.downcast_index(index.base_index), selector, ef_search)
            factor = index.k_factor
            return faiss.IndexRefineSearchParameters(k_factor=factor, base_index_params=base) if base else None
        return faiss.SearchParameters(**chosen) if chosen else None


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
