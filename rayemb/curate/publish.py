"""The curated corpus: shards without the dropped rows and with the edits, and the side table of what was dropped."""

import datetime
import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data

from rayemb import storage
from rayemb.curate.base import Rows, Shard, apply_edits, is_alive
from rayemb.curate.state import State
from rayemb.data import Corpus, CorpusError
from rayemb.data.corpus import FORMAT, SCHEMA, RowGroup, parquet_bytes, read_row_group

DROPPED = "_dropped"  # readers of Parquet folders skip names with a leading underscore
DROPPED_SCHEMA = pa.schema(
    [
        ("split", pa.string()),
        ("row", pa.int64()),  # ordinal in the corpus that was curated
        ("id", pa.string()),
        ("step", pa.string()),
        ("reason", pa.string()),
        ("what", pa.string()),
        ("score", pa.float32()),
        ("partner", pa.string()),  # id of the row that it repeats
        ("partner_corpus", pa.string()),
    ]
)


def publish_shards(state: State, steps: list[tuple[str, str, dict[str, Any]]], uri: str) -> Iterator[dict[str, Any]]:
    """Writes every shard that still has rows, and `_dropped/`; gives an entry for each, in any order.

    `steps` are (label, folder, record). A shard with nothing dropped and nothing edited is copied byte by byte. One
    task a shard, which it holds in memory; no shuffle.
    """
    parts: dict[str, list[tuple[str, str]]] = {}
    for label, folder, record in steps:
        for part in record["parts"]:
            if part["dropped"]:
                parts.setdefault(part["shard"], []).append((label, storage.join(folder, part["file"])))
    corpus, alive = state.corpus, ray.put(state.alive)

    def write(batch: dict[str, Any]) -> dict[str, list[Any]]:
        (task,) = (json.loads(str(text)) for text in batch["task"])
        shard = Shard(**task["shard"])
        keep = is_alive(ray.get(alive), shard.first, shard.rows)
        if task["dropped"]:
            table = _dropped(corpus, shard, task["dropped"])
            storage.write_bytes(storage.join(uri, DROPPED, shard.file), parquet_bytes(table, len(table)))
        data, rows = _shard(corpus, shard, keep, task["edits"])
        if rows:
            storage.write_bytes(storage.join(uri, shard.file), data)
        return {"entry": [{"first": shard.first, "rows": rows, "sha256": storage.sha256_bytes(data)}]}

    tasks = [
        {
            "task": json.dumps(
                {
                    "shard": vars(shard),
                    "dropped": parts.get(shard.file, []),
                    "edits": state.edited.parts.get(shard.file, []),
                }
            )
        }
        for shard in state.shards
    ]
    dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks)).map_batches(write, batch_size=1)
    by_first = {shard.first: shard for shard in state.shards if shard.rows}
    for row in dataset.iter_rows():
        entry = row["entry"]
        if entry["rows"]:
            shard = by_first[entry["first"]]
            yield {"split": shard.split, "file": shard.file, "rows": entry["rows"], "sha256": entry["sha256"]}


def manifest_of(state: State, entries: list[dict[str, Any]], fingerprint: str, curation: dict[str, Any]) -> Any:
    """The manifest of the curated corpus; its digest depends on its rows alone."""
    place = {shard.file: number for number, shard in enumerate(state.shards)}
    splits: dict[str, dict[str, Any]] = {}
    for entry in sorted(entries, key=lambda entry: place[entry["file"]]):
        split = splits.setdefault(entry["split"], {"rows": 0, "files": []})
        split["rows"] += entry["rows"]
        split["files"].append({key: entry[key] for key in ("file", "rows", "sha256")})
    sums = [entry["sha256"] for name in sorted(splits) for entry in splits[name]["files"]]
    source = state.corpus.manifest
    return {
        "format": FORMAT,
        "kind": state.corpus.kind,
        "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "digest": storage.sha256_bytes("".join(sums).encode()),
        "fingerprint": fingerprint,
        "rows": sum(split["rows"] for split in splits.values()),
        "splits": splits,
        "quarantine": source.get("quarantine", {"rows": 0, "reasons": {}}),
        "config": source.get("config", {}),
        "curation": curation,
    }


def _shard(corpus: Corpus, shard: Shard, keep: Any, edits: list[str]) -> tuple[bytes, int]:
    """The shard's new content and how many rows it has."""
    file = storage.join(corpus.uri, shard.file)
    if keep.all() and not edits:
        data = storage.read_bytes(file)
        if storage.sha256_bytes(data) != shard.sha256:
            raise CorpusError("the checksum of the shard differs", where=file, fix="build the corpus again")
        return data, shard.rows
    if not keep.any():
        return b"", 0
    fs, path = storage.filesystem(file)
    metadata = pq.ParquetFile(path, filesystem=fs).metadata
    sizes = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
    changes = [_part(part) for part in edits]
    tables, first = [], shard.first
    for index, rows in enumerate(sizes):
        ordinals = first + np.arange(rows)
        alive = keep[first - shard.first :][:rows]
        first += rows
        if alive.any():
            table = read_row_group(RowGroup(file, index, rows), SCHEMA.names)
            for change in changes:
                table = apply_edits(table, ordinals, change, corpus.kind)
            tables.append(table.filter(pa.array(alive)))
    table = pa.concat_tables(tables).cast(SCHEMA)
    return parquet_bytes(table, max(sizes)), len(table)


def _dropped(corpus: Corpus, shard: Shard, parts: list[tuple[str, str]]) -> pa.Table:
    tables = []
    for label, file in parts:
        table = _part(file)
        table = table.filter(table["drop"])
        tables.append(table.append_column("step", pa.array([label] * len(table))))
    table = pa.concat_tables(tables).sort_by("row")
    rows = Rows.of(corpus)
    ids = rows.take(table["row"].to_pylist(), ["id"])
    return (
        pa.table(
            {
                **{name: table[name] for name in DROPPED_SCHEMA.names if name in table.column_names},
                "split": [shard.split] * len(table),
                "id": [ids[row]["id"] for row in table["row"].to_pylist()],
                "partner": partner_ids(rows, table["partner"].to_pylist(), table["partner_corpus"].to_pylist()),
            }
        )
        .select(DROPPED_SCHEMA.names)
        .cast(DROPPED_SCHEMA)
    )


def partner_ids(rows: Rows, partners: list[int | None], corpora: list[str | None]) -> list[str | None]:
    """The ids of partners, read from the corpora they are in."""
    wanted: dict[str | None, set[int]] = {}
    for partner, corpus in zip(partners, corpora, strict=True):
        if partner is not None:
            wanted.setdefault(corpus, set()).add(partner)
    found = {
        uri: (rows if uri is None else Rows.of(Corpus.open(uri))).take(ordinals, ["id"])
        for uri, ordinals in wanted.items()
    }
    return [
        None if partner is None else found[corpus][partner]["id"]
        for partner, corpus in zip(partners, corpora, strict=True)
    ]


def _part(file: str) -> pa.Table:
    return pq.read_table(io.BytesIO(storage.read_bytes(file)), page_checksum_verification=True)
