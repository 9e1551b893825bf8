"""Ranks of the right answers in a corpus of any size: `metrics.ranks`, read block by block, on Ray tasks if asked.

Two passes: the best relevant score of each query, then how many irrelevant rows come before it. Suffixes as in `exact`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.errors import EvaluateError
from rayemb.evaluate.exact import (
    BLOCK_ROWS,
    SCORES_BYTES,
    ArrayVectors,
    Vectors,
    check_finite,
    fixed_scores,
    floats,
    longest_product,
    on_ray,
    product_error,
    read_block,
)
from rayemb.evaluate.metrics.retrieval import TIE
from rayemb.progress import Progress


@dataclass(frozen=True)
class _Groups:
    queries: NDArray[np.int64]  # (Q,)
    corpus: NDArray[np.int64]  # (N,)
    own: NDArray[np.int64]  # (Q,) the row that is the query itself, -1


def exact_ranks(
    queries: NDArray[np.float32],
    corpus: NDArray[np.float32] | Vectors,
    groups_q: NDArray[np.int64],
    groups_c: NDArray[np.int64],
    *,
    exclude: NDArray[np.int64] | None = None,
    block: int = BLOCK_ROWS,
    tasks: int | None = None,
    progress: Progress | None = None,
) -> NDArray[np.int64]:
    """The 1-based rank `(Q,)` int64 of each query's best relevant row; ties count against the model.

    As `metrics.ranks`, whose tie this is; the same numbers whatever the block and however many tasks. O(Q N D) time,
    memory O(Q + N + block D) and 64 MB a process. Arguments as there and as for `exact_search`; raises EvaluateError
    for shapes that don't fit, rows that are not finite, and queries without a relevant row.
    """
    vectors = ArrayVectors(floats(corpus, "corpus")) if isinstance(corpus, np.ndarray) else corpus
    q_QD = floats(queries, "queries")
    check_finite(q_QD, 0, "queries")
    own_Q = np.full(len(q_QD), -1, np.int64) if exclude is None else np.asarray(exclude, np.int64)
    groups = _Groups(np.asarray(groups_q, np.int64), np.asarray(groups_c, np.int64), own_Q)
    for name, array, rows in (
        ("groups_q", groups.queries, len(q_QD)),
        ("groups_c", groups.corpus, vectors.rows),
        ("exclude", own_Q, len(q_QD)),
    ):
        if array.shape != (rows,):
            raise EvaluateError(f"expected ({rows},), got {array.shape}", where=name)

    def over_all(part: Any, more: Any) -> Any:
        if tasks is None:
            return part.run(q_QD, vectors, 0, vectors.rows, more, progress)
        return on_ray(part, q_QD, vectors, more, tasks=tasks, progress=progress)

    best_Q, longest = over_all(_BestRelevant(block), groups)
    lost = np.flatnonzero(np.isneginf(best_Q))
    if len(lost):
        raise EvaluateError(
            f"{len(lost):,} of {len(q_QD):,} queries have no relevant row, query {lost[0]} first",
            where="groups_q",
            fix="leave those queries out before, and say how many they were",
        )
    least_Q = best_Q - TIE * np.linalg.norm(q_QD.astype(np.float64), axis=1) * longest
    ranks_Q: NDArray[np.int64] = 1 + over_all(_Before(block), (groups, least_Q))
    return ranks_Q


@dataclass(frozen=True)
class _BestRelevant:
    """The best score `(Q,)` of a relevant row, and the length of the longest row."""

    block: int

    def run(
        self,
        q_QD: NDArray[np.float32],
        corpus: Vectors,
        start: int,
        stop: int,
        more: _Groups,
        progress: Progress | None = None,
    ) -> tuple[NDArray[np.float64], float]:
        best_Q, longest = np.full(len(q_QD), -np.inf), 0.0
        order = np.argsort(more.queries, kind="stable")
        sorted_Q = more.queries[order]
        for first in range(start, stop, self.block):
            last = min(first + self.block, stop)
            c_MD = read_block(corpus, first, last, q_QD.shape[1])
            longest = max(longest, float(np.linalg.norm(c_MD.astype(np.float64), axis=1).max(initial=0.0)))
            low, high = (np.searchsorted(sorted_Q, more.corpus[first:last], side=side) for side in ("left", "right"))
            step = max(1, self.block // 8)
            for at in range(0, len(c_MD), step):  # in parts: a group may hold every query
                counts = (high - low)[at : at + step]
                rows_P = np.repeat(np.arange(at, at + len(counts)), counts)
                within = np.arange(len(rows_P)) - np.repeat(np.cumsum(counts) - counts, counts)
                queries_P = order[np.repeat(low[at : at + step], counts) + within]
                others = more.own[queries_P] != rows_P + first
                queries_P, rows_P = queries_P[others], rows_P[others]
                np.maximum.at(best_Q, queries_P, fixed_scores(q_QD, c_MD, queries_P, rows_P))
            if progress:
                progress(last - start, stop - start, f"{last - start:,} rows scored")
        return best_Q, longest

    def merge(self, *parts: tuple[NDArray[np.float64], float]) -> tuple[NDArray[np.float64], float]:
        """The best of all parts."""
        return np.max([part[0] for part in parts], axis=0), max(part[1] for part in parts)


@dataclass(frozen=True)
class _Before:
    """How many irrelevant rows `(Q,)` score at least so much."""

    block: int

    def run(
        self,
        q_QD: NDArray[np.float32],
        corpus: Vectors,
        start: int,
        stop: int,
        more: tuple[_Groups, NDArray[np.float64]],
        progress: Progress | None = None,
    ) -> NDArray[np.int64]:
        groups, least_Q = more
        before_Q = np.zeros(len(q_QD), np.int64)
        norms_Q = np.linalg.norm(q_QD.astype(np.float64), axis=1)
        for first in range(start, stop, self.block):
            last = min(first + self.block, stop)
            c_MD = read_block(corpus, first, last, q_QD.shape[1])
            # float64 at once: the tie keeps relevant rows off the bound, so that next to nothing lies within its error.
            error_Q = product_error(q_QD.shape[1], np.float64, longest_product(norms_Q, c_MD, first))
            columns_DM, groups_M = c_MD.T.astype(np.float64), groups.corpus[first:last]
            step = max(1, SCORES_BYTES // (8 * len(c_MD)))
            for at in range(0, len(q_QD), step):
                own = slice(at, at + step)
                s_BM = q_QD[own].astype(np.float64) @ columns_DM
                counted_BM = groups.queries[own, None] != groups_M[None, :]
                self_B = groups.own[own] - first
                here = np.flatnonzero((self_B >= 0) & (self_B < len(c_MD)))
                counted_BM[here, self_B[here]] = False
                least_B1, error_B1 = least_Q[own, None], error_Q[own, None]
                unsure = np.nonzero((np.abs(s_BM - least_B1) <= error_B1) & counted_BM)
                s_BM[unsure] = fixed_scores(q_QD[own], c_MD, unsure[0], unsure[1])
                before_Q[own] += ((s_BM >= least_B1) & counted_BM).sum(axis=1)
            if progress:
                progress(last - start, stop - start, f"{last - start:,} rows ranked")
        return before_Q

    def merge(self, *parts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Their sum."""
        total: NDArray[np.int64] = np.sum(parts, axis=0)
        return total
