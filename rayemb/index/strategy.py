"""How a shard answers under a filter: whichever way costs least for what passes, and finds what there is.

exact      inner products with the vectors of the rows that pass; exact
selector   FAISS skips the rows that fail: all of a flat index, or as many IVF lists as hold enough rows that pass,
           nearest first
overfetch  more results than asked for, and those that fail dropped: for HNSW, whose graph finds the wrong rows where
           it is told to skip (recall@10 0.5 for filters that keep what is far), and for types that take no selector;
           a query that is left with too few is answered exactly

The constants are of `jobs/bench/filtered.py`.

Shape suffixes: N queries, D dimensions, K results, P lists probed.
"""

import threading
from collections.abc import Callable
from typing import Any

import faiss as _faiss
import numpy as np
from numpy.typing import NDArray

from rayemb.index.faiss_index import FaissShard
from rayemb.index.selection import Selection
from rayemb.index.stored import StoredVectors, best_of

faiss: Any = _faiss

Floats = NDArray[np.float32]
Keys = NDArray[np.int64]
Answer = tuple[Floats, Keys]
Search = Callable[[Floats, int], Answer]

# Measured costs in ns (`jobs/bench/filtered.py`, one thread): of a component of a vector that is read where it lies
# scattered, multiplied in a block, scored by FAISS among others that it skips; of a row that it skips, of an IVF list
# that is ranked and of a search that ranks lists; of a component of a vector that a graph search visits.
_SCATTERED, _BLOCKED, _SCANNED, _SKIPPED, _RANKED, _RANKING, _VISITED = 0.6, 0.067, 0.55, 1.8, 250.0, 100_000.0, 0.7
# Vectors that a graph search visits for each candidate that it keeps.
_GRAPH_ROWS = 24
# Exact answers over this many scores at a time.
_SCORES = 1 << 22
# Candidates that a graph keeps for each result that is fetched: the last ones are found less surely.
_GRAPH_MARGIN = 1.5
# Rows fetched for each that is wanted and should pass.
_OVERFETCH = 2.0
_FETCH_LIMIT = 4096


