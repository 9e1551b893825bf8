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
from rayemb.data.corpus import FORMAT, MANIFEST, SCHEMA, Corpus, CorpusError, Kind
from rayemb.data.keys import keys_of, text_keys
from rayemb.data.sources import RawRow
from rayemb.data.sources.base import split_by_concept
from rayemb.models import ImageError, decode_image
from rayemb.progress import Progress

QUARANTINE = "_quarantine"  # readers of Parquet folders skip names with a leading underscore
QUARANTINE_SCHEMA = pa.schema(
    [("source", pa.string()), ("id", pa.string()), ("reason", pa.string()), ("what", pa.string())]
)

_SPLIT = re.compile(r"[\w-][\w.-]*")  # it becomes a folder
# What a build writes before its manifest; `.tmp` is a write that was killed.
_OURS = re.compile(r"(split=[^/]+/shard-\d{5,}|_quarantine/[^/]+)\.parquet(\.\w+\.tmp)?")


def build_corpus(config: CorpusConfig, uri: str, *, progress: Progress | None = None) -> Corpus:
    """The corpus of `config` at `uri`; one that is already there and complete is used as it is.

    Every unit of the source is one Ray Data task that reads, checks and writes its own shards. Bad rows are set
    aside in `_quarantine/` with their reason and place. The driver holds 8 bytes a row, for finding duplicate ids.
    Needs a connected Ray. Raises CorpusError (no usable row, too many bad ones) or SourceError.
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
        return {"report": [_build_unit(int(index), units_ref, config, uri) for index in batch["index"]]}

    units_ref = ray.put(units)
    dataset = ray.data.from_items([{"index": i} for i in range(len(units))], override_num_blocks=len(units))
    for done, row in enumerate(dataset.map_batches(build, batch_size=1).iter_rows(), 1):
        if progress:
            progress(done, len(units), f"{row['report']['rows']} rows")
        yield row["report"]


def _build_unit(index: int, units_ref: Any, config: CorpusConfig, uri: str) -> dict[str, Any]:
    """Writes the shards of one unit; gives what the manifest needs to know of them."""
    good: dict[str, list[RawRow]] = {}
    bad: list[dict[str, str]] = []
    for row in config.source.read(ray.get(units_ref)[index]):
        problem = _judge(row, config)
        if problem:
            bad.append(_bad_row(row, *problem))
        else:
            good.setdefault(row.split or _split_of(_concept(row), config), []).append(row)
    files = []
    for split, rows in sorted(good.items()):
        file = f"split={split}/shard-{index:05d}.parquet"
        data = _parquet(_table(rows, config.source.kind), config.row_group_rows)
        storage.write_bytes(storage.join(uri, file), data)
        ids = [_hash(row.id) for row in rows]
        entry = {"split": split, "file": file, "rows": len(rows), "sha256": storage.sha256_bytes(data)}
        files.append({**entry, "ids": np.array(ids, dtype=np.uint64).tobytes()})
    if bad:
        _write_quarantine(uri, f"shard-{index:05d}", bad)
    return {"index": index, "files": files, "rows": sum(map(len, good.values())), "reasons": _count(bad)}


def _judge(row: RawRow, config: CorpusConfig) -> tuple[str, str] | None:
    """Why a row is not acceptable, as (reason, sentence); None if it is."""
    if not row.id:
        return "missing_id", "the row has no id"
    if not isinstance(row.text, str) or not row.text.strip():
        return "empty_text", "the text is empty"
    if len(row.text) > config.max_text_chars:
        return "long_text", f"the text has {len(row.text):,} characters, over {config.max_text_chars:,}"
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
        bad = [{"source": entry["file"], "id": i, "reason": "duplicate_id", "what": text} for i in dropped]
        _write_quarantine(uri, f"duplicates-{report['index']:05d}-{entry['split']}", bad)
        data = _parquet(table.filter(pa.array(kept)), group_rows)
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
        "concept": [_concept(row) for row in rows],
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


def _concept(row: RawRow) -> str:
    # Stripped: "cat" and "cat " on two sides of the split would leak the one into the other.
    return row.concept.strip() or str(row.text).strip()


def _parquet(table: pa.Table, row_group_rows: int) -> bytes:
    sink = pa.BufferOutputStream()
    # Images are compressed already; page checksums make a flipped bit an error instead of a wrong row.
    pq.write_table(table, sink, row_group_size=row_group_rows, compression="zstd", write_page_checksum=True)
    return bytes(sink.getvalue())


def _write_quarantine(uri: str, name: str, bad: list[dict[str, str]]) -> None:
    table = pa.Table.from_pylist(bad, schema=QUARANTINE_SCHEMA)
    storage.write_bytes(storage.join(uri, QUARANTINE, f"{name}.parquet"), _parquet(table, 1 << 16))


def _bad_row(row: RawRow, reason: str, what: str) -> dict[str, str]:
    return {"source": row.source, "id": row.id, "reason": reason, "what": what}


def _count(bad: list[dict[str, str]]) -> dict[str, int]:
    return dict(Counter(row["reason"] for row in bad))


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _split_of(concept: str, config: CorpusConfig) -> str:
    return split_by_concept(concept, config.seed, config.test_fraction, config.val_fraction)
