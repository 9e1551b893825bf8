"""Retrieval within classes, as metric learning measures it (CUB, Cars, SOP): any hit, R-precision, MAP@R, MRR.

Suffixes: Q queries, M candidates, D dimensions, K places of a list, B queries of one block.

A query's R relevant candidates are those of its class, itself left out by index. **Recall@k** is the share of queries
with any of them among the first k (Jegou et al., 2011; Oh Song et al., 2016), not |relevant in top k| / R.
**R-precision** is the precision at R; **MAP@R** = 1/R · sum over i <= R of P(i) · relevant(i) (Musgrave et al., 2020).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.metrics.arrays import as_integers, as_vectors
from rayemb.evaluate.metrics.errors import MetricError
from rayemb.evaluate.metrics.lists import blocks, checked_ids, checked_scores, ordered
from rayemb.evaluate.metrics.means import Mean, mean_over
from rayemb.evaluate.metrics.retrieval import TIE, _excluded, _k, _pool

_SCORES = 1 << 22
"""Similarities held at once: 32 MB in each of the few arrays of a block."""


@dataclass(frozen=True, eq=False)
class ClassRetrieval:
    """One value a query, all `(Q,)` float64; NaN for a query whose class has no other member."""

    recall: Mapping[int, NDArray[np.float64]]
    """By k: 1 where any of the class is among the first k. Precision@1 is `recall[1]`."""
    r_precision: NDArray[np.float64]
    map_at_r: NDArray[np.float64]
    reciprocal_rank: NDArray[np.float64]
    """Of the first of the class; from lists 0 where the list has none."""
    relevant: NDArray[np.int64]
    """R of each query."""
    labels: NDArray[np.int64]

    def mean(self, name: str, average: Literal["sample", "class"] = "sample") -> Mean:
        """The mean of `recall@k`, `precision_at_1`, `r_precision`, `map_at_r` or `mrr`, with the queries it is of.

        average: `sample` over the queries; `class` over the classes' means (`avg_of_avgs` of
        pytorch-metric-learning). Lone queries are in neither.
        """
        if average not in ("sample", "class"):
            raise MetricError(f"there is no average {average!r}", where="average", fix="sample or class")
        return mean_over(self._values(name), self.labels if average == "class" else None)

    def _values(self, name: str) -> NDArray[np.float64]:
        known = {f"recall@{k}": values for k, values in self.recall.items()} | {
            "r_precision": self.r_precision,
            "map_at_r": self.map_at_r,
            "mrr": self.reciprocal_rank,
        }
        if 1 in self.recall:
            known["precision_at_1"] = self.recall[1]
        if name not in known:
            raise MetricError(f"{name!r} was not measured", where="metric", fix=f"one of {', '.join(known)}")
        return known[name]


def class_retrieval(
    queries: NDArray[np.float32],
    labels_q: NDArray[np.int64],
    candidates: NDArray[np.float32] | None = None,
    labels_c: NDArray[np.int64] | None = None,
    *,
    exclude: NDArray[np.int64] | None = None,
    ks: Sequence[int] = (1, 2, 4, 8),
    block: int | None = None,
) -> ClassRetrieval:
    """Metric-learning retrieval by exact inner products; unit vectors give the order of Euclidean distances, too.

    Ties count against the model, as in `ranks`: a candidate of another class as similar (within `TIE`) stands first.

    Args:
        queries: `(Q, D)` finite floats.
        labels_q: `(Q,)` integers.
        candidates: `(M, D)`; None: the queries themselves, each of them without itself.
        labels_c: `(M,)` integers, with `candidates`.
        exclude: `(Q,)` integers: the candidate that is the query itself, -1 where there is none; not without
            `candidates`. By index: dropping the first hit would drop the wrong one of exact duplicates.
        ks: the k of recall@k, 1 or more each; all candidates where there are fewer.
        block: queries at a time; None: as many as make some 4 million similarities. The values do not depend on it.

    Memory is O((Q + M) · D + block · M), time O(Q · M · D). For millions of vectors see `class_retrieval_of_lists`.
    Raises MetricError for wrong shapes, non-finite vectors, and if every query is alone in its class.
    """
    q_QD = as_vectors(queries, "queries")
    l_Q = as_integers(labels_q, len(q_QD), "labels_q")
    c_MD, l_M, self_Q = q_QD, l_Q, np.arange(len(q_QD))
    if candidates is None and (labels_c is not None or exclude is not None):
        raise MetricError("without candidates the queries are their own", where="labels_c, exclude")
    if candidates is not None:
        c_MD = as_vectors(candidates, "candidates")
        if labels_c is None:
            raise MetricError("the candidates have no labels", where="labels_c")
        l_M, self_Q = as_integers(labels_c, len(c_MD), "labels_c"), _excluded(exclude, len(q_QD), len(c_MD))
        if q_QD.shape[1] != c_MD.shape[1]:
            raise MetricError(
                f"queries have {q_QD.shape[1]} dimensions, candidates {c_MD.shape[1]}", where="candidates"
            )
    if block is not None and block < 1:
        raise MetricError(f"a block has at least one query, got {block}", where="block")
    ks = [_k(k) for k in ks]
    relevant_Q = _relevant(l_Q, l_M, self_Q)

    tie_Q = TIE * np.linalg.norm(q_QD, axis=1) * np.linalg.norm(c_MD, axis=1).max(initial=0.0)
    tie_Q = np.maximum(tie_Q, np.finfo(np.float64).tiny)  # zero vectors are ties as well
    rank_Q, r_precision, map_at_r = np.ones(len(q_QD)), np.zeros(len(q_QD)), np.zeros(len(q_QD))
    for part in blocks(len(q_QD), len(c_MD), _SCORES if block is None else block * len(c_MD)):
        s_BM = q_QD[part] @ c_MD.T
        own_BM = l_Q[part, None] == l_M[None, :]
        rows = np.flatnonzero(self_Q[part] >= 0)
        s_BM[rows, self_Q[part][rows]] = -np.inf
        own_BM[rows, self_Q[part][rows]] = False
        s_BM -= tie_Q[part, None] * own_BM
        best_B = np.where(own_BM, s_BM, -np.inf).max(axis=1, initial=-np.inf)
        rank_Q[part] = 1 + ((s_BM >= best_B[:, None]) & ~own_BM).sum(axis=1)
        most = int(relevant_Q[part].max(initial=0))
        if most:
            own_BK = np.take_along_axis(own_BM, _first(s_BM, most), axis=1)
            r_precision[part], map_at_r[part] = _at_r(own_BK, relevant_Q[part])
    return _result(rank_Q, r_precision, map_at_r, relevant_Q, l_Q, ks)


def class_retrieval_of_lists(
    ids: NDArray[np.int64],
    scores: NDArray[np.floating],
    labels_q: NDArray[np.int64],
    labels_c: NDArray[np.int64],
    *,
    exclude: NDArray[np.int64] | None = None,
    ks: Sequence[int] = (1, 2, 4, 8),
    tolerance: float = TIE,
) -> ClassRetrieval:
    """As `class_retrieval`, from the lists that a search returns: for galleries of millions.

    Args:
        ids: `(Q, K)` integers, rows of candidates, -1 where a list ends.
        scores: `(Q, K)` floats, more is better.
        labels_q: `(Q,)` integers.
        labels_c: `(M,)` integers.
        exclude: `(Q,)` integers: the candidate that is the query itself, -1 where there is none.
        ks: the k of recall@k.
        tolerance: scores closer than tolerance · max|score of the list| are ties, counted against the model.

    Memory is O(Q · K + M). Raises MetricError as `class_retrieval` and for wrong lists, and where lists are too short:
    R-precision and MAP@R need R places (K = the size of the largest class, where the query is in its own list), a k
    needs k, unless the list holds all candidates.
    """
    ids = checked_ids(ids)
    l_Q, l_M = as_integers(labels_q, len(ids), "labels_q"), as_integers(labels_c, None, "labels_c")
    if ids.size and ids.max() >= len(l_M):
        raise MetricError(f"candidate {ids.max()} has no label, there are {len(l_M):,}", where="ids")
    scores = checked_scores(scores, ids)
    self_Q = _excluded(exclude, len(ids), len(l_M))
    ks = [_k(k) for k in ks]
    relevant_Q = _relevant(l_Q, l_M, self_Q)
    ids = np.where(ids == np.where(self_Q < 0, -2, self_Q)[:, None], -1, ids)
    pool_Q, length_Q = len(l_M) - (self_Q >= 0), (ids >= 0).sum(axis=1)
    for what, needed_Q in (("its class has {} others", relevant_Q), ("k is {}", np.full(len(ids), max(ks, default=0)))):
        short = np.flatnonzero((relevant_Q > 0) & (length_Q < np.minimum(needed_Q, pool_Q)))
        if len(short):
            row = int(short[0])
            raise MetricError(
                f"query {row} of class {l_Q[row]} has {length_Q[row]:,} candidates, but "
                f"{what.format(f'{needed_Q[row]:,}')} ({len(short):,} lists are too short)",
                where="ids",
                fix="search deeper; one more where a query finds itself",
            )

    rank_Q = np.full(len(ids), np.inf)  # not in the list
    r_precision, map_at_r = np.zeros(len(ids)), np.zeros(len(ids))
    for part in blocks(*ids.shape):
        own_BK = (l_M[ids[part]] == l_Q[part, None]) & (ids[part] >= 0)
        at = ordered(ids[part], scores[part], own_BK.astype(np.int64), ties="worst", tolerance=tolerance)
        own_BK = np.take_along_axis(own_BK, at, axis=1)
        rank_Q[part] = np.where(own_BK.any(axis=1), 1 + own_BK.argmax(axis=1), rank_Q[part])
        r_precision[part], map_at_r[part] = _at_r(own_BK, relevant_Q[part])
    return _result(rank_Q, r_precision, map_at_r, relevant_Q, l_Q, ks)


def _first(s_BM: NDArray[np.float64], most: int) -> NDArray[np.int64]:
    """The first `most` candidates `(B, most)` of each query. No own one equals another: each has lost its tie."""
    at_BK = np.argpartition(-s_BM, most - 1, axis=1)[:, :most]
    return np.take_along_axis(at_BK, np.argsort(-np.take_along_axis(s_BM, at_BK, axis=1), axis=1), axis=1)


def _at_r(own_BK: NDArray[np.bool_], relevant_B: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """R-precision `(B,)` and MAP@R `(B,)` of lists in order; 0 where R is 0."""
    place = np.arange(1, own_BK.shape[1] + 1)
    hits = own_BK & (place <= relevant_B[:, None])
    r_B = np.maximum(relevant_B, 1)
    precision = np.where(hits, np.cumsum(hits, axis=1) / place, 0.0)
    return hits.sum(axis=1) / r_B, precision.sum(axis=1) / r_B


def _relevant(l_Q: NDArray[np.int64], l_M: NDArray[np.int64], self_Q: NDArray[np.int64]) -> NDArray[np.int64]:
    _, relevant_Q = _pool(l_Q, l_M, self_Q)
    if not (relevant_Q > 0).any():
        raise MetricError(
            f"each of {len(l_Q):,} queries is alone in its class",
            where="labels_q",
            fix="a class needs two members, or candidates of its own",
        )
    return relevant_Q


def _result(
    rank_Q: NDArray[np.float64],
    r_precision: NDArray[np.float64],
    map_at_r: NDArray[np.float64],
    relevant_Q: NDArray[np.int64],
    l_Q: NDArray[np.int64],
    ks: Sequence[int],
) -> ClassRetrieval:
    def valued(values: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.where(relevant_Q > 0, values, np.nan)

    return ClassRetrieval(
        recall={k: valued((rank_Q <= k).astype(np.float64)) for k in ks},
        r_precision=valued(r_precision),
        map_at_r=valued(map_at_r),
        reciprocal_rank=valued(1.0 / rank_Q),
        relevant=relevant_Q,
        labels=l_Q,
    )
