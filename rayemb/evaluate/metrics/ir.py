"""Ranked lists against relevance judgements, as information retrieval measures them (trec_eval, BEIR, MTEB).

Suffixes: Q queries, K places of a list, J judgements, B queries of one block.

Recall@k here is |relevant in the first k| / |relevant|. It is neither the any-hit recall of image-text retrieval
(`recall_at`) nor that of metric learning (`class_retrieval`). Judgements are grades: a document is relevant from grade
`level` (1) up; grades of 0 and below are judged irrelevant; a document without a grade counts as irrelevant, too
(`hole` says how many there were).
"""

import operator
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.metrics.arrays import as_integers
from rayemb.evaluate.metrics.errors import MetricError
from rayemb.evaluate.metrics.lists import Ties, blocks, called, checked_ids, checked_scores, ordered
from rayemb.evaluate.metrics.retrieval import TIE, _excluded, _k


class Judgements(NamedTuple):
    """Grades of documents, query by query, in rows: those of query q are at `starts[q] : starts[q + 1]`.

    `starts` `(Q + 1,)`, `ids` `(J,)` (rows of documents, ascending within a query) and `grades` `(J,)`, all int64.
    """

    starts: NDArray[np.int64]
    ids: NDArray[np.int64]
    grades: NDArray[np.int64]

    @property
    def rows(self) -> NDArray[np.int64]:
        """The query `(J,)` of each judgement."""
        return np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))

    @classmethod
    def of(
        cls, rows: NDArray[np.int64], ids: NDArray[np.int64], grades: NDArray[np.int64], n_queries: int
    ) -> "Judgements":
        """From three integer arrays `(J,)` in any order: query, document, grade.

        Raises MetricError for a query outside 0 .. n_queries - 1 and for a document that a query judges twice.
        """
        rows = as_integers(rows, None, "rows")
        ids, grades = as_integers(ids, len(rows), "ids"), as_integers(grades, len(rows), "grades")
        for name, wrong in (("query", (rows < 0) | (rows >= n_queries)), ("document", ids < 0)):
            if wrong.any():
                at = int(np.flatnonzero(wrong)[0])
                raise MetricError(f"judgement {at} is of the unknown {name} {(rows, ids)[name != 'query'][at]}")
        if len(rows) and np.abs(grades).max() >= 2**31:
            raise MetricError(f"a grade of {grades[np.abs(grades).argmax()]} is out of range", where="grades")
        order = np.lexsort((ids, rows))
        rows, ids = rows[order], ids[order]
        twice = np.flatnonzero((rows[1:] == rows[:-1]) & (ids[1:] == ids[:-1]))
        if len(twice):
            at = int(twice[0])
            raise MetricError(f"query {rows[at]} judges document {ids[at]} more than once", where="ids")
        return cls(_starts(rows, n_queries), ids, grades[order])


def judgements(
    qrels: Mapping[Hashable, Mapping[Hashable, int]],
    queries: Sequence[Hashable] | int,
    documents: Sequence[Hashable] | int,
) -> Judgements:
    """Judgements by row from `{query id: {document id: grade}}`.

    Args:
        qrels: grades are integers, of any sign. A query may be missing: it then has no relevant document.
        queries: the ids of the queries by row, without repeats; a number: the ids are the rows 0 .. number - 1.
        documents: those of the documents.

    Raises MetricError that names the id: a query or document that is unknown, ids that repeat, grades that are no
    integers.
    """
    query_at, document_at = _rows_of(queries, "queries"), _rows_of(documents, "documents")
    rows, ids, grades = [], [], []
    for query, judged in qrels.items():
        if query not in query_at:
            raise MetricError(f"the judged query {query!r} is not among the queries", where="qrels")
        for document, grade in judged.items():
            if document not in document_at:
                raise MetricError(
                    f"query {query!r} judges document {document!r}, which is not among the documents", where="qrels"
                )
            rows.append(query_at[query])
            ids.append(document_at[document])
            grades.append(_grade(grade, query, document))
    return Judgements.of(np.array(rows, np.int64), np.array(ids, np.int64), np.array(grades, np.int64), len(query_at))


