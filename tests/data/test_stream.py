"""The stream on a real cluster: the same batches for any number of workers, after any kill, in bounded memory."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import ray

from rayemb.data import Corpus, CorpusError, StreamSettings, open_members, open_stream
from rayemb.data.attributes import Attributes, write_attributes
from rayemb.data.augment import AugmentConfig
from rayemb.data.decode import DecodeSettings
from rayemb.data.mix import CorpusEntry, MixConfig
from rayemb.data.samplers import ClusterStratifiedConfig, ShuffledConfig
from rayemb.data.stream import Calm, LoaderConfig, Stream
from rayemb.models import TextTokenizer, TokenizerConfig
from tests.data.corpora import corrupt, write_corpus
from tests.environment import off_cluster

TOKENIZER = TextTokenizer.train(["text texte текст 0 1 2 3 4 5 6 7 8 9"], TokenizerConfig(vocab_size=600))
STEPS, SIZE = 18, 24
LOADER = LoaderConfig(decoders=2, cpus_per_decoder=0.1, prefetch=3)
Rows = dict[tuple[int, int], bytes]


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Corpus]:
    root = tmp_path_factory.mktemp("stream")
    return {
        "a": write_corpus(root / "a", {"train": [70, 50]}, concepts=60),
        "b": write_corpus(root / "b", {"train": [90]}, concepts=60),
    }


def stream(
    corpora: dict[str, Corpus],
    world: int,
    state: dict[str, Any] | None = None,
    loader: LoaderConfig = LOADER,
    entry: dict[str, Any] | None = None,
    **mix: Any,
) -> Stream:
    entry = {"sampler": ShuffledConfig(window_rows=40), **(entry or {})}
    entries = {name: CorpusEntry(uri=corpus.uri, **entry) for name, corpus in corpora.items()}
    decode = DecodeSettings(TOKENIZER, 8, 3, AugmentConfig(crop=(0.5, 1.0)), cache_bytes=1 << 20)
    settings = StreamSettings(entries, MixConfig(**mix), SIZE, 3, state)
    return open_stream(settings, open_members(entries), decode, loader, world=world)


def rows_of(arrays: dict[str, Any]) -> Rows:
    """Of each row of a batch, all that a model sees of it."""
    return {
        (int(task), int(row)): pixels.tobytes() + tokens[tokens != -1].tobytes() + keys.tobytes()
        for task, row, pixels, tokens, keys in zip(
            *(arrays[name] for name in ("task", "row", "pixels", "tokens", "keys")), strict=True
        )
    }


@ray.remote(num_cpus=0.1, max_retries=0)  # type: ignore[untyped-decorator]
def consume(stream: Stream, rank: int, stop: int, folder: str, die_at: int | None = None) -> None:
    """One worker: writes down what it gets step by step, and the state after it."""
    for batch in stream.batches(rank, stop):
        if batch.step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        seen = rows_of(batch.arrays), batch.rows, batch.state
        (Path(folder) / f"{batch.step:03d}-{rank}.pickle").write_bytes(pickle.dumps(seen))


def run(stream: Stream, folder: Path, first: int = 0, stop: int = STEPS, die_at: int | None = None) -> list[Rows]:
    """The global batches `first .. stop - 1` that all workers together got, and wrote down."""
    workers = [consume.remote(stream, rank, STEPS, str(folder), die_at) for rank in range(stream.world)]
    for worker in workers:
        if die_at is None:
            ray.get(worker)
        else:
            with pytest.raises(ray.exceptions.WorkerCrashedError):
                ray.get(worker)
    batches: list[Rows] = []
    for step in range(first, stop):
        parts = [seen(folder, step, rank) for rank in range(stream.world)]
        sizes = [len(rows) for rows, _, _ in parts]
        assert max(sizes) - min(sizes) <= 2
        together = {key: value for rows, _, _ in parts for key, value in rows.items()}
        assert len(together) == sum(sizes) == parts[0][1]
        batches.append(together)
    return batches


def seen(folder: Path, step: int, rank: int) -> tuple[Rows, int, dict[str, Any]]:
    found: tuple[Rows, int, dict[str, Any]] = pickle.loads((folder / f"{step:03d}-{rank}.pickle").read_bytes())
    return found


MIXED: dict[str, Any] = {"batches": "mixed", "distinct": ["concept"]}


@pytest.fixture(scope="module")
def whole(ray_cluster: str, corpora: dict[str, Corpus], tmp_path_factory: pytest.TempPathFactory) -> list[Rows]:
    return run(stream(corpora, 2, **MIXED), tmp_path_factory.mktemp("whole"))


def test_no_two_ranks_have_a_concept_in_common(whole: list[Rows]) -> None:
    assert len(whole) == STEPS
    for batch in whole:
        concepts = [value[-8:] for value in batch.values()]
        assert len(concepts) == SIZE == len(set(concepts))


@pytest.mark.parametrize(("world", "decoders"), [(1, 3), (3, 1)])
def test_global_batches_do_not_depend_on_workers_and_decoders(
    corpora: dict[str, Corpus], whole: list[Rows], world: int, decoders: int, tmp_path: Path
) -> None:
    loader = LoaderConfig(decoders=decoders, cpus_per_decoder=0.1, prefetch=1, cache_mb=1)
    assert run(stream(corpora, world, loader=loader, **MIXED), tmp_path) == whole


def test_killed_and_resumed_with_two_three_and_one_worker_every_row_comes_once(
    corpora: dict[str, Corpus], whole: list[Rows], tmp_path: Path
) -> None:
    """SIGKILL of a worker at three points; each time another number of workers goes on from the last state."""
    done: list[Rows] = []
    state = None
    for world, die_at in ((2, 5), (3, 9), (1, 14), (2, None)):
        folder = tmp_path / f"{world}-{die_at}"
        folder.mkdir()
        # The state that is kept is older than the kill: those steps are done over.
        kept = STEPS if die_at is None else die_at - 1
        done += run(stream(corpora, world, state, **MIXED), folder, len(done), kept, die_at)
        # Through JSON, as a checkpoint does it.
        state = json.loads(json.dumps(seen(folder, kept - 1, 0)[2]))
        assert state["step"] == kept
    assert done == whole


def children(name: str) -> list[psutil.Process]:
    found = psutil.Process().children(recursive=True)
    return [process for process in found if name in " ".join(process.cmdline())]


@pytest.mark.parametrize("victim", ["DecodeServer", "PlanServer"])
def test_a_killed_decoder_or_planner_costs_time_and_nothing_else(
    corpora: dict[str, Corpus], whole: list[Rows], victim: str
) -> None:
    current = stream(corpora, 1, **MIXED)
    steps = current.batches(0, STEPS)
    found = [rows_of(next(steps).arrays) for _ in range(5)]
    mine = children(f"ray::{victim}")
    assert mine
    for process in mine:
        process.kill()
    found += [rows_of(batch.arrays) for batch in steps]
    assert found == whole


@pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="no such policy on this system")
def test_decoders_that_are_ahead_leave_the_cores_to_the_workers(corpora: dict[str, Corpus], whole: list[Rows]) -> None:
    found = []
    for batch in stream(corpora, 1, **MIXED).batches(0, STEPS):
        found.append(rows_of(batch.arrays))
        time.sleep(0.3)  # the worker's own work: batches are there before they are asked for
        if not batch.last:
            threads = [thread.id for process in children("ray::DecodeServer") for thread in process.threads()]
            policies = {os.sched_getscheduler(thread) for thread in threads}
    assert found == whole
    assert policies == {os.SCHED_OTHER, os.SCHED_IDLE}


def test_a_worker_that_was_held_up_is_not_soon_held_up_again() -> None:
    calm, waits = Calm(), []
    for _ in range(3):
        steps = 0
        while not calm:
            calm.took(0.0)
            steps += 1
        waits.append(steps)
        calm.took(1e9)
        assert not calm
        calm.took(1e9)  # while it is not calm, waiting is nothing new
    assert waits == [8, 16, 32]


def test_bad_rows_leave_holes_and_are_told_of(ray_cluster: str, tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", {"train": [100]})
    corrupt(tmp_path / "corpus/split=train/shard-00000.parquet", 3)
    current = stream({"a": corpus}, 1, exhausted="stop")
    batches = list(current.batches(0, 99))
    rows = sorted(row for batch in batches for _, row in rows_of(batch.arrays))
    assert rows == [*range(15), *range(20, 100)]
    bad = [row for batch in batches for row in batch.bad]
    assert len(bad) == 5
    assert all("shard-00000.parquet row group 3" in row.source for row in bad)
    assert [batch.last for batch in batches] == [False] * 4 + [True]


def test_a_sampler_with_a_table_beside_the_corpus(corpora: dict[str, Corpus], tmp_path: Path) -> None:
    corpus = corpora["b"]
    clusters = np.random.default_rng(0).integers(0, 30, 90)
    uri = write_attributes(str(tmp_path / "clusters.parquet"), corpus, "train", [(None, {"cluster": clusters})])
    entry = {"sampler": ClusterStratifiedConfig(clusters=uri)}
    for batch in stream({"b": corpus}, 1, entry=entry).batches(0, 6):
        assert len(set(clusters[batch.arrays["row"]])) == len(batch.arrays["row"]) == SIZE
    with pytest.raises(CorpusError, match="not about split 'train' of this corpus"):
        Attributes(uri, corpora["a"], "train")
    parts = [([f"row-{n}" for n in range(3)], {"cluster": clusters[:3]})]
    for chunks, message in ((parts, "3 values for 90 rows"), (parts * 30, "not for the rows of split 'train'")):
        with pytest.raises(CorpusError, match=message):
            write_attributes(str(tmp_path / "other.parquet"), corpus, "train", chunks)
    assert [path.name for path in tmp_path.iterdir()] == ["clusters.parquet"]


def test_a_corpus_that_is_not_there_is_named() -> None:
    with pytest.raises(CorpusError, match="no corpus here"):
        open_members({"a": CorpusEntry(uri="/nowhere")})
    with pytest.raises(CorpusError, match="no uri") as caught:
        open_members({"a": CorpusEntry()})
    assert caught.value.where == "train.corpora.a.uri"


STREAM_ALL = """
import json, sys
import psutil, ray
from rayemb.cluster import ClusterConfig, connect
from rayemb.data import StreamSettings, open_members, open_stream
from rayemb.data.augment import AugmentConfig
from rayemb.data.decode import DecodeSettings
from rayemb.data.mix import CorpusEntry, MixConfig
from rayemb.data.stream import LoaderConfig
from rayemb.models import TextTokenizer, TokenizerConfig
from ray._private.internal_api import memory_summary

