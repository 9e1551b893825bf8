"""Training goes on after a SIGKILL and sees each remaining row once; too small a cluster is said at once."""

import contextlib
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest
import ray
import ray.train
import torch
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from rayemb.cluster import ClusterError
from rayemb.config import load
from rayemb.data import CorpusConfig, build_corpus
from rayemb.data.sources import DemoSource
from rayemb.models import Model
from rayemb.parallel import exchange_named
from rayemb.train import TrainConfig, TrainError, train

QUICK = [
    "steps=30",
    "batch_size=32",
    "logging.every=1",
    "checkpoints.every=5",
    "evaluation.tasks={}",
    "model.image.image_size=16",
    "model.image.widths=[8, 16]",
    "model.image.depths=[1, 1]",
    "model.text.width=16",
    "model.text.depth=1",
    "model.tokenizer.vocab_size=600",
]


# Dropout, a loss with a state of its own, micro-batches of unequal size, the exchange with the most moving parts.
EVERYTHING = [
    "model.text.dropout=0.1",
    "zero_stage=2",
    "exchange=ring",
    "tile=[5, 7]",
    "micro_batch_size=5",
    "loss={name: cross_batch_memory, size: 100, loss: {name: infonce}}",
]


@pytest.fixture(scope="module")
def corpus(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    source = DemoSource(limit=800, rows_per_unit=256, image_size=32)
    return build_corpus(CorpusConfig(source=source), str(tmp_path_factory.mktemp("corpus") / "corpus")).uri


def run(corpus: str, folder: Path, *overrides: str) -> Model:
    config = load(TrainConfig, None, [*QUICK, *overrides])
    return train(config, corpus, str(folder / "model"), str(folder / "runs"))


def workers() -> list[psutil.Process]:
    """Of this process's own cluster: other runs of the machine are left alone."""
    found = psutil.Process().children(recursive=True)
    return [process for process in found if "RayTrainWorker" in " ".join(_command(process))]


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def positions(folder: Path) -> list[Path]:
    return sorted((folder / "runs").glob("train-*/checkpoints/*/position.json"))


def disturb(folder: Path, how: Callable[[psutil.Process], None]) -> threading.Thread:
    """Does it to one worker once there are two checkpoints."""

    def wait() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            if len(positions(folder)) >= 2 and (found := workers()):
                how(found[-1])
                return
            time.sleep(0.1)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@pytest.fixture(scope="module")
def whole(corpus: str, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of the run that nothing happens to."""
    model = run(corpus, tmp_path_factory.mktemp("whole"), *EVERYTHING)
    return [row["loss"] for row in model.info["training"]]


def same(model: Model, whole: list[float]) -> None:
    assert [row["step"] for row in model.info["training"]] == list(range(1, 31))
    # Single-threaded workers on a CPU: the same numbers to the last bit, whatever happened in between.
    assert [row["loss"] for row in model.info["training"]] == whole


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "said"),
    [
        # As the kernel does where memory runs out, too.
        (psutil.Process.kill, "rank [01] of the workers: "),
        (psutil.Process.suspend, r"no step has ended for \d+ s: rank [01] \(process \d+ .* has given no sign of life"),
    ],
    ids=["killed", "stopped"],
)
def test_what_happens_to_a_worker_changes_nothing_of_the_result(
    corpus: str,
    whole: list[float],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    how: Callable[[psutil.Process], None],
    said: str,
) -> None:
    thread = disturb(tmp_path, how)
    model = run(corpus, tmp_path, *EVERYTHING, "stall_seconds=30", "max_failures=5")
    thread.join()
    same(model, whole)
    assert re.search(said, caplog.text)
    assert "going on from the last checkpoint" in caplog.text


DRIVER = """
import sys
from pathlib import Path
from rayemb.cluster import ClusterConfig, connect
from tests.faults.test_training import EVERYTHING, run

with connect(ClusterConfig(address=sys.argv[1])):
    run(sys.argv[2], Path(sys.argv[3]), *EVERYTHING)
"""


@pytest.mark.slow
def test_a_killed_driver_goes_on_when_it_is_run_again(
    ray_cluster: str, corpus: str, whole: list[float], tmp_path: Path
) -> None:
    driver = subprocess.Popen([sys.executable, "-c", DRIVER, ray_cluster, corpus, str(tmp_path)])
    try:
        deadline = time.monotonic() + 120
        while len(positions(tmp_path)) < 2:
            assert driver.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
    finally:
        driver.kill()
        driver.wait()
    # An upload that was under way: files, and nothing that says that they are all there.
    half = positions(tmp_path)[-1].parent.parent / "step-000000029-half"
    (half / "step-29").mkdir(parents=True)
    (half / "step-29/mp_rank_00_model_states.pt").write_bytes(b"half of it")
    model = run(corpus, tmp_path, *EVERYTHING)
    same(model, whole)
    assert not half.exists()


def test_more_memory_than_there_is_ends_the_run_with_the_rank_and_what_to_do(corpus: str, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"out of memory: rank [01] of the workers: .*allocate memory") as caught:
        run(corpus, tmp_path, "loss={name: cross_batch_memory, size: 10000000000000, loss: {}}", "max_failures=0")
    assert "train.micro_batch_size" in caught.value.fix


def test_more_workers_than_cpus_is_an_error_and_no_wait(corpus: str, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="needs 12 CPUs and the cluster has 4"):
        run(corpus, tmp_path, "workers=8")


def test_a_batch_larger_than_the_split_is_refused(corpus: str, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="fewer than one batch") as caught:
        run(corpus, tmp_path, "batch_size=100000")
    assert caught.value.where == "train.batch_size"


def test_vectors_that_are_not_finite_end_the_run_and_name_the_rank(corpus: str, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"row \d+ is not finite") as caught:
        run(corpus, tmp_path, "optimizer.learning_rate=1e30", "schedule.warmup_steps=0")
    assert "rank 0 of 2" in str(caught.value)
    (report,) = (tmp_path / "runs").glob("train-*/not-finite-step-*.json")
    found = json.loads(report.read_text())
    assert str(report) in caught.value.what
    assert found["rows_not_finite"] == 32
    assert len(found["batch"]) == 32
    first = found["rows"][0]
    table = pq.ParquetFile(first["file"]).read_row_group(first["row_group"], columns=["id"])
    assert first["id"] == table.column("id")[first["row_of_group"]].as_py()
    assert f"main row {first['row']} ({first['id']})" in caught.value.what
    # The checkpoint of the step before is there to go on from, and no attempt was wasted on trying again.
    assert "training failed 2 times" not in str(caught.value)


def one_rank_raises() -> None:
    exchange = exchange_named("ring")
    if ray.train.get_context().get_world_rank() == 1:
        raise RuntimeError("rank 1 ran into a wall")
    exchange.everyone(torch.zeros(2, 3))  # rank 0 waits for it here


def test_one_rank_that_raises_brings_the_others_down_with_its_message(ray_cluster: str, tmp_path: Path) -> None:
    trainer = TorchTrainer(
        one_rank_raises,
        torch_config=TorchConfig(backend="gloo", timeout_s=600),
        scaling_config=ScalingConfig(num_workers=2),
        run_config=RunConfig(storage_path=str(tmp_path)),
    )
    started = time.monotonic()
    with pytest.raises(ray.train.TrainingFailedError, match="rank 1 ran into a wall"):
        trainer.fit()
    assert time.monotonic() - started < 120  # start-up included; left alone, rank 0 would wait for 600 s


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", folder], check=False).returncode:
        pytest.skip("mounting a file system needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.slow
def test_a_full_disk_is_survived_until_the_third_checkpoint_and_the_run_goes_on_where_there_is_room(
    corpus: str, whole: list[float], small_disk: Path
) -> None:
    def fill() -> None:
        while not positions(small_disk):
            time.sleep(0.05)
        with (small_disk / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 12))

    thread = threading.Thread(target=fill, daemon=True)
    thread.start()
    config = load(TrainConfig, None, [*QUICK, *EVERYTHING])
    model_uri, runs_uri = str(small_disk.parent / "model"), str(small_disk / "runs")
    with pytest.raises(TrainError, match=r"3 checkpoints in a row could not be written.*No space left") as caught:
        train(config, corpus, model_uri, runs_uri)
    thread.join()
    assert "make room" in caught.value.fix
    (kept,) = positions(small_disk)
    assert json.loads(kept.read_text())["step"] == 5
    (small_disk / "filler").unlink()
    same(train(config, corpus, model_uri, runs_uri), whole)