@dataclass(frozen=True, eq=False)
class Judged:
    """Ranked lists with the grade of the document at each place. Made by `judge_lists` and `judge_run`.

    The measures give one value a query, `(Q,)` float64 in [0, 1], and NaN where a query has no relevant document, for
    which there is no figure; `mean_over` leaves those out and says how many. (trec_eval counts them 0, mteb and
    sentence-transformers drop them.) A query without a list, or with an empty one, counts 0. A `k` beyond what the list
    holds raises MetricError if the search may have cut it off there; without `k` the whole list counts.
    """

    grades: NDArray[np.int32]
    """`(Q, K)`: 0 where there is no grade, and after the list's end."""
    seen: NDArray[np.uint8]
    """`(Q, K)`: 2 where this query has judged the document, 1 where only another one has, 0 else; 3 at the end."""
    cut: NDArray[np.bool_]
    """`(Q,)`: more documents may follow this list."""
    relevant: NDArray[np.int64]
    """`(Q,)`: how many documents are relevant."""
    ideal: Judgements
    """The grades above 0, descending within each query."""
    level: int
    queries: Sequence[object] | None

    @property
    def lengths(self) -> NDArray[np.int64]:
        """How many documents `(Q,)` each list holds."""
        lengths: NDArray[np.int64] = (self.seen != _END).sum(axis=1)
        return lengths

    def precision(self, k: int) -> NDArray[np.float64]:
        """Share of the first k places with a relevant document; by k, however few came back."""
        return self._valued(self._hits(k).sum(axis=1) / k)

    def recall(self, k: int) -> NDArray[np.float64]:
        """Share of the relevant documents that are among the first k."""
        return self._valued(self._hits(k).sum(axis=1) / self._relevant)

    def capped_recall(self, k: int) -> NDArray[np.float64]:
        """As `recall`, but by min(k, relevant), so that 1 can be reached (`R_cap` of BEIR and mteb)."""
        return self._valued(self._hits(k).sum(axis=1) / np.minimum(self._relevant, k))

    def success(self, k: int) -> NDArray[np.float64]:
        """1 where any relevant document is among the first k (hit rate; accuracy@k of sentence-transformers)."""
        return self._valued(self._hits(k).any(axis=1).astype(np.float64))

    def reciprocal_rank(self, k: int | None = None) -> NDArray[np.float64]:
        """One over the place of the first relevant document; 0 where none is among the first k."""
        hits = self._hits(k)
        if not hits.shape[1]:
            return self._valued(np.zeros(len(hits)))
        return self._valued(np.where(hits.any(axis=1), 1.0 / (1 + hits.argmax(axis=1)), 0.0))

    def average_precision(self, k: int | None = None, *, capped: bool = False) -> NDArray[np.float64]:
        """Mean of the precisions at the relevant places among the first k, by all relevant documents (`map_cut`).

        capped: by min(k, relevant) instead, as sentence-transformers has it.
        """
        hits = self._hits(k)
        precision = np.cumsum(hits, axis=1, dtype=np.int64) / np.arange(1, hits.shape[1] + 1)
        most = self._relevant if k is None or not capped else np.minimum(self._relevant, k)
        return self._valued(np.where(hits, precision, 0).sum(axis=1) / most)

    def r_precision(self) -> NDArray[np.float64]:
        """Precision at R, the number of relevant documents of the query."""
        short = np.flatnonzero(self.cut & (self.lengths < self.relevant))
        if len(short):
            self._too_short(int(short[0]), int(self.relevant[short[0]]))
        hits = self._hits(None)
        first = np.arange(hits.shape[1]) < self.relevant[:, None]
        return self._valued((hits & first).sum(axis=1) / self._relevant)

    def ndcg(self, k: int | None = None, *, binary: bool = False) -> NDArray[np.float64]:
        """Discounted cumulative gain (Järvelin & Kekäläinen, 2002) by the ideal one, as trec_eval's `ndcg_cut`.

        The gain is the grade itself (not 2^grade - 1), 0 for grades below 0, the discount log2(place + 1); the ideal
        ranks all judged documents, those too that no list holds. A query has a figure if any grade is above 0, whatever
        `level`.

        binary: the gain is 1 from `level` on, as sentence-transformers has it.
        """
        self._deep_enough(k)
        gains = (self.grades[:, :k] >= self.level) if binary else np.maximum(self.grades[:, :k], 0)
        dcg = gains @ (1.0 / np.log2(np.arange(2, gains.shape[1] + 2)))
        rows, grades = self.ideal.rows, self.ideal.grades
        if binary:
            grades = (grades >= self.level).astype(np.int64)  # descending grades: the ones come first
        place = np.arange(len(rows)) - self.ideal.starts[rows]
        counted = place < (len(rows) if k is None else k)
        weights = (grades / np.log2(place + 2.0))[counted]
        ideal = np.bincount(rows[counted], weights=weights, minlength=len(dcg))
        return np.where(ideal > 0, dcg / np.where(ideal > 0, ideal, 1), np.nan)

    def hole(self, k: int, *, anywhere: bool = False) -> NDArray[np.float64]:
        """Share of the first k places with a document that no one has judged for this query; never NaN.

        anywhere: a document that any query has judged counts as judged, as in BEIR and mteb.
        """
        self._deep_enough(_k(k))
        seen = self.seen[:, :k]
        values: NDArray[np.float64] = ((seen == 0) if anywhere else (seen < _HERE)).sum(axis=1) / k
        return values

    def measure(self, name: str) -> NDArray[np.float64]:
        """The values `(Q,)` of a measure by name: `ndcg@10`, `recall@100`, `map`, `r_precision`; see `IR_MEASURES`."""
        base, at, depth = name.partition("@")
        known = ", ".join(f"{m}@k" for m in IR_MEASURES if m != "r_precision") + ", r_precision"
        if base not in IR_MEASURES:
            raise MetricError(f"there is no measure {name!r} of ranked lists", where="metric", fix=f"one of {known}")
        if at and not (depth.isascii() and depth.isdigit() and int(depth) and base != "r_precision"):
            raise MetricError(f"{name!r} has no cut-off that can be read", where="metric", fix=f"one of {known}")
        if not at and base not in ("map", "mrr", "ndcg", "r_precision"):
            raise MetricError(f"{name!r} needs a cut-off", where="metric", fix=f"say {base}@10")
        return IR_MEASURES[base](self, int(depth) if at else None)

    @property
    def _relevant(self) -> NDArray[np.int64]:
        return np.maximum(self.relevant, 1)  # where there are none, _valued says so

    def _hits(self, k: int | None) -> NDArray[np.bool_]:
        self._deep_enough(k)
        return self.grades[:, :k] >= self.level

    def _deep_enough(self, k: int | None) -> None:
        if k is not None:
            short = np.flatnonzero(self.cut & (self.lengths < _k(k)))
            if len(short):
                self._too_short(int(short[0]), k)

    def _too_short(self, row: int, needed: int) -> None:
        raise MetricError(
            f"the list of {called(row, self.queries)} was cut at {self.lengths[row]:,}, {needed:,} are needed",
            where="k",
            fix="search deeper (one more where a query excludes itself), or say that the lists are complete",
        )

    def _valued(self, values: NDArray[np.float64] | np.float64) -> NDArray[np.float64]:
        return np.where(self.relevant > 0, values, np.nan)


