"""Builds the corpus artefact from a source, on Ray Data: checked rows in, Parquet shards and a quarantine out."""

import datetime
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray

from rayemb import storage
from rayemb.data.config import CorpusConfig
from rayemb.data.corpus import FORMAT, MANIFEST, SCHEMA, Corpus, CorpusError, Kind, parquet_bytes
from rayemb.data.keys import keys_of, text_keys
from rayemb.data.sources import RawRow
from rayemb.data.sources.base import split_by_concept
from rayemb.models import ImageError, decode_image
from rayemb.progress import Progress

QUARANTINE = "_quarantine"  # readers of Parquet folders skip names with a leading underscore
QUARANTINE_SCHEMA = pa.schema(
    [
        ("source", pa.string()),
        ("id", pa.string()),
        ("reason", pa.string()),
        ("what", pa.string()),
        ("rows", pa.int64()),  # that the entry stands for: of a damaged file more than one
    ]
)

_SPLIT = re.compile(r"[\w-][\w.-]*")  # it becomes a folder
# What a build writes before its manifest; `.tmp` is a write that was killed.
_OURS = re.compile(r"(split=[^/]+/shard-\d{5,}(-\d{3,})?|_quarantine/[^/]+)\.parquet(\.\w+\.tmp)?")


def build_corpus(config: CorpusConfig, uri: str, *, progress: Progress | None = None) -> Corpus:
    """The corpus of `config` at `uri`; one that is already there and complete is used as it is.

    The units of the source, several to a task if they are small, are read, checked and written as shards by Ray Data,
    a task holding one shard of each split at a time. Bad rows and damaged files are set aside in `_quarantine/` with
    their reason and place. The driver holds 8 bytes a row, for finding duplicate ids. What comes out depends on config
    and source alone, not on the number of workers or their timing. Needs a connected Ray. Raises CorpusError (no
    usable row, too many bad ones), SourceError, or StorageError: a store that fails is never taken for bad rows.
    """
    uri = storage.normalise(uri)
    fingerprint = storage.sha256_bytes(config.model_dump_json().encode())
    manifest_uri = storage.join(uri, MANIFEST)
    if storage.exists(manifest_uri):
        existing = Corpus.open(uri)
        if existing.manifest["fingerprint"] == fingerprint:
            return existing
        raise CorpusError(
            "another corpus is already here",
            where=uri,
            fix="delete it, or build to another place (workspace=... or artefacts.corpus=...)",
        )
    units = config.source.units(config.seed)
    if not units:
        raise CorpusError("the source has no rows", where="corpus.source")
    _clear(uri)
    reports = list(_run(units, config, uri, progress))
    _drop_duplicates(reports, uri)
    manifest = _manifest(reports, config, fingerprint)
    kept, bad = manifest["rows"], manifest["quarantine"]["rows"]
    reasons = ", ".join(f"{reason} {count}" for reason, count in manifest["quarantine"]["reasons"].items())
    if not kept:
        raise CorpusError(
            f"no usable row ({reasons or 'zero rows'})", where="corpus.source", fix=f"see {uri}/{QUARANTINE}"
        )
    if bad > config.max_bad_fraction * (kept + bad):
        raise CorpusError(
            f"{bad} of {kept + bad} rows are bad ({reasons})",
            where="corpus.max_bad_fraction",
            fix=f"see {uri}/{QUARANTINE}, mend the source, or allow more",
        )
    storage.write_json(manifest_uri, manifest)
    return Corpus.open(uri)


def _clear(uri: str) -> None:
    """Removes what a build that did not finish left behind, and nothing else: the place may be someone's folder."""
    files = [file.removeprefix(f"{uri}/") for file in storage.list_files(uri)]
    foreign = [file for file in files if not _OURS.fullmatch(file)]
    if foreign:
        raise CorpusError(
            f"the folder holds other files ({', '.join(foreign[:3])}{', ...' if foreign[3:] else ''})",
            where=uri,
            fix="build to a new place",
        )
    for top in {file.split("/")[0] for file in files}:
        storage.delete(storage.join(uri, top))


def _run(units: list[Any], config: CorpusConfig, uri: str, progress: Progress | None) -> Iterator[dict[str, Any]]:
    def build(batch: dict[str, Any]) -> dict[str, list[Any]]:
        return {"report": [_build_task(int(index), tasks_ref, config, uri) for index in batch["index"]]}

    import ray.data

    tasks = _tasks(units, config.shard_rows)
    tasks_ref = ray.put(tasks)
    dataset = ray.data.from_items([{"index": i} for i in range(len(tasks))], override_num_blocks=len(tasks))
    for done, row in enumerate(dataset.map_batches(build, batch_size=1).iter_rows(), 1):
        if progress:
            progress(done, len(tasks), f"{row['report']['rows']} rows")
        yield row["report"]


