"""Corpus and model to vectors, on Ray Data: an actor pool of encoders, shard by shard, resumable."""

import contextlib
import json
import time
import uuid
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray

from rayemb import storage
from rayemb.cluster import ClusterError, require_cpus
from rayemb.config import ConfigError
from rayemb.data.config import EmbedConfig, EmbedWhat
from rayemb.data.corpus import PAYLOAD, SCHEMA, Corpus, CorpusError, open_shard
from rayemb.data.embeddings import (
    SET_ASIDE_KEY,
    VECTOR,
    WHAT_KEY,
    EmbeddingsError,
    EmbeddingsTable,
    NoTableError,
    embeddings_schema,
)
from rayemb.data.encode import BadRows, RowEncoder, Span, damaged
from rayemb.data.ledger import REQUESTS_AT_ONCE, Ledger, Record, Shard
from rayemb.models import ImageLimits, Model, ModelError
from rayemb.progress import Progress

SOURCE_KEY = "rayemb.source"


@dataclass(frozen=True)
class Embedded:
    """An embeddings table and what this run had to do for it. `rows` and `shards` leave out what it found done."""

    table: EmbeddingsTable
    rows: int = 0
    shards: int = 0
    resumed_rows: int = 0
    resumed_shards: int = 0
    seconds: float = 0.0

    @property
    def rows_per_second(self) -> float:
        """This run's rows by this run's seconds, its start and its commit included; 0 if it had none to embed."""
        return self.rows / self.seconds if self.rows else 0.0


def embed_corpus(
    corpus_uri: str, model_uri: str, table_uri: str, config: EmbedConfig, *, progress: Progress | None = None
) -> Embedded:
    """The embeddings table of the corpus at `table_uri`, one row per row, in the corpus's order.

    A table that was made from the same corpus by the same model is used as it is; otherwise a new version replaces
    the content, in one commit at the end. The corpus is cut into shards of whole row groups; each is a task of the
    encoders and is noted once its data file is written, so that a run that was stopped goes on from there. Rows that
    cannot be read, decoded or encoded are set aside in `<table>.quarantine`. The driver holds shards, never rows.
    Needs a connected Ray. Raises CorpusError, ModelError, ConfigError or ClusterError before work starts;
    EmbeddingsError if too many rows are bad or the place holds a table of somebody else's.
    """
    started = time.perf_counter()
    corpus, model = Corpus.open(corpus_uri), Model.load(model_uri)
    job = _job(corpus, model, model_uri, storage.normalise(table_uri), config)
    ledger = job.ledger
    if existing := _existing(job):
        ledger.tidy()  # the run that made it may have been killed before it could
        return Embedded(existing)
    _require(config)
    shards = list(_shards(corpus, job.splits, config.rows_per_file))
    records = ledger.read(shards)
    tally = _Tally(sum(shard.rows for shard in shards), config.max_bad_fraction, ledger.quarantine, progress)
    tally.resume(records.values())
    missing = [shard for shard in shards if shard.name not in records]
    with contextlib.closing(_encode(missing, job)) as finished:
        for record in finished:
            records[record.shard] = record
            tally.add(record)
    _commit([records[shard.name] for shard in shards], job, tally)
    table = EmbeddingsTable.open(ledger.table_uri)
    ledger.tidy()
    seconds = time.perf_counter() - started
    return Embedded(table, tally.rows, len(missing), tally.resumed, len(shards) - len(missing), seconds)


@dataclass(frozen=True)
class _Job:
    """What is made of what, and what an encoder must know for it."""

    config: EmbedConfig
    what: EmbedWhat
    splits: list[str]
    model_uri: str
    model_digest: str
    schema: pa.Schema
    limits: ImageLimits
    source: str
    ledger: Ledger
    run: str