def _r_precision(judged: Judged, _: int | None) -> NDArray[np.float64]:
    return judged.r_precision()


IR_MEASURES: Mapping[str, Callable[..., NDArray[np.float64]]] = {
    "recall": Judged.recall,
    "capped_recall": Judged.capped_recall,
    "precision": Judged.precision,
    "success": Judged.success,
    "ndcg": Judged.ndcg,
    "map": Judged.average_precision,
    "mrr": Judged.reciprocal_rank,
    "hole": Judged.hole,
    "r_precision": _r_precision,
}
"""What `Judged.measure` knows by name; all but r_precision take a cut-off, which map, mrr and ndcg may lack."""


def judge_lists(
    ids: NDArray[np.int64],
    scores: NDArray[np.floating] | None,
    judged: Judgements,
    *,
    ties: Ties = "worst",
    tolerance: float = TIE,
    level: int = 1,
    exclude: NDArray[np.int64] | None = None,
    complete: bool = False,
    queries: Sequence[object] | None = None,
    documents: Sequence[object] | None = None,
) -> Judged:
    """Ranked lists with their grades, from the arrays that a search returns.

    Args:
        ids: `(Q, K)` integers, rows of documents, -1 where a list ends.
        scores: `(Q, K)` floats, more is better; None only with ties="given".
        judged: see `judgements`; the same number of queries.
        ties: `worst` (default), `trec`, `sbert`, `given`: see `rayemb.evaluate.metrics.lists`.
        tolerance: for `worst`, relative to the largest score of the list.
        level: the lowest grade that is relevant, 1 or more.
        exclude: `(Q,)` integers: the document that is the query itself, -1 where there is none. It is taken out before
            any cut, and is no relevant document (in mteb's `ignore_identical_ids` it stays one, which caps the recall).
        complete: a full list holds all that there was to find. Else a search may have cut it: a `k` beyond it raises.
        queries, documents: their ids by row, for messages and for the orders `trec` and `sbert`.

    Memory is O(Q · K): 5 bytes a place beside the arguments. Ties at the very end of a list are the search's choice;
    lists deeper than k make that irrelevant. Raises MetricError that names query and document for lists that are wrong
    (shapes, unknown or repeated documents, scores that are not finite).
    """
    if level < 1:
        raise MetricError(f"the lowest relevant grade is 1 or more, got {level}", where="level")
    if not 0 <= tolerance < 1:
        raise MetricError(f"a relative tolerance lies in [0, 1), got {tolerance}", where="tolerance")
    ids = checked_ids(ids, queries=queries, documents=documents)
    if scores is not None:
        scores = checked_scores(scores, ids, queries=queries, documents=documents)
    if len(judged.starts) != len(ids) + 1:
        raise MetricError(f"{len(ids):,} lists, judgements of {len(judged.starts) - 1:,} queries", where="judged")
    unknown = np.flatnonzero(judged.ids >= (np.inf if documents is None else len(documents)))
    if len(unknown):
        query = called(int(judged.rows[unknown[0]]), queries)
        raise MetricError(f"{query} judges the unknown document {judged.ids[unknown[0]]}", where="judged")
    cut = np.asarray((ids >= 0).all(axis=1)) & (not complete and ids.shape[1] > 0)
    if exclude is not None:
        self_Q = _excluded(exclude, len(ids), np.iinfo(np.int64).max if documents is None else len(documents))
        ids = np.where((ids == self_Q[:, None]) & (self_Q >= 0)[:, None], -1, ids)
        rows = judged.rows
        kept = judged.ids != self_Q[rows]
        judged = Judgements(_starts(rows[kept], len(ids)), judged.ids[kept], judged.grades[kept])

    grades, seen = np.zeros(ids.shape, np.int32), np.zeros(ids.shape, np.uint8)
    lookup = _Lookup(judged)
    for part in blocks(*ids.shape):
        ids_BK = ids[part]
        g_BK, seen_BK = lookup(ids_BK, part.start)
        at = ordered(
            ids_BK,
            None if scores is None else scores[part],
            g_BK,
            ties=ties,
            tolerance=tolerance,
            documents=documents,
        )
        grades[part] = np.take_along_axis(g_BK, at, axis=1)
        seen[part] = np.take_along_axis(seen_BK, at, axis=1)
    rows = judged.rows
    relevant = np.bincount(rows[judged.grades >= level], minlength=len(ids))
    return Judged(grades, seen, cut, relevant, _ideal(judged), level, queries)


