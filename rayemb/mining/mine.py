"""Mining hard negatives over an index: each row's nearest documents that are no positives, as its `negatives`.

A curation step whose edits are negatives: rows are embedded, searched and judged in parallel, resumed by step, and
published as a new corpus by the machinery of `rayemb.curate`. Cost: one pass of the encoder over the rows, one search
of `last_rank` places a row, and for every judge one score a candidate that is left.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray
from pydantic import Field

from rayemb import storage
from rayemb.curate import CurationError, Rows, Verdicts, together, verdicts
from rayemb.curate.base import runs
from rayemb.curate.config import CurateConfig
from rayemb.curate.run import curate
from rayemb.curate.vectors import QUERY_VECTOR, TEXT_VECTOR, EncoderStep, PairEncoder, matrix
from rayemb.data import Corpus
from rayemb.data.corpus import parquet_bytes
from rayemb.data.keys import text_keys
from rayemb.index import Index, load_manifest
from rayemb.index.shard import open_embeddings
from rayemb.mining.cross_encoder import CrossEncoder
from rayemb.mining.select import ChoiceConfig, MarginConfig, Veto, choose
from rayemb.models import Model, model_digest
from rayemb.progress import Progress

CANDIDATES = "candidates"
SLACK = 16  # places searched beyond the last rank, for known positives and repeated texts
SCORES = pa.schema(
    [
        ("row", pa.int64()),  # ordinal in the corpus
        ("negative_id", pa.string()),  # of the document, in the embeddings table
        ("negative", pa.string()),
        ("rank", pa.int64()),  # from 1, of the places searched
        ("score", pa.float32()),  # similarity of the search
        ("positive_score", pa.float32()),
        ("guide_score", pa.float32()),
        ("guide_positive_score", pa.float32()),
        ("cross_encoder_score", pa.float32()),
        ("cross_encoder_positive_score", pa.float32()),
    ]
)


class MineConfig(EncoderStep, ChoiceConfig):
    """Puts hard negatives beside each row: its nearest documents in an index, less those that may be positives.

    `model` must be the one that the index was built with. Known positives of a row are its own texts, and the texts of
    every row with an equal query. Scores of all that was taken are kept beside the verdicts, for soft labels.
    """

    name: Literal["mine_negatives"] = "mine_negatives"
    model: str = Field("", description="URI of the model directory; default: the run's own (artefacts.model)")
    index: str = Field(
        "", description="URI of an index of documents (embed.what=text) made with the model; default: artefacts.index"
    )
    seed: int = Field(0, ge=0, description="decides what take=random takes")
    guide: str | None = Field(
        None,
        description="URI of another model: a candidate that it finds as near to the query as the positive is not taken",
    )
    guide_margin: MarginConfig = Field(
        default_factory=lambda: MarginConfig(absolute=0.0), description="by the guide's similarities"
    )
    cross_encoder: str | None = Field(
        None, description="directory of a cross-encoder of transformers: as the guide, query and document read together"
    )
    cross_encoder_margin: MarginConfig = Field(
        default_factory=lambda: MarginConfig(absolute=0.0), description="by its scores, which are logits"
    )
    keep_existing: bool = Field(False, description="put them behind the negatives that a row has, rather than instead")

    def inputs(self) -> dict[str, str]:
        """Digests of the model, the index and the judges. Raises what opening one of them raises."""
        found = {**super().inputs(), "index": load_manifest(self.index).version}
        return {**found, "guide": model_digest(self.guide)} if self.guide else found

    def judge(self, rows: Rows) -> Verdicts:
        """A verdict for every row, with its negatives; the score is their mean similarity."""
        manifest = load_manifest(self.index)
        table = open_embeddings(manifest)
        if manifest.model_digest != model_digest(self.model):
            raise CurationError(
                f"the index was built with model {manifest.model_digest[:12]}",
                where=self.index,
                fix="mine with the model of the index, or embed and index the documents again",
            )
        if table.what != "text":
            raise CurationError(
                f"the index is of each row's {table.what}", where=self.index, fix="index texts: embed.what=text"
            )
        if (self.guide or self.cross_encoder) and rows.corpus.kind != "text_pair":
            raise CurationError("a guide and a cross-encoder read texts on both sides", where=rows.corpus.uri)
        others = ray.put(_positives_of_repeated_queries(rows))
        keep = ["text", "texts", "query_key", "text_key", "negatives"]
        keep += ["query"] if rows.corpus.kind == "text_pair" else []
        return self.vectors(rows, keep=keep, encoder=(_Miner, (self, others, rows.seed, rows.folder)))


class _MiningRun(CurateConfig):
    steps: list[MineConfig]  # type: ignore[assignment]


def mine(config: MineConfig, corpus_uri: str, uri: str, *, progress: Progress | None = None) -> Corpus:
    """The corpus at `corpus_uri` with hard negatives, at `uri`; one that is already there and complete is used.

    Needs a connected Ray. Raises what `curate` raises.
    """
    run = _MiningRun(steps=[config], seed=config.seed)
    return curate(run, corpus_uri, uri, progress=progress)


def _positives_of_repeated_queries(rows: Rows) -> dict[int, NDArray[np.int64]]:
    """The text keys of every query that stands in rows with different texts; O(such rows) in the driver."""

    def repeated(table: pa.Table) -> pa.Table:
        queries, texts = np.asarray(table["query_key"]), np.asarray(table["text_key"])
        found: dict[str, list[int]] = {"query_key": [], "text_key": []}
        bounds = runs(queries)
        for start, stop in itertools.pairwise(bounds):
            different = np.unique(texts[start:stop])
            if len(different) > 1:
                found["query_key"] += [int(queries[start])] * len(different)
                found["text_key"] += different.tolist()
        return pa.table(found, schema=pa.schema([("query_key", pa.int64()), ("text_key", pa.int64())]))

    # Over all splits: a positive of the test split is no negative either.
    all_rows = rows.only(*rows.corpus.splits)
    pairs = together(all_rows.dataset(["query_key", "text_key"]), "query_key", repeated, rows=all_rows.count)
    positives: dict[int, list[int]] = {}
    for batch in pairs.iter_batches(batch_size=None, batch_format="pyarrow"):
        for query, text in zip(batch["query_key"].to_pylist(), batch["text_key"].to_pylist(), strict=True):
            positives.setdefault(query, []).append(text)
    return {query: np.array(texts, dtype=np.int64) for query, texts in positives.items()}


class _Candidates(NamedTuple):
    """What a search found for Q rows: similarities `(Q, K)`, what may not be a negative, ids and texts."""

    scores: NDArray[np.float32]
    known: NDArray[np.bool_]
    ids: list[list[str]]
    texts: list[list[str]]


class _Miner(PairEncoder):
    """One process that embeds, searches and judges; the index is mapped into it, not read."""

    def __init__(
        self,
        model: str,
        images: dict[str, bool],
        size: int,
        device: str,
        config: MineConfig,
        others: Any,
        seed: int,
        folder: str,
    ) -> None:
        super().__init__(model, images, size, device)
        self.config, self.seed, self.folder = config, seed, folder
        self.others: dict[int, NDArray[np.int64]] = ray.get(others)
        self.index = Index.open(config.index)
        self.guide = Model.load(config.guide) if config.guide else None
        self.cross_encoder = CrossEncoder(config.cross_encoder) if config.cross_encoder else None

    def __call__(self, table: pa.Table) -> pa.Table:
        """Verdicts over a batch of prepared rows."""
        if not len(table):
            return verdicts(row=[])
        table = super().__call__(table).sort_by("row")
        queries, rows = matrix(table, QUERY_VECTOR), np.asarray(table["row"])
        positive = (queries * matrix(table, TEXT_VECTOR)).sum(1)
        found = self._search(table, queries)
        vetoes = self._vetoes(table, found)
        rng = [np.random.default_rng([self.seed, int(row)]) for row in rows]
        chosen = choose(found.scores, positive, found.known, self.config, rng, [veto for veto in vetoes if veto])
        taken = [[int(place) for place in places if place >= 0] for places in chosen.places]
        self._write(rows, positive, found, taken, vetoes)
        negatives = [[found.texts[n][place] for place in places] for n, places in enumerate(taken)]
        if self.config.keep_existing:
            there = table["negatives"].to_pylist()
            negatives = [list(dict.fromkeys([*(old or []), *new])) for old, new in zip(there, negatives, strict=True)]
        means = [float(found.scores[n, places].mean()) if places else None for n, places in enumerate(taken)]
        # Null is unchanged: only a row that has negatives, or had, is edited, and counted so in the report.
        had = [bool(old) for old in table["negatives"].to_pylist()]
        edits = [new if new or old else None for new, old in zip(negatives, had, strict=True)]
        reasons = [
            "mined" if len(places) == self.config.negatives else "fewer" if places else "none" for places in taken
        ]
        what = json.dumps(chosen.left_out)
        return verdicts(row=rows, drop=False, reason=reasons, score=means, new_negatives=edits, what=[what] * len(rows))

    def _search(self, table: pa.Table, queries: NDArray[np.float32]) -> _Candidates:
        hits = self.index.search(queries, min(self.config.last_rank + SLACK, self.index.rows))
        unique = np.unique(hits.keys[hits.keys >= 0])
        payload = dict(zip(unique.tolist(), self.index.payload(unique), strict=True))
        ids = [[payload[key]["id"] if key >= 0 else "" for key in keys] for keys in hits.keys.tolist()]
        texts = [[payload[key]["text"] if key >= 0 else "" for key in keys] for keys in hits.keys.tolist()]
        known = hits.keys < 0
        columns = (table[name].to_pylist() for name in ("texts", "query_key", "text_key"))
        for number, (own, query_key, text_key) in enumerate(zip(*columns, strict=True)):
            keys = text_keys(texts[number])
            positives = [text_key, *text_keys(own or []).tolist(), *self.others.get(query_key, [])]
            first = np.zeros(len(keys), dtype=bool)
            first[np.unique(keys, return_index=True)[1]] = True
            known[number] |= np.isin(keys, positives) | ~first  # a text that was seen before is no other document
        return _Candidates(hits.scores, known, ids, texts)

    def _vetoes(self, table: pa.Table, found: _Candidates) -> tuple[Veto | None, Veto | None]:
        if self.guide is None and self.cross_encoder is None:
            return None, None
        queries, own = table["query"].to_pylist(), table["text"].to_pylist()
        guided = None
        if self.guide is not None:
            of_query, of_own = self.guide.embed_texts(queries, kind="query"), self.guide.embed_texts(own)
            texts = sorted({text for row in found.texts for text in row})
            place = {text: number for number, text in enumerate(texts)}
            vectors = self.guide.embed_texts(texts)
            at = np.array([[place[text] for text in row] for row in found.texts])
            scores = np.einsum("qkd,qd->qk", vectors[at], of_query)
            guided = Veto("guide", scores, (of_query * of_own).sum(1), self.config.guide_margin)
        if self.cross_encoder is None:
            return guided, None
        left = ~found.known
        scores = np.full(found.scores.shape, np.nan, np.float32)
        at = np.argwhere(left)
        scores[left] = self.cross_encoder.scores([queries[q] for q, _ in at], [found.texts[q][k] for q, k in at])
        judged = Veto(
            "cross_encoder", scores, self.cross_encoder.scores(queries, own), self.config.cross_encoder_margin
        )
        return guided, judged

    def _write(
        self,
        rows: NDArray[np.int64],
        positive: NDArray[np.float32],
        found: _Candidates,
        taken: Sequence[Sequence[int]],
        vetoes: tuple[Veto | None, Veto | None],
    ) -> None:
        """The scores of what was taken, in a file that the rows name: written again it is the same."""
        if not self.folder:
            return
        at = [(number, place) for number, places in enumerate(taken) for place in places]
        columns: dict[str, Any] = {
            "row": [int(rows[n]) for n, _ in at],
            "negative_id": [found.ids[n][k] for n, k in at],
            "negative": [found.texts[n][k] for n, k in at],
            "rank": [k + 1 for _, k in at],
            "score": [float(found.scores[n, k]) for n, k in at],
            "positive_score": [float(positive[n]) for n, _ in at],
        }
        for name, veto in zip(("guide", "cross_encoder"), vetoes, strict=True):
            columns[f"{name}_score"] = [float(veto.scores[n, k]) if veto else None for n, k in at]
            columns[f"{name}_positive_score"] = [float(veto.positive[n]) if veto else None for n, _ in at]
        table = pa.table(columns, schema=SCORES)
        name = f"rows-{rows[0]:012d}-{storage.sha256_bytes(rows.tobytes())[:12]}.parquet"
        storage.write_bytes(storage.join(self.folder, CANDIDATES, name), parquet_bytes(table, max(1, len(table))))
