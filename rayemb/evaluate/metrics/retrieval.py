"""Ranks of the right answers among candidates, their means, and what a random ordering would score.

Suffixes: Q queries, M candidates, D dimensions of the space, B queries of one block.

A query and a candidate belong together when they are of the same *group* (a concept, a product, a pair's
number). Recall@k is that of the image-text literature (Radford et al., 2021; CLIP_benchmark): the share of
queries with **any** relevant candidate among the first k. It is not the recall of information retrieval,
|relevant in top k| / |relevant|.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.metrics.arrays import as_integers, as_vectors
from rayemb.evaluate.metrics.errors import MetricError

TIE = 1e-6
"""Two similarities closer than TIE · |q| · max|c| are a tie.

About eight float32 roundings: the same input encoded in two batches of different shape differs by that
much, and a constant encoder must not earn its rank from such noise.
"""


def ranks(
    queries: NDArray[np.float32],
    candidates: NDArray[np.float32],
    groups_q: NDArray[np.int64],
    groups_c: NDArray[np.int64],
    *,
    exclude: NDArray[np.int64] | None = None,
    block: int = 1024,
) -> NDArray[np.int64]:
    """The 1-based rank `(Q,)` int64 of each query's best relevant candidate, by inner product.

    **Ties are counted against the model**: an irrelevant candidate as similar as the best relevant one
    (within `TIE`) ranks before it. An encoder that gives every input the same vector thus scores the worst
    rank that the candidates allow, never 1. (Libraries that sort leave ties to the sort, and such a model
    looks perfect or awful by accident.)

    Args:
        queries: `(Q, D)` float32, finite. Normalise first where the cosine is meant.
        candidates: `(M, D)` float32, finite.
        groups_q: `(Q,)` int64; the candidates of the same group are relevant.
        groups_c: `(M,)` int64.
        exclude: `(Q,)` int64: the candidate that is the query itself, -1 where there is none. By index, since
            "drop the first hit" drops the wrong row where there are exact duplicates.
        block: queries scored at a time; memory is O(block · M). The ranks do not depend on it: products
            are summed in float64, so that no rounding of the matrix product's own blocking decides a rank.

    Raises MetricError for wrong shapes, for non-finite vectors, and if any query has no relevant candidate
    (their number is in the message): a rank for them would be invented, and dropping them silently would
    flatter.
    """
    q_QD, c_MD = as_vectors(queries, "queries"), as_vectors(candidates, "candidates")
    g_Q, g_M = as_integers(groups_q, len(q_QD), "groups_q"), as_integers(groups_c, len(c_MD), "groups_c")
    if q_QD.shape[1] != c_MD.shape[1]:
        raise MetricError(f"queries have {q_QD.shape[1]} dimensions, candidates {c_MD.shape[1]}", where="candidates")
    if block < 1:
        raise MetricError(f"a block has at least one query, got {block}", where="block")
    self_Q = _excluded(exclude, len(q_QD), len(c_MD))
    _, relevant_Q = _pool(g_Q, g_M, self_Q)
    _refuse_unanswerable(relevant_Q)

    tie_Q = TIE * np.linalg.norm(q_QD, axis=1) * np.linalg.norm(c_MD, axis=1).max(initial=0.0)
    result = np.empty(len(q_QD), np.int64)
    for start in range(0, len(q_QD), block):
        part = slice(start, start + block)
        s_BM = q_QD[part] @ c_MD.T
        rows = np.flatnonzero(self_Q[part] >= 0)
        s_BM[rows, self_Q[part][rows]] = -np.inf  # neither relevant nor in the way
        relevant_BM = g_Q[part, None] == g_M[None, :]
        best_B = np.where(relevant_BM, s_BM, -np.inf).max(axis=1)
        before_BM = (s_BM >= (best_B - tie_Q[part])[:, None]) & ~relevant_BM
        result[part] = 1 + before_BM.sum(axis=1)
    return result


def hits_at(ranks: NDArray[np.int64], k: int) -> NDArray[np.float64]:
    """Per query `(Q,)` float64: 1 where a relevant candidate is among the first `k`, else 0."""
    return (_ranks(ranks) <= _k(k)).astype(np.float64)


def recall_at(ranks: NDArray[np.int64], k: int) -> float:
    """The share of queries, in [0, 1], with any relevant candidate among the first `k`."""
    return float(hits_at(ranks, k).mean())


def reciprocal_ranks(ranks: NDArray[np.int64]) -> NDArray[np.float64]:
    """Per query `(Q,)` float64 in (0, 1]: one over the rank of the best relevant candidate."""
    return 1.0 / _ranks(ranks)


def mrr(ranks: NDArray[np.int64]) -> float:
    """The mean reciprocal rank, in (0, 1], without a cut-off."""
    return float(reciprocal_ranks(ranks).mean())


def chance_recall_at(
    groups_q: NDArray[np.int64],
    groups_c: NDArray[np.int64],
    k: int,
    *,
    exclude: NDArray[np.int64] | None = None,
) -> float:
    """The exact expected `recall_at(k)` of a random ordering of the candidates, averaged over the queries.

    Per query with r relevant among m candidates it is hypergeometric: 1 - C(m-r, k) / C(m, k). Arguments
    and errors as for `ranks`.
    """
    _k(k)

    def expected(m: int, r: int) -> float:
        return float(_first_hit(m, r)[:k].sum())

    return _over_queries(groups_q, groups_c, exclude, expected)


def chance_mrr(
    groups_q: NDArray[np.int64], groups_c: NDArray[np.int64], *, exclude: NDArray[np.int64] | None = None
) -> float:
    """The exact expected `mrr` of a random ordering of the candidates, averaged over the queries.

    Per query with r relevant among m candidates: the sum over i of P(first relevant at i) / i. Arguments
    and errors as for `ranks`.
    """

    def expected(m: int, r: int) -> float:
        first = _first_hit(m, r)
        return float((first / np.arange(1, len(first) + 1)).sum())

    return _over_queries(groups_q, groups_c, exclude, expected)


def _first_hit(m: int, r: int) -> NDArray[np.float64]:
    """P(first relevant at place i) for i = 1 .. m-r+1, in a random order of `m` candidates, `r` relevant.

    From the products of the single draws, all factors in [0, 1]: the binomials themselves overflow, and 1 -
    C/C loses the digits of a small chance.
    """
    drawn = np.arange(m - r + 1, dtype=np.float64)  # candidates drawn before place i, all of them irrelevant
    none_before = np.concatenate([[1.0], np.cumprod((m - r - drawn[:-1]) / (m - drawn[:-1]))])
    return none_before * (r / (m - drawn))


def _over_queries(
    groups_q: NDArray[np.int64],
    groups_c: NDArray[np.int64],
    exclude: NDArray[np.int64] | None,
    expected: Callable[[int, int], float],
) -> float:
    g_Q, g_M = as_integers(groups_q, None, "groups_q"), as_integers(groups_c, None, "groups_c")
    pool_Q, relevant_Q = _pool(g_Q, g_M, _excluded(exclude, len(g_Q), len(g_M)))
    _refuse_unanswerable(relevant_Q)
    if not len(g_Q):
        raise MetricError("there are no queries, so there is no mean", where="groups_q")
    # Queries share few distinct (m, r): each is computed once.
    pairs, counts = np.unique(np.stack([pool_Q, relevant_Q], axis=1), axis=0, return_counts=True)
    return float(np.average([expected(int(m), int(r)) for m, r in pairs], weights=counts))


def _pool(
    g_Q: NDArray[np.int64], g_M: NDArray[np.int64], self_Q: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How many candidates `(Q,)` each query has, and how many of them are relevant `(Q,)`."""
    has_self = self_Q >= 0
    pool = len(g_M) - has_self.astype(np.int64)
    known, sizes = np.unique(g_M, return_counts=True)
    relevant = np.zeros(len(g_Q), np.int64)
    if len(known):
        at = np.searchsorted(known, g_Q).clip(max=len(known) - 1)
        relevant = np.where(known[at] == g_Q, sizes[at], 0).astype(np.int64)
        relevant -= has_self & (g_M[self_Q] == g_Q)
    return pool, relevant


