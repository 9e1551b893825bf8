"""What an interrupted run leaves beside its table: what counts of it, what is taken in, what is cleared away."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from moto.server import ThreadedMotoServer

from rayemb import storage
from rayemb.data import EmbeddingsError, EmbeddingsTable
from rayemb.data.embeddings import embeddings_schema
from rayemb.data.encode import BadRows, Span
from rayemb.data.ledger import MOST_DEATHS, Ledger, Record, Shard

SCHEMA = embeddings_schema([pa.field("text", pa.string())], 2, "d1", images=False)
PLAIN = SCHEMA.remove_metadata()
SHARDS = [Shard(n, "train", (Span("file", n, n + 1, 4),)) for n in range(3)]
MARK, OTHER = "a" * 64, "b" * 64


@pytest.fixture(params=["file", "s3"])
def table(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Where a table may be written: a folder, and a real S3 server on loopback."""
    if request.param == "file":
        yield str(tmp_path / "t.lance")
        return
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            monkeypatch.setenv(name, "test")
        for name in ("AWS_REGION", "AWS_DEFAULT_REGION"):
            monkeypatch.setenv(name, "us-east-1")
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        boto3.client("s3").create_bucket(Bucket="runs")
        yield "s3://runs/t.lance"
    finally:
        server.stop()


def rows(shard: Shard) -> pa.Table:
    ids = [f"row-{shard.index}-{n}" for n in range(4)]
    vectors = pa.FixedSizeListArray.from_arrays(pa.array([float(shard.index)] * 8, pa.float32()), 2)
    return pa.table({"id": ids, "vector": vectors, "text": ids}, schema=PLAIN)


def finish(ledger: Ledger, shard: Shard, bad: list[BadRows] | None = None) -> Record:
    count, fragments = ledger.write_data(iter([rows(shard)[:3], rows(shard)[3:]]), PLAIN)
    ledger.write_bad(shard, bad or [])
    record = Record(shard.name, count, {"x": len(bad)} if bad else {}, fragments, 1.5)
    ledger.write(record)
    return record


def data_files(table: str) -> set[str]:
    return {uri.rsplit("/", 1)[-1] for uri in storage.list_files(storage.join(table, "data"))}


def test_a_run_goes_on_and_leaves_only_its_table(table: str) -> None:
    killed = Ledger(table, MARK)
    records = [finish(killed, SHARDS[2]), finish(killed, SHARDS[0])]
    assert storage.list_files(storage.join(killed.folder, "writing")) == []
    # Killed after the file was moved in and before the record; and in the middle of a file.
    _, orphan = killed.write_data(iter([rows(SHARDS[1])]), PLAIN)
    storage.write_bytes(storage.join(killed.folder, "writing/x/data/half.lance"), b"half")
    # Another job's shard; and a file of somebody else, whose name says nothing.
    other = finish(Ledger(table, OTHER), SHARDS[1], [BadRows("file", 1, 0, 1, "i", "x", "y")])
    storage.write_bytes(storage.join(table, "data/foreign.lance"), b"foreign")
    with pytest.raises(EmbeddingsError, match="no such embeddings table"):
        EmbeddingsTable.open(table)

    ledger = Ledger(table, MARK)
    found = ledger.read(SHARDS)
    assert found == {record.shard: record for record in records}
    bad = [BadRows("file", 1, n, 1, None, "x", "y") for n in (11, 2)]
    found[SHARDS[1].name] = finish(ledger, SHARDS[1], bad)
    in_order = [found[shard.name] for shard in SHARDS]
    assert ledger.missing(in_order) == []
    ledger.commit(in_order, SCHEMA)
    ledger.tidy()

    made = EmbeddingsTable.open(table)
    assert made.columns(0, 12, ["id"])["id"].to_pylist() == [f"row-{s}-{n}" for s in range(3) for n in range(4)]
    assert made.vectors(0, 12)[:, 0].tolist() == [0.0] * 4 + [1.0] * 4 + [2.0] * 4
    committed = {name for record in in_order for name in record.files}
    assert data_files(table) == committed | {"foreign.lance"}
    assert not committed & {*(file["path"] for file in orphan[0]["files"]), *other.files}
    assert not storage.list_files(ledger.parts)
    (kept,) = storage.list_files(ledger.quarantine)
    assert storage.join(ledger.quarantine, MARK[:16]) in kept
    fs, path = storage.filesystem(kept)
    assert pq.read_table(path, filesystem=fs).select(["row", "rows", "split", "reason"]).to_pylist() == [
        {"row": 2, "rows": 1, "split": "train", "reason": "x"},
        {"row": 11, "rows": 1, "split": "train", "reason": "x"},
    ]