def _tasks(units: list[Any], shard_rows: int) -> list[list[Any]]:
    """The units in tasks of about a shard: a row group of 64 rows would make a file of its own for every split."""
    tasks: list[list[Any]] = []
    rows = 0
    for unit in units:
        # Of a unit that does not say how many rows it has, a task of its own.
        own = unit.rows if getattr(unit, "part", None) is not None else shard_rows
        if tasks and rows + own <= shard_rows:
            tasks[-1].append(unit)
            rows += own
        else:
            tasks.append([unit])
            rows = own
    return tasks


def _build_task(index: int, tasks_ref: Any, config: CorpusConfig, uri: str) -> dict[str, Any]:
    """Writes the shards of one task's units; gives what the manifest needs to know of them."""
    shards = _Shards(index, config, uri)
    for unit in ray.get(tasks_ref)[index]:
        for row in config.source.read(unit):
            shards.add(row)
    shards.flush()
    rows = sum(entry["rows"] for entry in shards.files)
    return {"index": index, "files": shards.files, "rows": rows, "reasons": dict(shards.reasons)}


class _Shards:
    """What one task writes. Rows gather per split until a shard is full; bad ones likewise."""

    def __init__(self, index: int, config: CorpusConfig, uri: str) -> None:
        self.index, self.config, self.uri = index, config, uri
        self.files: list[dict[str, Any]] = []
        self.reasons: Counter[str] = Counter()
        self._good: dict[str, list[RawRow]] = {}
        self._bytes: Counter[str] = Counter()
        self._bad: list[dict[str, Any]] = []
        self._parts: Counter[str] = Counter()

    def add(self, row: RawRow) -> None:
        problem = row.problem or judge(row, self.config)
        if problem:
            self.reasons[problem[0]] += row.count
            self._bad.append(_bad_row(row, *problem))
            if len(self._bad) >= self.config.shard_rows:
                self._flush_bad()
            return
        split = row.split or split_of(concept_of(row), self.config)
        self._good.setdefault(split, []).append(row)
        self._bytes[split] += _size(row)
        if len(self._good[split]) >= self.config.shard_rows or self._bytes[split] >= self.config.shard_mb * 2**20:
            self._flush_good(split)

    def flush(self) -> None:
        for split in sorted(self._good):
            self._flush_good(split)
        self._flush_bad()

    def _name(self, kind: str) -> str:
        self._parts[kind] += 1
        return f"shard-{self.index:05d}-{self._parts[kind] - 1:03d}"

    def _flush_good(self, split: str) -> None:
        rows = self._good.pop(split)
        self._bytes[split] = 0
        file = f"split={split}/{self._name(split)}.parquet"
        data = parquet_bytes(_table(rows, self.config.source.kind), self.config.row_group_rows)
        storage.write_bytes(storage.join(self.uri, file), data)
        ids = np.array([_hash(row.id) for row in rows], dtype=np.uint64).tobytes()
        entry = {"split": split, "file": file, "rows": len(rows), "sha256": storage.sha256_bytes(data)}
        self.files.append({**entry, "ids": ids})

    def _flush_bad(self) -> None:
        if self._bad:
            _write_quarantine(self.uri, self._name(QUARANTINE), self._bad)
            self._bad = []


def judge(row: RawRow, config: CorpusConfig) -> tuple[str, str] | None:
    """Why a row is not acceptable, as (reason, sentence); None if it is."""
    if not row.id:
        return "missing_id", "the row has no id"
    for text in (row.id, row.concept, row.style, row.license, row.text, row.query, *row.texts, *row.negatives):
        if text and (problem := _unprintable(text)):
            return problem
    if not row.text or not row.text.strip():
        return "empty_text", "the text is empty"
    for name, text in _judged_texts(row):
        if len(text) > config.max_text_chars:
            return "long_text", f"the {name} has {len(text):,} characters, over {config.max_text_chars:,}"
    if row.split and not _SPLIT.fullmatch(row.split):
        return "bad_split", f"the split {row.split[:40]!r} is not a name of letters, digits, '_', '-' and '.'"
    if config.source.kind == "text_pair" and not (row.query or "").strip():
        return "empty_query", "the query is empty"
    if config.source.kind != "image_text":
        return None
    if row.image is None:
        return "missing_image", "there is no image"
    try:
        decode_image(row.image, config.image_limits)
    except ImageError as error:
        return f"{error.reason}_image", error.what
    return None


def _judged_texts(row: RawRow) -> Iterator[tuple[str, str]]:
    yield "text", row.text or ""
    yield "query", row.query or ""
    for text in row.texts:
        yield "caption", text
    for text in row.negatives:
        yield "negative", text


def _unprintable(text: str) -> tuple[str, str] | None:
    if "\0" in text:  # half of what reads the corpus would take it for the end
        return "nul_character", "a text holds a NUL"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "bad_utf8", "a text is not valid Unicode: it holds half of a surrogate pair"
    return None


