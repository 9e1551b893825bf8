"""Ranked lists as a search returns them: checked, and put into one order of ties.

Suffixes: Q queries, K places of a list, B queries of one block.

Every tool orders ties otherwise, and nDCG of one query moves by up to 0.1 with it, so the order has a name here:

- `worst`, the house's default: a tie counts against the model. A document that is not relevant stands before a relevant
  one of the same score, a less relevant one before a more relevant one.
- `trec`: as trec_eval (and pytrec_eval, mteb): scores as float32, ties by the id as text, descending.
- `sbert`: as sentence-transformers' evaluators: ties by the id, ascending.
- `given`: the order of the list, whatever its scores.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.metrics.errors import MetricError

Ties = Literal["worst", "trec", "sbert", "given"]

ENTRIES = 1 << 20
"""List places worked on at a time: some tens of MB, whatever the number of queries."""


def blocks(rows: int, columns: int, entries: int = ENTRIES) -> Iterator[slice]:
    """Slices of rows that hold about `entries` places each."""
    step = max(1, entries // max(1, columns))
    return (slice(start, start + step) for start in range(0, rows, step))


def called(row: int, names: Sequence[object] | None, kind: str = "query") -> str:
    """What a message calls row `row`: its id where there are ids, else its number."""
    return f"{kind} {names[row]!r}" if names is not None and row < len(names) else f"{kind} {row}"


def checked_ids(
    ids: NDArray[np.int64],
    *,
    queries: Sequence[object] | None = None,
    documents: Sequence[object] | None = None,
    where: str = "ids",
) -> NDArray[np.int64]:
    """The ids `(Q, K)` as int64, -1 where a list ends.

    Raises MetricError, naming query and document, for wrong shapes or types, an id below -1 or beyond `documents`,
    and for a document that stands twice in one list (it would be counted twice).
    """
    ids = np.asarray(ids)
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
        raise MetricError(f"expected integers (Q, K), got {ids.dtype} {ids.shape}", where=where)
    if queries is not None and len(queries) != len(ids):
        raise MetricError(f"{len(ids):,} lists for {len(queries):,} queries", where=where)
    ids = ids.astype(np.int64)
    for part in blocks(*ids.shape):
        ids_BK = ids[part]
        wrong = ids_BK < -1 if documents is None else (ids_BK < -1) | (ids_BK >= len(documents))
        if wrong.any():
            row, place = (int(at[0]) for at in np.nonzero(wrong))
            which = called(part.start + row, queries)
            raise MetricError(f"{which} has the unknown document {ids_BK[row, place]}", where=where)
        sorted_BK = np.sort(ids_BK, axis=1)
        twice = (sorted_BK[:, 1:] == sorted_BK[:, :-1]) & (sorted_BK[:, 1:] >= 0)
        if twice.any():
            row, place = (int(at[0]) for at in np.nonzero(twice))
            document = called(int(sorted_BK[row, place]), documents, "document")
            raise MetricError(
                f"{called(part.start + row, queries)} has {document} more than once",
                where=where,
                fix="a list names each document once",
            )
    return ids


def checked_scores(
    scores: NDArray[np.floating],
    ids: NDArray[np.int64],
    *,
    queries: Sequence[object] | None = None,
    documents: Sequence[object] | None = None,
    where: str = "scores",
) -> NDArray[np.floating]:
    """The scores `(Q, K)`, finite wherever there is a document; where a list has ended, anything may stand."""
    scores = np.asarray(scores)
    if scores.shape != ids.shape or not np.issubdtype(scores.dtype, np.floating):
        raise MetricError(f"expected floats {ids.shape} as the ids, got {scores.dtype} {scores.shape}", where=where)
    bad = (ids >= 0) & ~np.isfinite(scores)
    if bad.any():
        row, place = (int(at[0]) for at in np.nonzero(bad))
        lists = int(bad.any(axis=1).sum())
        raise MetricError(
            f"{called(row, queries)} gives {called(int(ids[row, place]), documents, 'document')} the score "
            f"{scores[row, place]} ({lists:,} of {len(ids):,} lists hold NaN or infinity)",
            where=where,
        )
    return scores


def ordered(
    ids: NDArray[np.int64],
    scores: NDArray[np.floating] | None,
    grades: NDArray[np.int64],
    *,
    ties: Ties,
    tolerance: float,
    documents: Sequence[object] | None = None,
) -> NDArray[np.int64]:
    """The places `(B, K)` int64 that put each list into its order, ended places last.

    Args:
        ids: `(B, K)`, checked.
        scores: `(B, K)`, checked, more is better; may be None where `ties` is `given`.
        grades: `(B, K)` integers; above 0 is relevant.
        ties: see the module.
        tolerance: for `worst`: scores closer than tolerance · max|score of the list| are a tie of a relevant and an
            irrelevant document, since rounding differs with the shape of a batch.
        documents: the ids as the outer world has them, by row, for `trec` and `sbert`.
    """
    ended_BK = ids < 0
    if ties == "given":
        return np.argsort(ended_BK, axis=1, kind="stable")
    if scores is None:
        raise MetricError(f"the tie order {ties!r} needs scores", where="scores", fix="bring them, or say ties='given'")
    if ties == "worst":
        s_BK = np.where(ended_BK, -np.inf, scores.astype(np.float64))
        tie_B = tolerance * np.abs(np.where(ended_BK, 0, s_BK)).max(axis=1, initial=0)
        s_BK -= tie_B[:, None] * (grades > 0)
        return np.lexsort((grades, -s_BK), axis=-1)
    if ties not in ("trec", "sbert"):
        raise MetricError(f"there is no tie order {ties!r}", where="ties", fix="worst, trec, sbert or given")
    with np.errstate(over="ignore"):  # beyond float32 all is infinite and tied, in trec_eval too
        s_BK = scores.astype(np.float32) if ties == "trec" else scores
    s_BK = np.where(ended_BK, -np.inf, s_BK)
    rank_BK = _id_ranks(ids, s_BK, documents, as_text=ties == "trec")
    return np.lexsort((-rank_BK if ties == "trec" else rank_BK, -s_BK, ended_BK), axis=-1)


def _id_ranks(
    ids: NDArray[np.int64], s_BK: NDArray[np.floating], documents: Sequence[object] | None, *, as_text: bool
) -> NDArray[np.int64]:
    """The rank `(B, K)` of each tied document among the ids, ascending; 0 where no tie asks for it.

    Only tied ids are looked up: sorting the names of a million documents would cost more than the metrics.
    """
    by_score = np.argsort(-s_BK, axis=1, kind="stable")
    sorted_BK = np.take_along_axis(s_BK, by_score, axis=1)
    same = sorted_BK[:, 1:] == sorted_BK[:, :-1]
    tied_sorted = np.zeros(ids.shape, bool)
    tied_sorted[:, 1:] |= same
    tied_sorted[:, :-1] |= same
    tied_BK = np.zeros(ids.shape, bool)
    np.put_along_axis(tied_BK, by_score, tied_sorted, axis=1)
    tied_BK &= ids >= 0
    known, at = np.unique(ids[tied_BK], return_inverse=True)
    names = [int(i) if documents is None else documents[i] for i in known]
    texts = [str(name) for name in names] if as_text else names
    rank = np.empty(len(known), np.int64)
    rank[sorted(range(len(known)), key=texts.__getitem__)] = np.arange(len(known))
    ranks_BK = np.zeros(ids.shape, np.int64)
    ranks_BK[tied_BK] = rank[at]
    return ranks_BK
