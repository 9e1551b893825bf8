"""Building an index goes on after a SIGKILL of its driver, and writes no shard twice that was finished."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from rayemb.index import Index, IndexArtefactError, IndexConfig, build_index, load_manifest
from tests.index.tables import random_vectors, write_table

ROWS, SHARDS = 24_000, 12
# A graph takes a worker some tenths of a second a shard: the kill finds shards that are not done.
CONFIG = IndexConfig(factory="HNSW16", by="hash", shards=SHARDS, recall_queries=0)

DRIVER = """
import os, signal, sys
from rayemb.cluster import connect
from rayemb.index import IndexConfig, build_index

table, index, config = sys.argv[1:]

def progress(line):
    if line.startswith("shard-"):
        os.kill(os.getpid(), signal.SIGKILL)

with connect():
    build_index(table, index, IndexConfig.model_validate_json(config), progress=progress)
"""


def test_a_killed_build_goes_on_with_the_shards_that_are_missing(ray_cluster: str, tmp_path: Path) -> None:
    vectors = random_vectors(ROWS, 32)
    table, uri = write_table(tmp_path / "e", vectors), str(tmp_path / "i")
    command = [sys.executable, "-c", DRIVER, table, uri, CONFIG.model_dump_json()]
    ended = subprocess.run(command, capture_output=True, timeout=200, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()[-2000:]
    with pytest.raises(IndexArtefactError, match="there is no index here"):
        load_manifest(uri)

    def finished() -> dict[str, int]:
        records = Path(uri).glob("v-*/ledger/shard-*.json")
        files = [json.loads(record.read_text())["shard"]["file"] for record in records]
        return {file: os.stat(f"{uri}/{file}").st_ino for file in files}

    # The tasks die with their driver, in the middle of a shard; until they do, they finish what they have.
    assert not psutil.wait_procs(builders(), timeout=60)[1]
    kept = finished()
    assert 1 <= len(kept) < SHARDS
    lines: list[str] = []
    manifest = build_index(table, uri, CONFIG, progress=lines.append)
    assert f"{len(kept)} of {SHARDS} shards are there from an earlier run" in lines
    assert len([line for line in lines if line.startswith("shard-")]) == SHARDS - len(kept)
    assert {file: os.stat(f"{uri}/{file}").st_ino for file in kept} == kept
    whole = build_index(table, str(tmp_path / "whole"), CONFIG)
    assert [shard.sha256 for shard in manifest.shards] == [shard.sha256 for shard in whole.shards]
    # Nothing is left of what was being written.
    named = {"manifest.json", manifest.trained.file}
    named |= {shard.file for shard in manifest.shards} | {shard.keys.file for shard in manifest.shards if shard.keys}
    there = {str(path.relative_to(uri)) for path in Path(uri).rglob("*") if path.is_file()}
    assert named == there
    with Index.open(uri) as index:
        assert index.search(vectors[:200], 1).keys[:, 0].tolist() == list(range(200))


def builders() -> list[psutil.Process]:
    """The workers of this session's cluster that build a shard."""
    below = psutil.Process().children(recursive=True)
    return [each for each in below if "build_shard" in title(each)]


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