def _refuse_unanswerable(relevant_Q: NDArray[np.int64]) -> None:
    lost = int((relevant_Q < 1).sum())
    if lost:
        raise MetricError(
            f"{lost:,} of {len(relevant_Q):,} queries have no relevant candidate",
            where="groups_q",
            fix="leave those queries out before, and say how many they were",
        )


def _excluded(exclude: NDArray[np.int64] | None, n_queries: int, n_candidates: int) -> NDArray[np.int64]:
    if exclude is None:
        return np.full(n_queries, -1, np.int64)
    self_Q = as_integers(exclude, n_queries, "exclude")
    wrong = int(((self_Q < -1) | (self_Q >= n_candidates)).sum())
    if wrong:
        raise MetricError(f"{wrong:,} entries are outside -1 .. {n_candidates - 1}", where="exclude")
    return self_Q


def _ranks(array: NDArray[np.int64]) -> NDArray[np.int64]:
    array = as_integers(array, None, "ranks")
    if not len(array):
        raise MetricError("there are no queries, so there is no mean", where="ranks")
    if array.min() < 1:
        raise MetricError(f"ranks count from 1, got {array.min()}", where="ranks")
    return array


def _k(k: int) -> int:
    if k < 1:
        raise MetricError(f"k counts from 1, got {k}", where="k")
    return k
