"""The whole vectors that an index keeps, row by row, without a copy of them."""

import ctypes
from typing import Any

import faiss as _faiss
import numpy as np
from numpy.typing import NDArray

faiss: Any = _faiss

_BLOCK = 1024  # rows gathered at a time: they stay in the cache until they are multiplied


class StoredVectors:
    """Vectors of rows by position, read where FAISS keeps them.

    Args:
        rows_XD: float32, a row for each place that a vector could begin at.
        at_R: which of those is the vector of row `i`; None where it is row `i`.
        keeper: what owns the memory.
    """

    def __init__(self, rows_XD: NDArray[np.float32], at_R: NDArray[np.int64] | None, keeper: object) -> None:
        self._rows_XD, self._at_R, self._keeper = rows_XD, at_R, keeper

    @classmethod
    def of(cls, index: Any) -> "StoredVectors | None":
        """Those of a FAISS index; None if it keeps codes only."""
        if isinstance(index, faiss.IndexHNSW):
            return cls.of(faiss.downcast_index(index.storage))
        # These and no subtypes: some lay their components out in another order.
        if type(index) in (faiss.IndexFlat, faiss.IndexFlatIP) and index.ntotal:
            whole = faiss.rev_swig_ptr(index.get_xb(), index.ntotal * index.d)
            return cls(whole.reshape(index.ntotal, index.d), None, index)
        if type(index) is faiss.IndexIVFFlat and index.ntotal:
            return cls._of_lists(index)
        return None

    @classmethod
    def _of_lists(cls, index: Any) -> "StoredVectors | None":
        """One array over all the memory that the lists lie in; only places where vectors begin are ever read."""
        lists = faiss.downcast_InvertedLists(index.invlists)
        if not isinstance(lists, faiss.ArrayInvertedLists | faiss.OnDiskInvertedLists):
            return None
        address_R = np.zeros(index.ntotal, np.int64)
        for number in range(index.nlist):
            size = lists.list_size(number)
            if size:
                positions = faiss.rev_swig_ptr(lists.get_ids(number), size)
                codes = faiss.rev_swig_ptr(lists.get_codes(number), size * index.code_size)
                address_R[positions] = codes.ctypes.data + np.arange(size, dtype=np.int64) * index.code_size
        first, last = int(address_R.min()), int(address_R.max())
        if first == 0 or ((address_R - first) % 4).any():
            return None  # a position without a vector, or vectors that do not lie on one grid of floats
        floats = (last - first) // 4 + index.d
        memory = np.frombuffer((ctypes.c_byte * (floats * 4)).from_address(first), np.float32)
        rows = np.lib.stride_tricks.as_strided(memory, (floats - index.d + 1, index.d), (4, 4), writeable=False)
        return cls(rows, (address_R - first) // 4, index)

    def take(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """The vectors `(len(positions), D)` of these rows."""
        return self._rows_XD[positions if self._at_R is None else self._at_R[positions]]

    def scores(self, x_ND: NDArray[np.float32], positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """Inner products `(N, len(positions))` of queries with these rows."""
        scores = np.empty((len(x_ND), len(positions)), np.float32)
        for start in range(0, len(positions), _BLOCK):
            block = self.take(positions[start : start + _BLOCK])
            np.matmul(x_ND, block.T, out=scores[:, start : start + len(block)])
        return scores


def best_of(
    scores_NM: NDArray[np.float32], positions_M: NDArray[np.int64], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The `k` best of scored rows, `(N, k)`: lowest position first among equal scores; padded with -inf and -1.

    `positions_M` ascend.
    """
    n, m = scores_NM.shape
    best_scores, best = np.full((n, k), -np.inf, np.float32), np.full((n, k), -1, np.int64)
    kept = min(k, m)
    if not kept:
        return best_scores, best
    last = np.partition(scores_NM, m - kept, axis=1)[:, m - kept]
    for row in range(n):
        # All that tie for the last place are there, in the order of their positions, which a stable sort keeps.
        tied = np.flatnonzero(scores_NM[row] >= last[row])
        chosen = tied[np.argsort(-scores_NM[row, tied], kind="stable")[:kept]]
        best_scores[row, :kept], best[row, :kept] = scores_NM[row, chosen], positions_M[chosen]
    return best_scores, best
