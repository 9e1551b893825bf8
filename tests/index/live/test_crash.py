"""Writers that are killed at any moment, and a store that goes away: what was acknowledged is there.

`RAYEMB_KILLS=50` kills as many writers; by default a few.
"""

import contextlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayemb.index import Index, IndexConfig
from rayemb.index.live.log import log_uri
from rayemb.storage import StorageError
from tests.index.tables import build_here, exact_vectors, write_table

ROWS, WRITERS = 30, 2
VECTORS = exact_vectors(500, seed=7)
KILLS = int(os.environ.get("RAYEMB_KILLS", "4"))

WRITER = """
import sys
from rayemb.index import Index
from tests.index.live.test_crash import VECTORS, operations

uri, writer = sys.argv[1:]
with Index.open(uri, live=True) as index:
    print("ready", flush=True)
    for number, (ids, at) in enumerate(operations(writer)):
        if at is None:
            index.delete(ids)
        else:
            index.upsert(ids, VECTORS[at : at + len(ids)], [{"number": number}] * len(ids))
        print(number, flush=True)
"""


def operations(writer: str) -> Iterator[tuple[list[str], int | None]]:
    """What a writer does, without end: ids of its own, and where their vectors begin; None deletes them."""
    rng = random.Random(writer)
    while True:
        ids = [f"{writer}-{rng.randrange(40)}" for _ in range(rng.randrange(1, 6))]
        ids = list(dict.fromkeys(ids))
        yield ids, None if rng.random() < 0.25 else rng.randrange(400)


def after(writer: str, count: int) -> dict[str, tuple[int, list[float]]]:
    """What is there of a writer after its first `count` operations."""
    rows: dict[str, tuple[int, list[float]]] = {}
    for number, (ids, at) in zip(range(count), operations(writer), strict=False):
        for i, row_id in enumerate(ids):
            rows.pop(row_id, None)
            if at is not None:
                rows[row_id] = number, VECTORS[at + i].tolist()
    return rows


def there(index: Index, writer: str) -> dict[str, tuple[int, list[float]]]:
    keys = {row_id: index.key(row_id) for row_id in (f"{writer}-{i}" for i in range(40))}
    found = {row_id: key for row_id, key in keys.items() if key is not None}
    rows = index.payload(list(found.values()))
    vectors = index.vectors(list(found.values()))
    return {row["id"]: (row["number"], vector.tolist()) for row, vector in zip(rows, vectors, strict=True)}


def test_nothing_acknowledged_is_lost_when_writers_are_killed(tmp_path: Path) -> None:
    uri = str(tmp_path / "i")
    table = write_table(tmp_path / "e", VECTORS[:ROWS], {"number": list(range(ROWS))})
    build_here(table, uri, IndexConfig(factory="Flat"))
    rng, done = random.Random(0), dict[str, int]()
    for turn in range(0, KILLS, WRITERS):
        names = [f"writer-{number}" for number in range(turn, min(turn + WRITERS, KILLS))]
        writers = [started(uri, name) for name in names]
        for name, writer in zip(names, writers, strict=True):
            done[name] = killed(writer, rng)
        with Index.open(uri, live=True) as index:
            for name, count in done.items():
                # The write that was under way is there as a whole or not at all.
                assert there(index, name) in (after(name, count), after(name, count + 1))
            index.upsert(["next"], VECTORS[:1])  # the log can be written on
            index.delete(["next"])
            assert index.rows == ROWS + sum(len(there(index, name)) for name in done)
    assert sum(done.values()) > KILLS


def started(uri: str, name: str) -> subprocess.Popen[bytes]:
    folder = Path(__file__).parents[3]
    return subprocess.Popen([sys.executable, "-c", WRITER, uri, name], stdout=subprocess.PIPE, cwd=folder)


def killed(writer: subprocess.Popen[bytes], rng: random.Random) -> int:
    """Kills a writer at some moment of some write; how many were acknowledged."""
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"ready\n"
    count = rng.randrange(1, 25)
    for _ in range(count):
        assert writer.stdout.readline()
    with contextlib.suppress(subprocess.TimeoutExpired):
        writer.wait(rng.random() * 0.02)  # a write takes a few ms
    writer.kill()
    count += writer.stdout.read().count(b"\n")
    assert writer.wait() == -signal.SIGKILL
    return count


def test_a_store_that_went_away_takes_no_writes_and_searches_go_on(tmp_path: Path) -> None:
    uri, table = str(tmp_path / "i"), tmp_path / "e"
    build_here(write_table(table, VECTORS[:ROWS]), uri, IndexConfig(factory="Flat"))
    log = Path(log_uri(str(table)))
    with Index.open(uri, live=True) as index:
        index.upsert(["a"], VECTORS[100:101])
        before = index.search(VECTORS[:5], ROWS).keys.tolist()
        log.rename(tmp_path / "away")
        for write in (lambda: index.upsert(["b"], VECTORS[101:102]), lambda: index.delete(["a"]), index.refresh):
            with pytest.raises(StorageError, match=r"e\.updates\.lance: cannot"):
                write()
        assert not log.exists()
        assert index.search(VECTORS[:5], ROWS).keys.tolist() == before
        (tmp_path / "away").rename(log)
        assert index.upsert(["b"], VECTORS[101:102]) == 2
        assert index.rows == ROWS + 2