def _job(corpus: Corpus, model: Model, model_uri: str, table_uri: str, config: EmbedConfig) -> _Job:
    what: EmbedWhat = config.what or ("image" if corpus.kind == "image_text" else "text")
    needs = {"image": "image_text", "query": "text_pair"}.get(what, corpus.kind)
    if needs != corpus.kind:
        raise ConfigError(f"a {corpus.kind} corpus has no {what} to embed", where="embed.what", fix="take text")
    splits = config.splits or list(corpus.splits)
    if not sum(corpus.rows(split) for split in splits):
        raise CorpusError("there are no rows to embed", where=corpus.uri)
    digest, images = str(model.digest), config.keep_images and corpus.kind == "image_text"
    query = [SCHEMA.field("query")] if corpus.kind == "text_pair" else []
    source = storage.sha256_bytes(f"{corpus.digest}|{splits}|{what}|{images}".encode())
    fingerprint = storage.sha256_bytes(f"{source}|{digest}|{config.rows_per_file}".encode())
    return _Job(
        config=config,
        what=what,
        splits=splits,
        model_uri=model_uri,
        model_digest=digest,
        schema=embeddings_schema([*query, *PAYLOAD], model.dim, digest, images=images),
        limits=corpus.image_limits,
        source=source,
        ledger=Ledger(table_uri, fingerprint),
        run=uuid.uuid4().hex,
    )


def _existing(job: _Job) -> EmbeddingsTable | None:
    try:
        table = EmbeddingsTable.open(job.ledger.table_uri)
    except NoTableError:
        return None
    made_from = table.metadata.get(SOURCE_KEY, "")
    return table if (table.model_digest, made_from) == (job.model_digest, job.source) else None


def _require(config: EmbedConfig) -> None:
    # Ray would wait without limit for what it does not have.
    require_cpus(config.workers * config.cpus_per_worker, "embedding (encoders)")
    needed, there = config.workers * config.gpus_per_worker, ray.cluster_resources().get("GPU", 0)
    if needed > there:
        raise ClusterError(
            f"embedding needs {needed:g} GPUs and the cluster has {there:g}",
            where="cluster",
            fix="ask for fewer workers or set embed.gpus_per_worker=0",
        )


def _shards(corpus: Corpus, splits: list[str], rows_per_file: int) -> Iterator[Shard]:
    """The corpus cut into shards, in its order. Reads footers; memory O(files + shards)."""
    index = 0
    for split in splits:
        spans: list[Span] = []
        for span in _pieces(corpus, split):
            if spans and sum(s.rows for s in spans) + span.rows > rows_per_file:
                yield Shard(index, split, tuple(spans))
                index, spans = index + 1, []
            last = spans[-1] if spans else None
            if last and (last.file, last.stop) == (span.file, span.start) and span.stop:
                spans[-1] = Span(last.file, last.start, span.stop, last.rows + span.rows)
            else:
                spans.append(span)
        if spans:
            yield Shard(index, split, tuple(spans))
            index += 1


def _pieces(corpus: Corpus, split: str) -> Iterator[Span]:
    """The row groups of a split, one by one; a file whose footer is damaged as a whole."""

    def group_rows(file: str) -> list[int] | None:
        try:
            metadata = open_shard(file).metadata
        except CorpusError as error:
            if damaged(error):
                return None
            raise
        return [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]

    entries = corpus.manifest["splits"][split]["files"]
    files = [storage.join(corpus.uri, entry["file"]) for entry in entries]
    with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
        for entry, file, groups in zip(entries, files, pool.map(group_rows, files), strict=True):
            if groups is None:
                yield Span(file, 0, 0, entry["rows"])
                continue
            if sum(groups) != entry["rows"]:
                raise CorpusError(f"has {sum(groups)} rows, its manifest says {entry['rows']}", where=file)
            yield from (Span(file, index, index + 1, rows) for index, rows in enumerate(groups))


def _encode(shards: list[Shard], job: _Job) -> Generator[Record, None, None]:
    """The record of each shard as the encoders finish them, in any order."""
    if not shards:
        return
    import ray.data

    config = job.config
    rows = ray.data.from_items([{"shard": shard.to_json()} for shard in shards], override_num_blocks=len(shards))
    records = rows.map_batches(
        ShardEncoder,
        fn_constructor_args=(job,),
        batch_size=1,
        num_cpus=config.cpus_per_worker,
        num_gpus=config.gpus_per_worker or None,
        compute=ray.data.ActorPoolStrategy(size=min(config.workers, len(shards))),
    )
    for row in records.iter_rows():
        yield Record(**json.loads(row["record"]))