def resident():
    found = [p for p in psutil.Process().children(recursive=True) if "ray::DecodeServer" in " ".join(p.cmdline())]
    # Without what is shared: the object store is mapped into every process.
    return max(p.memory_full_info().uss for p in found)

with connect(ClusterConfig(num_cpus=4, object_store_mb=80)):
    entries = {"a": CorpusEntry(uri=sys.argv[1])}
    tokenizer = TextTokenizer.train(["text"], TokenizerConfig(vocab_size=600))
    settings = StreamSettings(entries, MixConfig(exhausted="stop"), 64, 0)
    decode = DecodeSettings(tokenizer, 224, 0, AugmentConfig(), cache_bytes=1 << 20)
    stream = open_stream(settings, open_members(entries), decode, LoaderConfig(prefetch=3), world=1)
    rows, size, sizes = [], 0, []
    for batch in stream.batches(0, 10_000):
        rows += batch.arrays["row"].tolist()
        size += sum(array.nbytes for array in batch.arrays.values())
        sizes.append(resident())
    spilled = "Spilled" in memory_summary(stats_only=True)
    found = {"rows": sorted(rows), "bytes": size, "sizes": sizes, "spilled": spilled}
    print(json.dumps(found))
"""


@pytest.mark.slow
def test_ten_times_the_object_store_streams_through_a_bounded_memory(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", {"train": [1000] * 6}, group_rows=100)
    # A process of its own, with a cluster of its own: this one is connected to that of the other tests.
    command = [sys.executable, "-c", STREAM_ALL, corpus.uri]
    alone = off_cluster()
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=alone)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["rows"] == list(range(6000))
    assert found["bytes"] > 10 * (80 << 20)
    assert not found["spilled"]
    # Half of it goes by while the allocator settles; what is kept of batches would show in the other half.
    half = len(found["sizes"]) // 2
    assert max(found["sizes"][half:]) < max(found["sizes"][:half]) + (40 << 20)