def _drop_duplicates(reports: list[dict[str, Any]], uri: str) -> None:
    """Keeps the first row of each id, in the order of the plan; the others go to the quarantine."""
    reports.sort(key=lambda report: report["index"])
    entries = [(report, entry) for report in reports for entry in report["files"]]
    if not entries:
        return
    parts = [np.frombuffer(entry.pop("ids"), dtype=np.uint64) for _, entry in entries]
    ids = np.concatenate(parts)
    _, first = np.unique(ids, return_index=True)
    if len(first) == len(ids):
        return
    keep = np.zeros(len(ids), dtype=bool)
    keep[first] = True
    start = 0
    for (report, entry), part in zip(entries, parts, strict=True):
        kept = keep[start : start + len(part)]
        start += len(part)
        if kept.all():
            continue
        file = storage.join(uri, entry["file"])
        fs, path = storage.filesystem(file)
        parquet = pq.ParquetFile(path, filesystem=fs)
        table, group_rows = parquet.read(), parquet.metadata.row_group(0).num_rows
        dropped = table.filter(pa.array(~kept)).column("id").to_pylist()
        text = "another row before it has the same id"
        bad = [{"source": entry["file"], "id": i, "reason": "duplicate_id", "what": text, "rows": 1} for i in dropped]
        _write_quarantine(uri, f"duplicates-{entry['split']}-{entry['file'].rpartition('/shard-')[2][:-8]}", bad)
        data = parquet_bytes(table.filter(pa.array(kept)), group_rows)
        storage.write_bytes(file, data)
        entry.update(rows=int(kept.sum()), sha256=storage.sha256_bytes(data))
        report["reasons"] = dict(Counter(report["reasons"]) + Counter(duplicate_id=len(bad)))


def _manifest(reports: Iterable[dict[str, Any]], config: CorpusConfig, fingerprint: str) -> dict[str, Any]:
    splits: dict[str, dict[str, Any]] = {}
    reasons: Counter[str] = Counter()
    for report in reports:
        reasons.update({reason: int(count) for reason, count in report["reasons"].items() if count})
        for entry in report["files"]:
            if entry["rows"]:
                split = splits.setdefault(entry["split"], {"rows": 0, "files": []})
                split["rows"] += entry["rows"]
                split["files"].append({key: entry[key] for key in ("file", "rows", "sha256")})
    sums = [entry["sha256"] for name in sorted(splits) for entry in splits[name]["files"]]
    return {
        "format": FORMAT,
        "kind": config.source.kind,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "digest": storage.sha256_bytes("".join(sums).encode()),
        "fingerprint": fingerprint,
        "rows": sum(split["rows"] for split in splits.values()),
        "splits": {name: splits[name] for name in sorted(splits)},
        "quarantine": {"rows": sum(reasons.values()), "reasons": dict(reasons)},
        "config": config.model_dump(mode="json"),
    }


def _table(rows: list[RawRow], kind: Kind) -> pa.Table:
    columns: dict[str, Any] = {
        "id": [row.id for row in rows],
        "image": [row.image for row in rows],
        "query": [row.query.strip() if row.query else None for row in rows],
        "text": [str(row.text).strip() for row in rows],
        "texts": [row.texts or [str(row.text).strip()] for row in rows],
        "negatives": [[text for text in row.negatives if text.strip()] for row in rows],
        "concept": [concept_of(row) for row in rows],
        "score": [row.score for row in rows],
        "style": [row.style for row in rows],
        "license": [row.license for row in rows],
    }
    texts = text_keys(columns["text"])
    columns["query_key"] = (
        texts if kind == "text" else text_keys(columns["query"]) if kind == "text_pair" else keys_of(columns["image"])
    )
    columns["text_key"], columns["concept_key"] = texts, keys_of(columns["concept"])
    return pa.table(columns, schema=SCHEMA)


def concept_of(row: RawRow) -> str:
    """What the row shows: its label, else its text."""
    # Stripped: "cat" and "cat " on two sides of the split would leak the one into the other.
    return row.concept.strip() or str(row.text).strip()


def _write_quarantine(uri: str, name: str, bad: list[dict[str, Any]]) -> None:
    table = pa.Table.from_pylist(bad, schema=QUARANTINE_SCHEMA)
    storage.write_bytes(storage.join(uri, QUARANTINE, f"{name}.parquet"), parquet_bytes(table, 1 << 16))


def _bad_row(row: RawRow, reason: str, what: str) -> dict[str, Any]:
    # What cannot be written is shown escaped: the quarantine is there to be read.
    source, id_, what = (text.encode(errors="backslashreplace").decode() for text in (row.source, row.id[:1000], what))
    return {"source": source, "id": id_, "reason": reason, "what": what, "rows": row.count}


def _size(row: RawRow) -> int:
    """Bytes of the row in a shard, about."""
    texts = sum(len(text or "") for text in (row.text, row.query, *row.texts, *row.negatives))
    return len(row.image or b"") + texts + 100


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def split_of(concept: str, config: CorpusConfig) -> str:
    """The split of a row whose source names none."""
    return split_by_concept(concept, config.seed, config.test_fraction, config.val_fraction)