class ShardEncoder:
    """One encoder of the pool: a shard's rows in; its data file, bad rows and record out."""

    def __init__(self, job: _Job) -> None:
        self.job = job
        size = Model.load(job.model_uri).network.config.image_size
        self.encoder = RowEncoder([job.model_uri], job.config, what=job.what, image_size=size, limits=job.limits)
        if self.encoder.models[0].digest != job.model_digest:
            raise ModelError("the model changed while it was in use", where=job.model_uri, fix="run it again")

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        """Embeds the shard that the batch names; gives its record."""
        started = time.perf_counter()
        (shard,) = (Shard.from_json(text) for text in batch["shard"])
        bad: list[BadRows] = []
        schema, ledger = self.job.schema.remove_metadata(), self.job.ledger
        ledger.begin(shard, self.job.run)
        keep = [name for name in schema.names if name not in (VECTOR, "split")]
        tables = self.encoder.encode(shard.spans, keep, bad.append)
        rows, fragments = ledger.write_data((_table(each, shard.split, schema) for each in tables), schema)
        ledger.write_bad(shard, bad)
        reasons: Counter[str] = Counter()
        for each in bad:
            reasons[each.reason] += each.rows
        if rows + reasons.total() != shard.rows:
            raise EmbeddingsError(f"{rows} of {shard.rows} rows were embedded", where=ledger.table_uri)
        record = Record(shard.name, rows, dict(reasons), fragments, time.perf_counter() - started)
        ledger.write(record)
        return {"record": [record.to_json()]}


def _table(rows: pa.Table, split: str, schema: pa.Schema) -> pa.Table:
    rows = rows.append_column("split", pa.array([split] * len(rows), pa.string()))
    return rows.select(schema.names).cast(schema)


class _Tally:
    """What is done of `total` rows, how fast, and how much of it is bad."""

    def __init__(self, total: int, max_bad_fraction: float, quarantine: str, progress: Progress | None) -> None:
        self.total, self.max_bad_fraction = total, max_bad_fraction
        self.quarantine, self.progress = quarantine, progress
        self.rows = self.resumed = self._seen = 0
        self.bad: Counter[str] = Counter()
        self._since: float | None = None

    def resume(self, records: Iterable[Record]) -> None:
        """Counts what an earlier run did."""
        for record in records:
            self.resumed += record.rows
            self.bad.update(record.bad)
        self._check()
        if self.progress and self.resumed:
            self.progress(self.resumed + self.bad.total(), self.total, f"{self.resumed:,} vectors from an earlier run")

    def add(self, record: Record) -> None:
        """Counts a shard of this run. Raises EmbeddingsError as soon as there are too many bad rows."""
        now = time.perf_counter()
        # From when the first encoder set to work: loading models says nothing about what is to come.
        self._since = now - record.seconds if self._since is None else self._since
        self.rows += record.rows
        self._seen += record.rows + sum(record.bad.values())
        self.bad.update(record.bad)
        self._check()
        if self.progress:
            done = self.resumed + self.rows + self.bad.total()
            speed = self._seen / max(now - self._since, 1e-9)
            left = f", about {_duration((self.total - done) / speed)} left" if done < self.total else ""
            self.progress(done, self.total, f"{self.resumed + self.rows:,} vectors, {speed:,.0f} rows/s{left}")

    def _check(self) -> None:
        if self.bad.total() > self.max_bad_fraction * self.total:
            raise EmbeddingsError(
                f"{self.bad.total()} of {self.total} rows cannot be embedded ({counted(self.bad)})",
                where="embed.max_bad_fraction",
                fix=f"see {self.quarantine}, mend the corpus, or allow more; finished shards are kept",
            )


def _commit(records: list[Record], job: _Job, tally: _Tally) -> None:
    ledger = job.ledger
    if not any(record.rows for record in records):
        raise EmbeddingsError(f"no row could be embedded ({counted(tally.bad)})", where=ledger.quarantine)
    if gone := ledger.missing(records):
        raise EmbeddingsError(
            f"{len(gone)} data files are gone ({gone[0]}): another run may have finished on the same table",
            where=ledger.table_uri,
            fix="run it again; give every corpus and model a table of its own",
        )
    about = {SOURCE_KEY: job.source, WHAT_KEY: job.what, SET_ASIDE_KEY: json.dumps(tally.bad)}
    ledger.commit(records, job.schema.with_metadata({**job.schema.metadata, **about}))


def counted(reasons: Mapping[str, int]) -> str:
    """Counts by reason, the most frequent first, in words."""
    return ", ".join(f"{reason} {count:,}" for reason, count in sorted(reasons.items(), key=lambda each: -each[1]))


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