def judge_run(
    run: Mapping[Hashable, Mapping[Hashable, float]],
    qrels: Mapping[Hashable, Mapping[Hashable, int]],
    *,
    queries: Sequence[Hashable] | None = None,
    documents: Sequence[Hashable] | None = None,
    ties: Ties = "worst",
    tolerance: float = TIE,
    level: int = 1,
    ignore_identical_ids: bool = False,
) -> Judged:
    """Ranked lists with their grades, from dictionaries as pytrec_eval, ranx and mteb have them.

    Args:
        run: `{query: {document: score}}`, more is better; a list is taken for all that the system found.
        qrels: `{query: {document: grade}}`.
        queries: the rows of the result. None: those of `qrels`, then those that only `run` has (without a figure).
        documents: all that exist, so that judgements and lists of others are refused. None: no such check.
        ties, tolerance, level: as for `judge_lists`.
        ignore_identical_ids: a document with the id of the query is the query (ArguAna, Quora) and taken out.

    Raises MetricError that names the id, as `judgements` and `judge_lists` do.
    """
    asked = list(dict.fromkeys([*qrels, *run])) if queries is None else list(queries)
    asked_at = _rows_of(asked, "queries")
    if documents is None:
        documents = list(dict.fromkeys(d for table in (qrels, run) for of in table.values() for d in of))
    document_at = _rows_of(documents, "documents")
    lengths = [len(of) for of in run.values()]
    ids = np.full((len(asked), max(lengths, default=0)), -1, np.int64)
    scores = np.zeros(ids.shape)
    for query, found in run.items():
        if query not in asked_at:
            raise MetricError(f"the query {query!r} is not among the queries", where="run")
        row = asked_at[query]
        try:
            ids[row, : len(found)] = [document_at[document] for document in found]
        except KeyError as error:
            raise MetricError(
                f"query {query!r} finds document {error.args[0]!r}, which is not among the documents", where="run"
            ) from None
        scores[row, : len(found)] = list(found.values())
    exclude = np.array([document_at.get(q, -1) for q in asked], np.int64) if ignore_identical_ids else None
    return judge_lists(
        ids,
        scores,
        judgements(qrels, asked, documents),
        ties=ties,
        tolerance=tolerance,
        level=level,
        exclude=exclude,
        complete=True,
        queries=asked,
        documents=documents,
    )


