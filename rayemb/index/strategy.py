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
from dataclasses import replace
from typing import Any

import faiss as _faiss
import numpy as np
from numpy.typing import NDArray

from rayemb.index.effort import Effort
from rayemb.index.faiss_index import FaissShard, before_lists, found_by
from rayemb.index.selection import Selection
from rayemb.index.stored import StoredVectors, best_of

faiss: Any = _faiss

Floats = NDArray[np.float32]
Positions = NDArray[np.int64]
Answer = tuple[Floats, Positions]
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

    def __init__(self, shard: FaissShard, from_table: Callable[[Floats, int, Positions], Answer]) -> None:
        self.shard = shard
        self._from_table = from_table
        self._stored = StoredVectors.of(shard.index)
        self._storage = faiss.downcast_index(shard.index.storage) if shard.is_graph else None
        self._lists = _Lists(shard) if shard.ivf is not None and shard.takes_selector else None

    @property
    def stored(self) -> StoredVectors | None:
        """The whole vectors of the index, if it keeps them."""
        return self._stored

    def plan(self, selection: Selection, queries: int, k: int, effort: Effort) -> str:
        """The strategy for `queries` at once: exact, selector or overfetch."""
        shard, count = self.shard, selection.count
        if selection.scarce:
            return "exact"
        fetched = _fetch(k, selection.share)
        exact = count * shard.dim * (_SCATTERED + queries * _BLOCKED)
        if shard.is_graph:
            visited = _GRAPH_ROWS * max(effort.ef_search, _GRAPH_MARGIN * fetched)
            return "exact" if exact <= queries * _VISITED * shard.dim * visited else "overfetch"
        if not shard.takes_selector:
            return "overfetch" if fetched <= min(_FETCH_LIMIT, shard.rows) and count > k else "exact"
        if self._stored is None:
            return "selector"
        if self._lists is not None:
            selector = queries * self._lists.cost(selection, effort.nprobe)
        else:
            selector = queries * (_SCANNED * shard.dim * count + _SKIPPED * shard.rows)
        return "exact" if exact <= selector else "selector"

    def search(self, x_ND: Floats, places: int, selection: Selection, strategy: str, effort: Effort) -> Answer:
        """Scores and positions `(N, places)` by `strategy`; position -1 where there are no more."""
        if strategy == "exact":
            return self._exact(x_ND, places, selection)
        if strategy == "overfetch":
            return self._overfetch(x_ND, places, selection, effort)
        if self._lists is not None:
            return self._lists.search(x_ND, places, selection, effort.nprobe)
        return self.shard.search(x_ND, places, effort, selection.selector)

    def search_alive(self, x_ND: Floats, places: int, alive: Selection, effort: Effort) -> Answer:
        """Scores and positions `(N, places)` among the rows that are `alive`: what an index without the others finds.

        No more is looked into than without a filter: what a search finds anyway, less the rows that are gone, or with
        FAISS skipping them where they are the greater part.
        """
        shard, gone = self.shard, self.shard.rows - alive.count
        if 2 * gone > shard.rows and shard.takes_selector and not shard.is_graph:
            return shard.search(x_ND, places, effort, alive.selector)
        fetched = places + min(gone, 8 + int(_OVERFETCH * places * gone / max(1, alive.count)))
        found_scores, found = np.empty((len(x_ND), places), np.float32), np.empty((len(x_ND), places), np.int64)
        left = np.arange(len(x_ND))
        while True:
            fetched = min(fetched, shard.rows)
            scores, positions = shard.search(x_ND[left], fetched, effort)
            passes = (positions >= 0) & alive.has(np.maximum(positions, 0))
            order = np.argsort(~passes, axis=1, kind="stable")[:, :places]
            kept = np.take_along_axis(passes, order, 1)
            found_scores[left] = np.where(kept, np.take_along_axis(scores, order, 1), np.float32(-np.inf))
            found[left] = np.where(kept, np.take_along_axis(positions, order, 1), -1)
            # Rows that are gone took the places of others, unless the search came to its end.
            short = (passes.sum(axis=1) < places) & (positions >= 0).all(axis=1)
            left = left[short]
            if not len(left) or fetched == shard.rows:
                return found_scores, found
            fetched *= 4

    def _exact(self, x_ND: Floats, places: int, selection: Selection) -> Answer:
        if self._stored is None and self._storage is not None:
            return found_by(self._storage, x_ND, places, faiss.SearchParameters(sel=selection.selector))
        positions = selection.positions
        if self._stored is None:
            return self._from_table(x_ND, places, positions)
        step = max(1, _SCORES // max(1, selection.count))
        parts = [
            best_of(self._stored.scores(x_ND[at : at + step], positions), positions, places)
            for at in range(0, len(x_ND), step)
        ]
        return np.concatenate([part[0] for part in parts]), np.concatenate([part[1] for part in parts])

    def _overfetch(self, x_ND: Floats, places: int, selection: Selection, effort: Effort) -> Answer:
        fetched = min(_fetch(places, selection.share), self.shard.rows)
        if self.shard.is_graph:
            effort = replace(effort, ef_search=max(effort.ef_search, round(_GRAPH_MARGIN * fetched)))
        scores, positions = self.shard.search(x_ND, fetched, effort)
        passes = (positions >= 0) & selection.mask()[np.maximum(positions, 0)]
        order = np.argsort(~passes, axis=1, kind="stable")[:, :places]
        scores = np.take_along_axis(np.where(passes, scores, np.float32(-np.inf)), order, 1)
        positions = np.take_along_axis(np.where(passes, positions, -1), order, 1)
        return self._completed(x_ND, places, selection, (scores, positions), min(places, selection.count))

    def _completed(self, x_ND: Floats, places: int, selection: Selection, found: Answer, wanted: int) -> Answer:
        """`found` `(N, >= places)`, exact for the queries that have fewer than `wanted` results."""
        scores, positions = found
        few = np.flatnonzero((positions >= 0).sum(axis=1) < wanted)
        scores, positions = scores[:, :places], positions[:, :places]
        if len(few):
            # It keeps what is far from such queries: the next one need not be tried in vain.
            selection.scarce |= 2 * len(few) > len(x_ND)
            scores[few], positions[few] = self._exact(x_ND[few], places, selection)
        return scores, positions


class _Lists:
    """IVF lists probed by what passes in them: nearest first, empty ones left out, until enough has been seen."""

    def __init__(self, shard: FaissShard) -> None:
        self.shard, self._ivf = shard, shard.ivf
        self.count = int(self._ivf.nlist)
        # Of a shard by cell most lists lie elsewhere.
        held = sum(self._ivf.invlists.list_size(number) > 0 for number in range(self.count))
        self._rows_per_list: float = shard.rows / max(1, held)
        self._list_R: NDArray[np.int32] | None = None
        self._lock = threading.Lock()

    def search(self, x_ND: Floats, places: int, selection: Selection, nprobe: int) -> Answer:
        """Scores and positions `(N, places)`."""
        passing_L = self._passing(selection)
        x_ND = before_lists(self.shard.index, x_ND)
        width = self._width(selection, nprobe)
        near_NP, which_NP, seen_N = self._ranked(x_ND, width, passing_L, nprobe)
        if width < self.count and (seen_N < min(self._enough(nprobe), selection.count)).any():
            near_NP, which_NP, _ = self._ranked(x_ND, self.count, passing_L, nprobe)
        parameters = faiss.SearchParametersIVF(sel=selection.selector, nprobe=which_NP.shape[1])
        x_ND = np.ascontiguousarray(x_ND, np.float32)
        scores, positions = np.empty((len(x_ND), places), np.float32), np.empty((len(x_ND), places), np.int64)
        # Python's `search_preassigned` takes no parameters.
        arrays = (faiss.swig_ptr(each) for each in (which_NP, near_NP, scores, positions))
        self._ivf.search_preassigned_c(len(x_ND), faiss.swig_ptr(x_ND), places, *arrays, False, parameters)
        return scores, positions

    def cost(self, selection: Selection, nprobe: int) -> float:
        """About what a query costs, in ns."""
        seen = min(self._enough(nprobe), selection.count)
        scanned = min(seen / selection.share, self.shard.rows)
        lists = _RANKING + _RANKED * self._width(selection, nprobe)
        return _SCANNED * self.shard.dim * seen + _SKIPPED * scanned + lists

    def _enough(self, nprobe: int) -> int:
        """Rows that an unfiltered search sees: a filtered one has to see as many that pass."""
        return max(1, int(nprobe * self._rows_per_list + 0.5))

    def _width(self, selection: Selection, nprobe: int) -> int:
        return min(self.count, 1 + round(2 * nprobe / selection.share))

    def _ranked(
        self, x_ND: Floats, width: int, passing_L: Positions, nprobe: int
    ) -> tuple[Floats, Positions, Positions]:
        """Nearness and number of the lists to probe, `(N, P)` with -1 for none, and the rows that pass in them."""
        near_NP, which_NP = self._ivf.quantizer.search(x_ND, width)
        passing_NP = np.where(which_NP >= 0, passing_L[which_NP], 0)
        before_NP = np.cumsum(passing_NP, axis=1) - passing_NP
        # Where rows lie dense, the usual lists hold more than the mean.
        usual_P = np.arange(width) < nprobe
        probed = (passing_NP > 0) & (usual_P | (before_NP < self._enough(nprobe)))
        # The probed ones to the front, in their order, and no wider than the query with the most.
        most = max(1, int(probed.sum(axis=1).max(initial=0)))
        order = np.argsort(~probed, axis=1, kind="stable")[:, :most]
        which = np.take_along_axis(np.where(probed, which_NP, -1), order, 1)
        return (
            np.ascontiguousarray(np.take_along_axis(near_NP, order, 1)),
            np.ascontiguousarray(which),
            (passing_NP * probed).sum(axis=1),
        )

    def _passing(self, selection: Selection) -> Positions:
        """How many rows of each list pass, `(lists,)`."""
        found: Positions | None = selection.per_list
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
                list_R[faiss.rev_swig_ptr(lists.get_ids(number), size)] = number
        return list_R


def _fetch(k: int, share: float) -> int:
    return int(np.ceil(_OVERFETCH * k / share)) + 8
