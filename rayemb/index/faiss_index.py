"""FAISS types under one contract: positions and best inner products out, settings and filters per call.

Shape suffixes: N queries, D dimensions, K results, R rows of the shard.
"""

import contextlib
import ctypes
import re
from dataclasses import replace
from typing import Any

import faiss as _faiss
import numpy as np
from numpy.typing import NDArray

from rayemb.index.effort import Effort

# FAISS's stubs lack the keyword constructors and several types.
faiss: Any = _faiss

# Product quantisers split the vector into equal parts; nearly every number of parts divides one of these.
_PROBE_DIMS = (960, 1344)
_REFINE = re.compile(r"^(RFlat|Refine\(.+\))$")
# Blocks above this size are given back to the system when they are freed (glibc; see `give_back_memory`).
_LARGE_BLOCK, _M_MMAP_THRESHOLD = 1 << 16, -3


def make_index(dim: int, factory: str, prefix: int | None = None) -> Any:
    """An untrained FAISS index of `dim` dimensions for inner products.

    Its ids are positions in the order of adding. With `prefix`, what `factory` names before its refine stage
    sees the first `prefix` coordinates at unit length, and the refine stage all of them (Matryoshka
    Representation Learning, 2022, calls it funnel retrieval).

    Raises ValueError if it cannot be.
    """
    if prefix is not None:
        return _funnel(dim, factory, prefix)
    try:
        index = faiss.index_factory(dim, factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(f"FAISS cannot make {factory!r}: {reason(error)}") from error
    if isinstance(index, faiss.IndexIDMap):
        raise ValueError(f"{factory!r} maps ids, which an index does by itself: leave IDMap out")
    if any(part.metric_type != faiss.METRIC_INNER_PRODUCT for part in _parts(index)):
        # Some types ignore the metric asked for and rank by a distance, best first the other way round.
        raise ValueError(f"FAISS has no inner-product form of {factory!r}")
    return index


def _funnel(dim: int, factory: str, prefix: int) -> Any:
    base, _, stage = factory.rpartition(",")
    if not base or not _REFINE.match(stage):
        raise ValueError(f"{factory!r} has no refine stage to score all coordinates by: append ,Refine(SQfp16)")
    if prefix >= dim:
        raise ValueError(f"a prefix of {prefix} dimensions is no part of {dim}")
    whole = make_index(dim, f"Flat,{stage}")
    cut = faiss.RemapDimensionsTransform(dim, prefix, False)
    narrow = faiss.IndexPreTransform(faiss.NormalizationTransform(prefix, 2.0), make_index(prefix, base))
    narrow.prepend_transform(cut)
    # FAISS's constructors keep what Python gave them alive; a clone belongs to nothing else.
    return faiss.IndexRefine(narrow, faiss.clone_index(faiss.downcast_index(whole.refine_index)))


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


def has_lists(factory: str) -> bool:
    """Whether a factory string names an IVF type."""
    return any(part.startswith("IVF") for part in factory.split(","))


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


def reserve(index: Any, rows: int) -> None:
    """Makes room for `rows` rows at once, where `index` keeps them in one array.

    Else that array doubles as it grows, and old and new are there at the same time.
    """
    for part in _parts(index):
        arrays = [part]
        if isinstance(part, faiss.IndexHNSW):
            arrays = [faiss.downcast_index(part.storage)]
        elif isinstance(part, faiss.IndexRefine):
            arrays = [faiss.downcast_index(part.refine_index)]
        for array in arrays:
            if isinstance(array, faiss.IndexFlatCodes) and not array.ntotal:
                array.codes.resize(rows * array.code_size)
                array.codes.resize(0)  # keeps its capacity


def give_back_memory() -> None:
    """Makes this process return large freed blocks to the system.

    The lists of an IVF index grow in thousands of steps. By default the freed ones stay with the process: 1.8
    to 3.7 times the size of the index, against 1.1 (measured with glibc 2.36, IVF256 over 300,000 rows).
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BLOCK)


def parts_of(index: Any) -> tuple[int, bool, bool]:
    """What of an `Effort` matters to `index`: IVF lists (0: no IVF), an HNSW graph, a refine stage."""
    parts = _parts(index)
    ivf = faiss.try_extract_index_ivf(index)
    graph = any(isinstance(part, faiss.IndexHNSW) for part in parts)
    return int(ivf.nlist) if ivf is not None else 0, graph, any(isinstance(part, faiss.IndexRefine) for part in parts)


def before_lists(index: Any, x_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    """Queries `(N, D')` as the IVF lists of `index` see them: after PCA, OPQ and the like."""
    for part in _parts(index):
        if isinstance(part, faiss.IndexPreTransform):
            for i in range(part.chain.size()):
                x_ND = faiss.downcast_VectorTransform(part.chain.at(i)).apply(x_ND)
        elif isinstance(part, faiss.IndexIVF):
            return x_ND
    raise ValueError("the index has no IVF lists")


def probed_lists(index: Any, x_ND: NDArray[np.float32], nprobe: int) -> NDArray[np.int64]:
    """The IVF lists `(N, nprobe)` that a search for each of `x_ND` looks into, nearest first."""
    ivf = faiss.try_extract_index_ivf(index)
    lists: NDArray[np.int64] = ivf.quantizer.search(before_lists(index, x_ND), min(nprobe, ivf.nlist))[1]
    return lists


def centroids(index: Any) -> NDArray[np.float32]:
    """The centroids of the IVF lists of `index`, `(lists, D')` float32; `D'` is what the lists see."""
    ivf = faiss.try_extract_index_ivf(index)
    found = np.empty((ivf.nlist, ivf.d), np.float32)
    ivf.quantizer.reconstruct_n(0, ivf.nlist, found)  # into an array: see `found_by`
    return found


def load_index(path: str, *, mapped: bool = True) -> Any:
    """The index in the local file `path`: mapped into memory where its type allows and that is wanted, else read.

    Mapped pages are shared between processes and come in on first use, so that opening is instant at any
    size; what is read whole is in memory from the start and stays there.
    """
    if not mapped:
        return faiss.read_index(path)
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


def found_by(
    index: Any, x_ND: NDArray[np.float32], k: int, parameters: Any
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Scores and positions `(N, k)` of FAISS's search with its own parameters."""
    # faiss.contrib.torch_utils (pytorch-metric-learning imports it) puts a search without them in place of FAISS's, and
    # methods that give tensors where they are not told into which array.
    return getattr(index, "search_numpy", index.search)(x_ND, k, params=parameters)  # type: ignore[no-any-return]


class FaissShard:
    """One loaded FAISS index over positions `0 .. R-1`. Searches never change it: any thread may search.

    `takes_selector`: whether FAISS can be told to skip rows; else the caller drops or scores them.
    `is_graph`: HNSW, whose graph falls apart where few rows pass.
    """

    def __init__(self, index: Any) -> None:
        self.index = index
        self.rows, self.dim = int(index.ntotal), int(index.d)
        self.ivf = faiss.try_extract_index_ivf(index)
        self.is_graph = isinstance(index, faiss.IndexHNSW)
        self.takes_selector = self._takes_selector()

    def search(
        self, x_ND: NDArray[np.float32], k: int, effort: Effort, selector: Any = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Scores and positions `(N, k)`, -1 where FAISS found no more. Order among ties is FAISS's own.

        With a FAISS `selector` only positions that it names; IVF probes `nprobe` lists then too.
        """
        # More than all rows is nothing more, and FAISS would make room for it.
        ef_search, rerank = min(effort.ef_search, max(1, self.rows)), min(effort.rerank, 1 + self.rows // k)
        if (ef_search, rerank) != (effort.ef_search, effort.rerank):
            effort = replace(effort, ef_search=ef_search, rerank=rerank)
        scores, positions = found_by(self.index, x_ND, k, self._parameters(self.index, selector, effort))
        return scores, positions

    def _takes_selector(self) -> bool:
        if isinstance(self.index, faiss.IndexRefine):
            return False  # its first stage's estimates would choose among the rows that the caller scores exactly
        if not self.is_graph and any(isinstance(part, faiss.IndexHNSW) for part in _parts(self.index)):
            return False  # a graph below a transformation
        # Asked rather than listed: which types take a selector changes between FAISS releases.
        nobody = faiss.IDSelectorBitmap(np.zeros(1, np.uint8))
        try:
            self.search(np.zeros((1, self.dim), np.float32), 1, Effort(nprobe=1), nobody)
        except RuntimeError:
            return False
        return True

    def _parameters(self, index: Any, selector: Any, effort: Effort) -> Any:
        """Per-call settings: setting `index.nprobe` instead would race with the searches of other threads."""
        chosen = {} if selector is None else {"sel": selector}
        if isinstance(index, faiss.IndexIVF):
            return faiss.SearchParametersIVF(nprobe=effort.nprobe, **chosen)
        if isinstance(index, faiss.IndexHNSW):
            return faiss.SearchParametersHNSW(efSearch=effort.ef_search, **chosen)
        if isinstance(index, faiss.IndexPreTransform):
            inner = self._parameters(faiss.downcast_index(index.index), selector, effort)
            return None if inner is None else faiss.SearchParametersPreTransform(index_params=inner)
        if isinstance(index, faiss.IndexRefine):
            base = self._parameters(faiss.downcast_index(index.base_index), selector, effort)
            return faiss.IndexRefineSearchParameters(k_factor=effort.rerank, base_index_params=base)
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
