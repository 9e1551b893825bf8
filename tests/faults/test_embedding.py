"""Embedding goes on after a SIGKILL of its driver or of an encoder, and does nothing twice that was finished."""

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from rayemb.data import EmbedConfig, EmbeddingsTable, embed_corpus
from tests.data.corpora import write_corpus
from tests.models.tiny import tiny_model

GROUP, GROUPS = 5, 20
ROWS = GROUP * GROUPS
CONFIG = EmbedConfig(batch_size=4, workers=2, cpus_per_worker=0.5, rows_per_file=GROUP)

DRIVER = """
import os, signal, sys
from rayemb.cluster import connect
from rayemb.data import EmbedConfig, embed_corpus

corpus, model, table, config = sys.argv[1:]
calls = []

def progress(done, total, text):
    calls.append(done)
    if len(calls) == 4:
        os.kill(os.getpid(), signal.SIGKILL)

with connect():
    embed_corpus(corpus, model, table, EmbedConfig.model_validate_json(config), progress=progress)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus whose shards take an encoder a while each: large pictures, small files."""
    root = tmp_path_factory.mktemp("faults")
    write_corpus(root / "corpus", {"train": [ROWS]}, group_rows=GROUP)
    shard = root / "corpus/split=train/shard-00000.parquet"
    table = pq.read_table(shard)
    images = pa.array([picture(number) for number in range(ROWS)], pa.binary())
    table = table.set_column(table.schema.get_field_index("image"), table.schema.field("image"), images)
    pq.write_table(table, shard, row_group_size=GROUP, write_page_checksum=True)
    tiny_model().save(str(root / "model"))
    return root


def picture(number: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (1600, 1600), (number, 255 - number, 99)).save(out, "PNG", compress_level=1)
    return out.getvalue()


def arguments(place: Path, table: Path) -> list[str]:
    return [str(place / "corpus"), str(place / "model"), str(table)]


@pytest.fixture(scope="module")
def whole(place: Path, ray_cluster: str) -> EmbeddingsTable:
    """What a run gives that nothing happens to."""
    return embed_corpus(*arguments(place, place / "whole.lance"), CONFIG).table


def assert_same(table: EmbeddingsTable, whole: EmbeddingsTable) -> None:
    names = ["id", "image", "text", "concept", "split"]
    assert table.columns(0, ROWS, names) == whole.columns(0, ROWS, names)
    assert np.array_equal(table.vectors(0, ROWS), whole.vectors(0, ROWS))


def data_files(table: EmbeddingsTable) -> set[str]:
    return {file.path for fragment in table.dataset.get_fragments() for file in fragment.data_files()}


def test_a_killed_driver_loses_no_finished_shard(place: Path, whole: EmbeddingsTable, tmp_path: Path) -> None:
    uris = arguments(place, tmp_path / "t.lance")
    # In the session's cluster, which the environment names: it outlives its driver. One encoder: so much is left to do.
    one = CONFIG.model_copy(update={"workers": 1}).model_dump_json()
    command = [sys.executable, "-c", DRIVER, *uris, one]
    ended = subprocess.run(command, capture_output=True, timeout=200, check=False)
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()[-2000:]
    with pytest.raises(ValueError, match="no such embeddings table"):
        EmbeddingsTable.open(uris[2])
    # Its encoders die with it, in the middle of a shard; until they do, they finish what they have.
    assert not psutil.wait_procs(encoders(), timeout=60)[1]
    kept = {path.stem: path.read_bytes() for path in (tmp_path / "t.lance.parts").glob("*/*.json")}
    assert 4 <= len(kept) < GROUPS
    files = {path.name for path in (tmp_path / "t.lance/data").iterdir()}

    seen: list[tuple[int, str]] = []
    made = embed_corpus(*uris, CONFIG, progress=lambda done, total, text: seen.append((done, text)))
    assert (made.resumed_shards, made.shards) == (len(kept), GROUPS - len(kept))
    assert (made.resumed_rows, made.rows) == (len(kept) * GROUP, ROWS - len(kept) * GROUP)
    assert made.rows_per_second == pytest.approx(made.rows / made.seconds)
    assert seen[0] == (len(kept) * GROUP, f"{len(kept) * GROUP} vectors from an earlier run")
    assert len(seen) == 1 + made.shards
    assert_same(made.table, whole)
    # The finished shards' files are in the table as they were, and nothing else is left of either run.
    recorded = {name for name in files if any(name.encode() in record for record in kept.values())}
    assert len(recorded) == len(kept)
    assert recorded < data_files(made.table)
    assert {path.name for path in (tmp_path / "t.lance/data").iterdir()} == data_files(made.table)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["t.lance"]


def test_a_killed_encoder_is_replaced(place: Path, whole: EmbeddingsTable, tmp_path: Path) -> None:
    killed: list[int] = []

    def progress(done: int, total: int, text: str) -> None:
        if not killed:
            process = encoders()[0]
            killed.append(process.pid)
            os.kill(process.pid, signal.SIGKILL)

    made = embed_corpus(*arguments(place, tmp_path / "t.lance"), CONFIG, progress=progress)
    assert killed
    assert (made.rows, made.shards, made.resumed_shards) == (ROWS, GROUPS, 0)
    assert_same(made.table, whole)
    assert {path.name for path in (tmp_path / "t.lance/data").iterdir()} == data_files(made.table)


def encoders() -> list[psutil.Process]:
    """The encoders of this session's cluster: descendants of this process, so that no other cluster's are meant."""
    below = psutil.Process().children(recursive=True)
    return [each for each in below if "ShardEncoder" in title(each)]


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
