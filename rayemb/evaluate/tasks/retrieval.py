"""Retrieval: queries look for judged documents (BEIR's layout, Thakur et al., 2021; or any files of that content)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator

from rayemb import storage
from rayemb.data.embeddings import ID, EmbeddingsTable
from rayemb.evaluate.encoders import Encoder
from rayemb.evaluate.errors import EvaluateError
from rayemb.evaluate.exact import ArrayVectors, Neighbours, TableVectors, Vectors, exact_search, fixed_scores
from rayemb.evaluate.metrics.ir import IR_MEASURES, Judged, Judgements, judge_lists
from rayemb.evaluate.metrics.lists import Ties
from rayemb.evaluate.report import Curve, Example, Hit, Similarities
from rayemb.evaluate.tasks import shown
from rayemb.evaluate.tasks.base import Found, Items, Means, Shown, Task, TaskConfig
from rayemb.evaluate.tasks.records import Records, joined_digest, read
from rayemb.evaluate.tasks.vectors import diagnose, text_vectors

SPARE = 16
"""Places beyond the deepest cut-off: ties at the cut are then the metric's to judge and not the search's."""
WHOLE = ("map", "mrr", "ndcg", "r_precision")
"""Measures that need no cut-off; a search then gives its first 1,000 (more where a query has more), as runs of TREC."""
OURS = {
    "id": ["id", "_id"],
    "query": ["query", "query-id", "query_id"],
    "document": ["document", "corpus-id", "corpus_id", "doc_id"],
    "grade": ["grade", "score", "relevance"],
}
"""Names of columns, ours first, then those of BEIR and its kin."""


def checked_measures(value: tuple[str, ...]) -> tuple[str, ...]:
    """Names of measures of ranked lists. Raises ValueError (as pydantic wants it) naming one that there is not."""
    for name in value:
        base, at, depth = name.partition("@")
        cut = depth.isascii() and depth.isdigit() and int(depth) > 0
        fits = (cut and base != "r_precision") if at else base in WHOLE
        if base not in IR_MEASURES or not fits:
            names = ", ".join(f"{m}@k" for m in IR_MEASURES if m != "r_precision")
            raise ValueError(f"there is no measure {name!r}; there are {names}, and {', '.join(WHOLE)} of whole lists")
    return value


class RetrievalConfig(TaskConfig):
    """Queries among documents, with graded judgements; by any of the measures of trec_eval."""

    gives: ClassVar[frozenset[str]] = frozenset({"vectors", "texts"})
    kind: Literal["retrieval"] = "retrieval"
    data: str | None = Field(None, description="folder with corpus.jsonl, queries.jsonl and qrels/SPLIT.tsv")
    split: str = Field("test", description="of the judgements in `data`")
    corpus: str | None = Field(None, description="file of documents: id, text and perhaps title; null: that of `data`")
    queries: str | None = Field(
        None, description="file of queries: id, text and perhaps excluded_ids; null: that of `data`"
    )
    qrels: str | None = Field(None, description="file of judgements: query, document, grade; null: that of `data`")
    columns: dict[str, str] = Field({}, description="what the files call our columns, such as text: passage")
    embeddings: str | None = Field(
        None, description="embeddings table of the documents by the very model, instead of encoding them"
    )
    index: str | None = Field(None, description="index of `embeddings` to search instead of all rows")
    measures: tuple[str, ...] = Field(
        ("ndcg@10", "recall@10", "recall@100", "map@100", "mrr@10"), min_length=1, description="the main one first"
    )
    relevant_from: int = Field(1, ge=1, description="lowest grade that is relevant (nDCG takes the grades themselves)")
    ties: Ties = Field("worst", description="worst: against the model; trec, sbert: as those tools have it")
    exclude_identical_ids: bool = Field(
        False, description="a document with the id of the query is the query itself (ArguAna, Quora)"
    )

    _measures = field_validator("measures")(checked_measures)

    @model_validator(mode="after")
    def _enough(self) -> "RetrievalConfig":
        if self.data is None and not all((self.queries, self.qrels, self.corpus or self.embeddings)):
            raise ValueError("give data, or corpus, queries and qrels")
        if self.index and not self.embeddings:
            raise ValueError("index: an index is of embeddings; name them too")
        return self

    @property
    def metrics(self) -> tuple[str, ...]:
        """See `TaskConfig.metrics`."""
        return self.measures

    @property
    def direction(self) -> str:
        """See `TaskConfig.direction`."""
        return "query→document"

    def load(self, where: str) -> "Retrieval":
        """See `TaskConfig.load`."""
        asked, judged = self._read("queries"), self._read("qrels")
        documents = None if self.corpus is None and self.embeddings else self._read("corpus")
        ids, texts, digest = self._documents(documents)
        return _task(self, where, asked, judged, ids, texts, digest)

    def _documents(self, documents: Records | None) -> tuple[list[str], list[str] | None, str]:
        if documents is None:
            table = EmbeddingsTable.open(str(self.embeddings))
            ids = table.columns(0, table.rows, [ID]).column(0).to_pylist()
            return ids, None, f"{table.uri} {table.version} {table.model_digest}"
        return documents.ids("id"), _titled(documents), documents.digest

    def _read(self, part: Literal["corpus", "queries", "qrels"]) -> Records:
        uri = getattr(self, part) or _file(str(self.data), part, self.split)
        # A name that is mapped may be that of one file only: the others then have ours.
        columns = {**OURS, **{name: [theirs, *OURS.get(name, [name])] for name, theirs in self.columns.items()}}
        if part == "qrels":
            return read(uri, ("query", "document", "grade"), columns=columns)
        return read(uri, ("id", "text"), ("title",) if part == "corpus" else ("excluded_ids",), columns)


@dataclass(frozen=True)
class Retrieval(Task):
    """O(Q N D) time beside the encoding; memory O(N D) of the documents, or a block of them from a table."""

    config: RetrievalConfig
    where: str
    digest: str
    query_ids: list[str]
    query_texts: list[str]
    ids: list[str]  # of the documents
    texts: list[str] | None  # None: an embeddings table has them
    judged: Judgements  # rows of the two above
    excluded: NDArray[np.int64]  # (Q, E) documents that are no answer to a query, -1
    dropped: int  # queries of the judgements without a relevant document

    def run(self, encoder: Encoder, means: Means) -> Found:
        """See `Task.run`."""
        config = self.config
        q_QD = text_vectors(encoder, self.query_texts, self.where, kind="query", names=self.query_ids)
        corpus = self._corpus(encoder)
        found = self._search(q_QD, corpus, means)
        judged = judge_lists(
            found.rows,
            np.where(found.rows >= 0, found.scores, 0.0),
            self.judged,
            ties=config.ties,
            level=config.relevant_from,
            complete=found.rows.shape[1] >= len(self.ids),
            queries=self.query_ids,
            documents=self.ids,
        )
        columns = {name: judged.measure(name) for name in config.measures}
        notes = (
            (f"{self.dropped:,} judged queries have no relevant document and are left out.",) if self.dropped else ()
        )
        sample = self._sample(corpus, means.seed)
        return Found(
            Items(self.query_ids, columns),
            len(self.ids),
            self._shown(encoder, q_QD, corpus, found, judged, columns[config.metrics[0]], sample, means),
            diagnose(config.diagnosed, seed=means.seed, vectors=sample[1], texts=self._texts(sample[0])),
            notes,
        )

    @property
    def _depth(self) -> int:
        deepest = [int(name.partition("@")[2] or 1000) for name in self.config.measures]
        most = int(np.diff(self.judged.starts).max(initial=1))
        return max(*deepest, most if "r_precision" in self.config.measures else 1, shown.KS[-1]) + SPARE

    def _corpus(self, encoder: Encoder) -> Vectors:
        if self.texts is not None:
            return ArrayVectors(text_vectors(encoder, self.texts, self.where, names=self.ids))
        table = EmbeddingsTable.open(str(self.config.embeddings))
        if table.model_digest != encoder.digest:
            raise EvaluateError(
                f"its vectors are of model {table.model_digest[:12]}, not of {encoder.name} ({encoder.digest[:12]})",
                where=table.uri,
                fix="embed the documents with that model, or give their texts (corpus)",
            )
        return TableVectors(table.uri, table.version)

    def _search(self, q_QD: NDArray[np.float32], corpus: Vectors, means: Means) -> Neighbours:
        excluded, k = self.excluded, min(self._depth, len(self.ids))
        if self.config.index is None:
            return exact_search(q_QD, corpus, k, exclude=excluded, tasks=means.ray_tasks)
        if means.open_index is None:
            raise EvaluateError("an index cannot be opened here", where=f"{self.where}.index")
        search = means.open_index(storage.normalise(self.config.index))
        if isinstance(corpus, TableVectors) and search.table != (corpus.uri, corpus.version):
            raise EvaluateError(
                f"the index is of {search.table[0]} at version {search.table[1]}, the embeddings are version "
                f"{corpus.version} of {corpus.uri}",
                where=f"{self.where}.index",
                fix="build the index again",
            )
        found = search(q_QD, k + excluded.shape[1])
        gone = (found.rows[:, :, None] == excluded[:, None, :]).any(axis=2) & (found.rows >= 0)
        order = np.argsort(gone | (found.rows < 0), axis=1, kind="stable")[:, :k]
        left = ~np.take_along_axis(gone, order, axis=1)
        rows, scores = (np.take_along_axis(part, order, axis=1) for part in found)
        return Neighbours(np.where(left, rows, -1), np.where(left, scores, -np.inf))

    def _sample(self, corpus: Vectors, seed: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        rows = np.sort(np.random.default_rng(seed).permutation(corpus.rows)[: shown.SAMPLE])
        if isinstance(corpus, ArrayVectors):
            return rows, corpus.read(0, corpus.rows)[rows]
        table = EmbeddingsTable.open(str(self.config.embeddings))
        return rows, np.array([row["vector"] for row in table.take(rows.tolist(), ["vector"])], np.float32)

    def _texts(self, rows: NDArray[np.int64]) -> list[str]:
        source = self.ids if self.texts is None else self.texts
        return [source[row] for row in rows]

    def _shown(
        self,
        encoder: Encoder,
        q_QD: NDArray[np.float32],
        corpus: Vectors,
        found: Neighbours,
        judged: Judged,
        main: NDArray[np.float64],
        sample: tuple[NDArray[np.int64], NDArray[np.float32]],
        means: Means,
    ) -> Shown:
        ks = tuple(k for k in shown.KS if k <= found.rows.shape[1])
        curve = Curve(metric="recall", ks=ks, systems={encoder.name: tuple(float(judged.recall(k).mean()) for k in ks)})
        if not means.show:
            return Shown(curves=(curve,))
        rows, vectors = sample
        return Shown(
            space=shown.space(vectors, means.map, means.seed, texts=self._texts(rows)),
            similarities=self._histograms(q_QD, corpus, sample),
            curves=(curve,),
            examples=tuple(self._example(query, found) for query in shown.worst(main)),
        )

    def _histograms(
        self, q_QD: NDArray[np.float32], corpus: Vectors, sample: tuple[NDArray[np.int64], NDArray[np.float32]]
    ) -> Similarities | None:
        if not isinstance(corpus, ArrayVectors):
            return None
        relevant = self.judged.grades >= self.config.relevant_from
        of, documents = self.judged.rows[relevant][: shown.SAMPLE], self.judged.ids[relevant][: shown.SAMPLE]
        positives = fixed_scores(q_QD, corpus.array, of, documents)
        rows, vectors = sample
        some = np.arange(len(q_QD))[: max(1, 100_000 // max(1, len(rows)))]
        judged = set(zip(self.judged.rows.tolist(), self.judged.ids.tolist(), strict=True))
        others = np.array([[(int(q), int(row)) not in judged for row in rows] for q in some])
        return shown.similarities(positives, (q_QD[some] @ vectors.T)[others])

    def _example(self, query: int, found: Neighbours) -> Example:
        own = slice(self.judged.starts[query], self.judged.starts[query + 1])
        grades = dict(zip(self.judged.ids[own].tolist(), self.judged.grades[own].tolist(), strict=True))
        rows = [int(row) for row in found.rows[query] if row >= 0]
        good = [grades.get(row, 0) >= self.config.relevant_from for row in rows]
        texts = self._texts(np.array(rows[: shown.HITS], np.int64))
        hits = [(text, float(s), g) for text, s, g in zip(texts, found.scores[query], good, strict=False)]
        rank = good.index(True) + 1 if any(good) else None
        example = shown.text_example(self.where, self.config.direction, self.query_texts[query], hits, rank=rank)
        if rank is None or rank <= len(hits):
            return example
        (text,) = self._texts(np.array(rows[rank - 1 : rank], np.int64))
        wanted = Hit(caption=shown.short(text), score=float(found.scores[query][rank - 1]), relevant=True)
        return example.model_copy(update={"wanted": wanted})


def _task(
    config: RetrievalConfig,
    where: str,
    asked: Records,
    judged: Records,
    ids: list[str],
    texts: list[str] | None,
    digest: str,
) -> Retrieval:
    rows = {name: row for row, name in enumerate(ids)}
    query_ids, query_texts = asked.ids("id"), asked.texts("text")
    query_rows = {name: row for row, name in enumerate(query_ids)}
    pairs: dict[tuple[int, int], int] = {}
    grades = judged.integers("grade")
    for at, (query, document) in enumerate(zip(judged.names("query"), judged.names("document"), strict=True)):
        if query not in query_rows:
            raise EvaluateError(f"query {query!r} is not in {asked.uri}", where=judged.where(at))
        if document not in rows:
            place = config.embeddings if texts is None else config.corpus or _file(str(config.data), "corpus", "")
            raise EvaluateError(f"document {document!r} is not in {place}", where=judged.where(at))
        pair = query_rows[query], rows[document]
        if pair in pairs:
            raise EvaluateError(f"query {query!r} judges document {document!r} twice", where=judged.where(at))
        pairs[pair] = int(grades[at])
    excluded = _excluded(config, asked, rows)
    for asking, gone in excluded.items():
        for row in gone:
            pairs.pop((asking, row), None)
    answerable = sorted({asking for (asking, _), value in pairs.items() if value >= config.relevant_from})
    if not answerable:
        raise EvaluateError("no query has a relevant document", where=judged.uri)
    new_row = {asking: at for at, asking in enumerate(answerable)}
    kept = [(new_row[asking], row, value) for (asking, row), value in pairs.items() if asking in new_row]
    left_out = [sorted(excluded.get(asking, set())) for asking in answerable]
    excluded_QE = np.full((len(answerable), max(map(len, left_out))), -1, np.int64)
    for at, gone_rows in enumerate(left_out):
        excluded_QE[at, : len(gone_rows)] = gone_rows
    columns = [np.array(column, np.int64) for column in zip(*kept, strict=True)]
    return Retrieval(
        config,
        where,
        joined_digest(asked.digest, judged.digest, digest),
        [query_ids[asking] for asking in answerable],
        [query_texts[asking] for asking in answerable],
        ids,
        texts,
        Judgements.of(columns[0], columns[1], columns[2], len(answerable)),
        excluded_QE,
        len({asking for asking, _ in pairs}) - len(answerable),
    )


def _excluded(config: RetrievalConfig, asked: Records, rows: Mapping[str, int]) -> dict[int, set[int]]:
    found: dict[int, set[int]] = {}
    if config.exclude_identical_ids:
        found = {at: {rows[name]} for at, name in enumerate(asked.ids("id")) if name in rows}
    if asked.has("excluded_ids"):
        for at, names in enumerate(asked.columns["excluded_ids"]):
            if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
                raise EvaluateError("excluded_ids is no list of ids", where=asked.where(at))
            # An id that the corpus lacks cannot be found anyhow: lists of BRIGHT are for a larger corpus.
            found.setdefault(at, set()).update(rows[name] for name in names or () if name in rows)
    return found


def _titled(documents: Records) -> list[str]:
    """Title and text as one, as BEIR and mteb have it. Raises EvaluateError where both are empty."""
    titles = documents.columns.get("title", [""] * len(documents))
    found = []
    for row, (title, text) in enumerate(zip(titles, documents.columns["text"], strict=True)):
        if not isinstance(text, str) or not isinstance(title, str | None):
            raise EvaluateError("title or text is no text", where=documents.where(row))
        whole = f"{title or ''} {text}".strip()
        if not whole:
            raise EvaluateError("the document is empty", where=documents.where(row), fix="leave it out")
        found.append(whole)
    return found


def _file(folder: str, part: str, split: str) -> str:
    """The file of that part, whichever of the formats it has."""
    stem = storage.join(folder, f"qrels/{split}" if part == "qrels" else part)
    endings: Sequence[str] = (".tsv", ".parquet", ".csv") if part == "qrels" else (".jsonl", ".parquet", ".csv", ".tsv")
    return next((stem + ending for ending in endings if storage.exists(stem + ending)), stem + endings[0])