_HERE, _END = 2, 3


class _Lookup:
    """Finds the grade of each place of a block of lists: O(log J) each, without an array of queries by documents."""

    def __init__(self, judged: Judgements) -> None:
        self.known = np.unique(judged.ids)
        keys = judged.rows * max(1, len(self.known)) + np.searchsorted(self.known, judged.ids)
        self.keys = keys  # ascending: rows ascend, and ids within them
        self.grades = judged.grades

    def __call__(self, ids_BK: NDArray[np.int64], first_row: int) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
        grades = np.zeros(ids_BK.shape, np.int64)
        seen = np.where(ids_BK < 0, _END, 0).astype(np.uint8)
        if not len(self.known):
            return grades, seen
        at = np.searchsorted(self.known, ids_BK).clip(max=len(self.known) - 1)
        rows, places = np.nonzero((self.known[at] == ids_BK) & (ids_BK >= 0))
        seen[rows, places] = 1
        keys = (rows + first_row) * len(self.known) + at[rows, places]
        found = np.searchsorted(self.keys, keys).clip(max=len(self.keys) - 1)
        here = self.keys[found] == keys
        rows, places = rows[here], places[here]
        grades[rows, places] = self.grades[found[here]]
        seen[rows, places] = _HERE
        return grades, seen


def _starts(rows: NDArray[np.int64], n_queries: int) -> NDArray[np.int64]:
    return np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=n_queries))]).astype(np.int64)


def _ideal(judged: Judgements) -> Judgements:
    rows, positive = judged.rows, judged.grades > 0
    rows, ids, grades = rows[positive], judged.ids[positive], judged.grades[positive]
    order = np.lexsort((-grades, rows))
    return Judgements(_starts(rows, len(judged.starts) - 1), ids[order], grades[order])


def _rows_of(ids: Iterable[Hashable] | int, where: str) -> Mapping[Hashable, int]:
    names = list(range(ids) if isinstance(ids, int) else ids)
    rows = {name: row for row, name in enumerate(names)}
    if len(rows) < len(names):
        seen: set[Hashable] = set()
        twice = next(name for name in names if name in seen or seen.add(name))  # type: ignore[func-returns-value]
        raise MetricError(f"the id {twice!r} stands more than once", where=where)
    return rows


def _grade(grade: int, query: Hashable, document: Hashable) -> int:
    try:
        value = operator.index(grade)
    except TypeError:
        value = None
    if value is None or not -(2**31) <= value < 2**31:
        raise MetricError(
            f"query {query!r} grades document {document!r} with {grade!r}", where="qrels", fix="grades are integers"
        )
    return value