class FilteredSearch:
    """The filtered searches of one loaded shard. Any thread may search.

    Args:
        shard: the FAISS index.
        from_table: exact answers `(queries, k, positions)` from the vectors of the embeddings table, for
            indexes that keep none.
    """

    def __init__(self, shard: FaissShard, from_table: Callable[[Floats, int, Keys], Answer]) -> None:
        self.shard = shard
        self._from_table = from_table
        self._stored = StoredVectors.of(shard.inner, shard.start)
        self._storage = faiss.downcast_index(shard.inner.storage) if shard.is_graph else None
        self._lists = _Lists(shard) if shard.ivf is not None and shard.takes_selector else None

    @property
    def stored(self) -> StoredVectors | None:
        """The whole vectors of the index, if it keeps them."""
        return self._stored

    def plan(self, selection: Selection, queries: int, k: int) -> str:
        """The strategy for `queries` at once: exact, selector or overfetch."""
        shard, count = self.shard, selection.count
        if selection.scarce:
            return "exact"
        fetched = _fetch(k, selection.share)
        exact = count * shard.dim * (_SCATTERED + queries * _BLOCKED)
        if shard.is_graph:
            visited = _GRAPH_ROWS * max(shard.ef_search, _GRAPH_MARGIN * fetched)
            return "exact" if exact <= queries * _VISITED * shard.dim * visited else "overfetch"
        if not shard.takes_selector:
            return "overfetch" if fetched <= min(_FETCH_LIMIT, shard.rows) and count > k else "exact"
        if self._stored is None:
            return "selector"
        if self._lists is not None:
            selector = queries * self._lists.cost(selection)
        else:
            selector = queries * (_SCANNED * shard.dim * count + _SKIPPED * shard.rows)
        return "exact" if exact <= selector else "selector"

    def search(self, x_ND: Floats, places: int, selection: Selection, strategy: str) -> Answer:
        """Scores and keys `(N, places)` by `strategy`; key -1 where there are no more."""
        if strategy == "exact":
            return self._exact(x_ND, places, selection)
        if strategy == "overfetch":
            return self._overfetch(x_ND, places, selection)
        if self._lists is not None:
            return self._lists.search(x_ND, places, selection)
        return self.shard.search(x_ND, places, selection)

    def _exact(self, x_ND: Floats, places: int, selection: Selection) -> Answer:
        if self._stored is None and self._storage is not None:
            parameters = faiss.SearchParameters(sel=selection.by_position)
            scores, positions = self._storage.search(x_ND, places, params=parameters)
            return scores, np.where(positions >= 0, positions + self.shard.start, -1)
        if self._stored is None:
            return self._from_table(x_ND, places, selection.positions)
        step = max(1, _SCORES // max(1, selection.count))
        keys = selection.positions + self.shard.start
        parts = [
            best_of(self._stored.scores(x_ND[at : at + step], selection.positions), keys, places)
            for at in range(0, len(x_ND), step)
        ]
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    def _overfetch(self, x_ND: Floats, places: int, selection: Selection) -> Answer:
        shard = self.shard
        fetched = min(_fetch(places, selection.share), shard.rows)
        effort = max(shard.ef_search, round(_GRAPH_MARGIN * fetched)) if shard.is_graph else None
        scores, keys = shard.search(x_ND, fetched, ef_search=effort)
        mask = selection.mask()
        passes = (keys >= 0) & mask[np.where(keys >= 0, keys - shard.start, 0)]
        order = np.argsort(~passes, axis=1, kind="stable")[:, :places]
        scores = np.take_along_axis(np.where(passes, scores, np.float32(-np.inf)), order, 1)
        keys = np.take_along_axis(np.where(passes, keys, -1), order, 1)
        return self._completed(x_ND, places, selection, (scores, keys), min(places, selection.count))

    def _completed(self, x_ND: Floats, places: int, selection: Selection, found: Answer, wanted: int) -> Answer:
        """`found` `(N, >= places)`, exact for the queries that have fewer than `wanted` results."""
        scores, keys = found
        few = np.flatnonzero((keys >= 0).sum(axis=1) < wanted)
        scores, keys = scores[:, :places], keys[:, :places]
        if len(few):
            # It keeps what is far from such queries: the next one need not be tried in vain.
            selection.scarce |= 2 * len(few) > len(x_ND)
            scores[few], keys[few] = self._exact(x_ND[few], places, selection)
        return scores, keys


class _Lists:
    """IVF lists probed by what passes in them: nearest first, empty ones left out, until enough has been seen."""

    def __init__(self, shard: FaissShard) -> None:
        self.shard, self._ivf = shard, shard.ivf
        self.count = int(self._ivf.nlist)
        # Rows that an unfiltered search sees: a filtered one has to see as many that pass.
        self.enough = max(1, round(shard.nprobe * shard.rows / self.count))
        self._list_R: NDArray[np.int32] | None = None
        self._lock = threading.Lock()

    def search(self, x_ND: Floats, places: int, selection: Selection) -> Answer:
        """Scores and keys `(N, places)`."""
        shard, ivf = self.shard, self._ivf
        passing_L = self._passing(selection)
        x_ND = shard.transformed(x_ND)
        width = self._width(selection)
        near_NP, which_NP, seen_N = self._ranked(x_ND, width, passing_L)
        if width < self.count and (seen_N < min(self.enough, selection.count)).any():
            near_NP, which_NP, _ = self._ranked(x_ND, self.count, passing_L)
        parameters = faiss.SearchParametersIVF(sel=selection.by_key, nprobe=which_NP.shape[1])
        x_ND = np.ascontiguousarray(x_ND, np.float32)
        scores, keys = np.empty((len(x_ND), places), np.float32), np.empty((len(x_ND), places), np.int64)
        # Python's `search_preassigned` takes no parameters.
        arrays = (faiss.swig_ptr(each) for each in (which_NP, near_NP, scores, keys))
        ivf.search_preassigned_c(len(x_ND), faiss.swig_ptr(x_ND), places, *arrays, False, parameters)
        return scores, keys

    def cost(self, selection: Selection) -> float:
        """About what a query costs, in ns."""
        seen = min(self.enough, selection.count)
        scanned = min(seen / selection.share, self.shard.rows)
        lists = _RANKING + _RANKED * self._width(selection)
        return _SCANNED * self.shard.dim * seen + _SKIPPED * scanned + lists

    def _width(self, selection: Selection) -> int:
        return min(self.count, 1 + round(2 * self.shard.nprobe / selection.share))

    def _ranked(self, x_ND: Floats, width: int, passing_L: Keys) -> tuple[Floats, Keys, Keys]:
        """Nearness and number of the lists to probe, `(N, P)` with -1 for none, and the rows that pass in them."""
        near_NP, which_NP = self._ivf.quantizer.search(x_ND, width)
        passing_NP = np.where(which_NP >= 0, passing_L[which_NP], 0)
        before_NP = np.cumsum(passing_NP, axis=1) - passing_NP
        # Where rows lie dense, the usual lists hold more than the mean.
        usual_P = np.arange(width) < self.shard.nprobe
        probed = (passing_NP > 0) & (usual_P | (before_NP < self.enough))
        # The probed ones to the front, in their order, and no wider than the query with the most.
        most = max(1, int(probed.sum(axis=1).max(initial=0)))
        order = np.argsort(~probed, axis=1, kind="stable")[:, :most]
        which = np.take_along_axis(np.where(probed, which_NP, -1), order, 1)
        return (
            np.ascontiguousarray(np.take_along_axis(near_NP, order, 1)),
            np.ascontiguousarray(which),
            (passing_NP * probed).sum(axis=1),
        )

    def _passing(self, selection: Selection) -> Keys:
        """How many rows of each list pass, `(lists,)`."""
        found: Keys | None = selection.per_list
        if found is None:
            if self._list_R is None:
                with self._lock:
                    if self._list_R is None:
                        self._list_R = self._lists_of_rows()
            found = np.bincount(self._list_R[selection.positions], minlength=self.count)
            selection.per_list = found
        return found

    def _lists_of_rows(self) -> NDArray[np.int32]:
        lists = self._ivf.invlists
        list_R = np.zeros(self.shard.rows, np.int32)
        for number in range(self.count):
            size = lists.list_size(number)
            if size:
                list_R[faiss.rev_swig_ptr(lists.get_ids(number), size) - self.shard.start] = number
        return list_R


def _fetch(k: int, share: float) -> int:
    return int(np.ceil(_OVERFETCH * k / share)) + 8
