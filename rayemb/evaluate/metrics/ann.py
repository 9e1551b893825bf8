"""How much of the exact answer an approximate search finds, by distance, so that ties are not punished.

Suffixes: Q queries, K places of a list, M candidates, D dimensions, B queries of one block.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.metrics.errors import MetricError
from rayemb.evaluate.metrics.lists import blocks, called, checked_ids, checked_scores
from rayemb.evaluate.metrics.retrieval import _k

RTOL = 1e-5
"""Scores closer than this, relative to the largest of the true list, are equal (faiss.contrib.evaluation has the same).

ann-benchmarks' 1e-3 is absolute: on unit vectors it forgives real misses.
"""


def ann_recall_at(
    found_ids: NDArray[np.int64],
    found_scores: NDArray[np.floating],
    true_ids: NDArray[np.int64],
    true_scores: NDArray[np.floating],
    k: int,
    *,
    rtol: float = RTOL,
    queries: Sequence[object] | None = None,
) -> NDArray[np.float64]:
    """Per query `(Q,)` float64 in [0, 1]: the share of the k exact neighbours that the search found, ties by distance.

    Of candidates as far as the k-th exact neighbour any will do, for as many places as they have among the k: of a
    hundred duplicates any ten are the ten nearest. This is the rule of ann-benchmarks (Aumüller et al., 2017) but for
    one thing: there, ties with the k-th make up for nearer neighbours that were missed; here they do not, so that 1
    means an exact answer.

    Args:
        found_ids: `(Q, K1)` integers, -1 where a list ends. Of more than k the first k count.
        found_scores: `(Q, K1)` floats, more is nearer: **exact** ones (see `exact_scores`). What an index returns of
            compressed vectors are estimates, and would grade themselves.
        true_ids, true_scores: `(Q, K2)`, the exact search's, best first; as many as there are where fewer than k.
        k: the cut. Of fewer than k candidates (k > n, or a filter that leaves few), the share of those.
        rtol: tolerance, relative to the largest |score| of the first k true ones.
        queries: ids of the queries for messages.

    A query without any true neighbour (nothing survives its filter) is NaN. Raises MetricError for wrong shapes,
    scores that are not finite, a document found twice, true lists that are too short or not in order, and for a found
    candidate that is nearer than an exact neighbour without being one: then the truth is wrong, or a filter leaks, and
    the distance would hide it.
    """
    f_ids, t_ids = checked_ids(found_ids, queries=queries, where="found_ids"), checked_ids(true_ids, where="true_ids")
    f_QK = checked_scores(found_scores, f_ids, queries=queries, where="found_scores").astype(np.float64)
    t_QK = checked_scores(true_scores, t_ids, queries=queries, where="true_scores").astype(np.float64)
    if len(f_ids) != len(t_ids):
        raise MetricError(f"{len(f_ids):,} found lists, {len(t_ids):,} true ones", where="true_ids")
    t_ids, t_QK = t_ids[:, : _k(k)], t_QK[:, :k]
    f_ids, f_QK = _first(f_ids, k), np.take_along_axis(f_QK, _places(f_ids, k), axis=1)
    there = t_ids >= 0
    if (np.diff(there.astype(np.int8), axis=1) > 0).any():
        raise MetricError("a true list goes on after its end (-1)", where="true_ids")
    count_Q = there.sum(axis=1)
    _refuse_short(t_ids, np.asarray(found_ids), count_Q, k, queries)

    scale_Q = np.abs(np.where(there, t_QK, 0)).max(axis=1, initial=0.0)
    tie_Q = rtol * scale_Q
    fallen = there[:, 1:] & (np.diff(np.where(there, t_QK, 0), axis=1) > tie_Q[:, None])
    if fallen.any():
        row = int(np.flatnonzero(fallen.any(axis=1))[0])
        raise MetricError(f"the true list of {called(row, queries)} is not best first", where="true_scores")
    worst_Q = np.where(there, t_QK, np.inf).min(axis=1, initial=np.inf)
    is_there = f_ids >= 0
    nearer_QK = is_there & (f_QK > (worst_Q + tie_Q)[:, None])
    tied_Q = (is_there & ~nearer_QK & (f_QK >= (worst_Q - tie_Q)[:, None])).sum(axis=1)
    strange = nearer_QK & ~_in(f_ids, t_ids)
    if strange.any():
        row, place = (int(at[0]) for at in np.nonzero(strange))
        raise MetricError(
            f"{called(row, queries)} finds candidate {f_ids[row, place]}, which is nearer than a true neighbour but is "
            "none",
            where="true_ids",
            fix="the truth is not exact, the scores are estimates, or a filter lets it through",
        )
    places_Q = count_Q - (there & (t_QK > (worst_Q + tie_Q)[:, None])).sum(axis=1)
    hits_Q = nearer_QK.sum(axis=1) + np.minimum(tied_Q, places_Q)
    return np.where(count_Q > 0, hits_Q / np.maximum(count_Q, 1), np.nan)


def ann_overlap_at(
    found_ids: NDArray[np.int64],
    true_ids: NDArray[np.int64],
    k: int,
    *,
    queries: Sequence[object] | None = None,
) -> NDArray[np.float64]:
    """Per query `(Q,)` float64: |first k found ∩ first k true| / min(k, true), by id.

    Punishes ties and duplicates (exact search itself scores .991 on SIFT1M); the honest choice only where scores are
    not to be had. Arguments and errors as for `ann_recall_at`.
    """
    f_ids, t_ids = checked_ids(found_ids, queries=queries, where="found_ids"), checked_ids(true_ids, where="true_ids")
    if len(f_ids) != len(t_ids):
        raise MetricError(f"{len(f_ids):,} found lists, {len(t_ids):,} true ones", where="true_ids")
    f_ids, t_ids = _first(f_ids, _k(k)), _first(t_ids, k)
    count_Q = (t_ids >= 0).sum(axis=1)
    _refuse_short(t_ids, np.asarray(found_ids), count_Q, k, queries)
    hits_Q = ((f_ids >= 0) & _in(f_ids, t_ids)).sum(axis=1)
    return np.where(count_Q > 0, hits_Q / np.maximum(count_Q, 1), np.nan)


def exact_scores(
    queries: NDArray[np.float32],
    candidates: NDArray[np.float32],
    ids: NDArray[np.int64],
    similarity: Literal["dot", "euclidean"] = "dot",
) -> NDArray[np.float64]:
    """The scores `(Q, K)` float64 of listed candidates from the vectors themselves; -inf where a list ends.

    Args:
        queries: `(Q, D)` floats.
        candidates: `(M, D)` floats; any that NumPy can index by rows, a memory map too: only listed rows are read.
        ids: `(Q, K)` integers, rows of `candidates`.
        similarity: `dot`, or `euclidean`: the distance, negated. It is summed from the differences, so that a duplicate
            of the query is at exactly 0.

    Memory beside the result is bounded. Raises MetricError for wrong shapes and unknown ids.
    """
    ids = checked_ids(ids)
    if np.ndim(queries) != 2 or np.ndim(candidates) != 2 or queries.shape[1] != candidates.shape[1]:
        raise MetricError(f"expected (Q, D) and (M, D), got {np.shape(queries)} and {np.shape(candidates)}")
    if len(queries) != len(ids):
        raise MetricError(f"{len(ids):,} lists for {len(queries):,} queries", where="ids")
    if ids.size and ids.max() >= len(candidates):
        raise MetricError(f"candidate {ids.max()} is unknown, there are {len(candidates):,}", where="ids")
    if similarity not in ("dot", "euclidean"):
        raise MetricError(f"there is no similarity {similarity!r}", where="similarity", fix="dot or euclidean")
    result = np.full(ids.shape, -np.inf)
    rows, places = np.nonzero(ids >= 0)
    for part in blocks(len(rows), queries.shape[1]):
        at = rows[part], places[part]
        q_BD, c_BD = queries[at[0]].astype(np.float64), np.asarray(candidates[ids[at]], np.float64)
        result[at] = np.einsum("bd,bd->b", q_BD, c_BD) if similarity == "dot" else -np.linalg.norm(q_BD - c_BD, axis=1)
    return result


def _places(ids: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """The places of the first k documents of each list; an end (-1) in the middle is passed over."""
    return np.argsort(ids < 0, axis=1, kind="stable")[:, :k]


def _first(ids: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    return np.take_along_axis(ids, _places(ids, k), axis=1)


def _in(ids: NDArray[np.int64], of: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Where `(Q, K1)` an id stands in the same row of `of` `(Q, K2)`: by sorted rows, not K1 · K2 comparisons."""
    both = np.concatenate([of, ids], axis=1)
    order = np.argsort(both, axis=1, kind="stable")  # of two that are equal, that of `of` comes first
    both = np.take_along_axis(both, order, axis=1)
    same = np.zeros(both.shape, bool)
    same[:, 1:] = both[:, 1:] == both[:, :-1]
    result = np.zeros(both.shape, bool)
    np.put_along_axis(result, order, same, axis=1)
    return result[:, of.shape[1] :] & (ids >= 0)


def _refuse_short(
    t_ids: NDArray[np.int64],
    found_ids: NDArray[np.int64],
    count_Q: NDArray[np.int64],
    k: int,
    queries: Sequence[object] | None,
) -> None:
    """A true list of fewer than k is all there is; if the search found more than that, it cannot be."""
    short = np.flatnonzero(((found_ids >= 0).sum(axis=1).clip(max=k) > count_Q) & (count_Q < k))
    if len(short):
        row = int(short[0])
        raise MetricError(
            f"{called(row, queries)} has {count_Q[row]:,} true neighbours, but more were found ({k:,} asked)",
            where="true_ids",
            fix="search the truth k deep, with the same filter",
        )