def test_what_a_version_holds_is_never_removed(tmp_path: Path) -> None:
    table = str(tmp_path / "t.lance")
    first = Ledger(table, MARK)
    old = [finish(first, shard) for shard in SHARDS[:2]]
    first.commit(old, SCHEMA)  # and killed before it could tidy
    second = Ledger(table, OTHER)
    new = [finish(second, SHARDS[2])]
    second.commit(new, SCHEMA)
    second.tidy()
    assert data_files(table) == {name for record in [*old, *new] for name in record.files}
    assert EmbeddingsTable.open(table).rows == 4
    assert EmbeddingsTable.open(table, 1).vectors(0, 8)[:, 0].tolist() == [0.0] * 4 + [1.0] * 4
    # The first job comes back: its shards are new ones, and those of its old version stay.
    again = Ledger(table, MARK)
    assert again.read(SHARDS) == {}
    newest = [finish(again, SHARDS[0])]
    again.commit(newest, SCHEMA)
    again.write_data(iter([rows(SHARDS[1])]), PLAIN)
    again.tidy()
    assert data_files(table) == {name for record in [*old, *new, *newest] for name in record.files}


@pytest.mark.parametrize("damage", ["gone", "short"])
def test_a_record_without_its_whole_file_does_not_count(tmp_path: Path, damage: str) -> None:
    ledger = Ledger(str(tmp_path / "t.lance"), MARK)
    records = [finish(ledger, shard) for shard in SHARDS]
    (name,) = records[1].files
    file = tmp_path / "t.lance/data" / name
    if damage == "gone":
        file.unlink()
    else:
        os.truncate(file, 30)
    assert list(ledger.read(SHARDS)) == [SHARDS[0].name, SHARDS[2].name]
    assert ledger.missing(records) == [name]


def test_a_record_is_of_the_very_row_groups(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "t.lance"), MARK)
    finish(ledger, SHARDS[0])
    assert ledger.read([SHARDS[0]])
    assert Shard.from_json(SHARDS[0].to_json()) == SHARDS[0]
    assert not ledger.read([Shard(0, "train", (Span("file", 0, 2, 4),))])
    assert not ledger.read([Shard(0, "val", SHARDS[0].spans)])


def test_a_shard_without_a_good_row_has_no_file(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "t.lance"), MARK)
    assert ledger.write_data(iter(()), PLAIN) == (0, [])
    assert not (tmp_path / "t.lance").exists()


def test_an_error_among_the_rows_comes_out_as_itself(tmp_path: Path) -> None:
    def tables() -> Iterator[Any]:
        yield rows(SHARDS[0])
        raise EmbeddingsError("something of ours")

    with pytest.raises(EmbeddingsError, match="something of ours"):
        Ledger(str(tmp_path / "t.lance"), MARK).write_data(tables(), PLAIN)
    assert not (tmp_path / "t.lance").exists()


def test_a_shard_that_kills_its_encoders_is_named(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path / "t.lance"), MARK)
    for _ in range(MOST_DEATHS):
        ledger.begin(SHARDS[0], "run")
    ledger.begin(SHARDS[1], "run")
    ledger.begin(SHARDS[0], "another run")
    with pytest.raises(EmbeddingsError, match="4 encoders died while they worked on it") as caught:
        ledger.begin(SHARDS[0], "run")
    assert caught.value.where == "file"
