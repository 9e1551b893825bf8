"""Training goes on after a SIGKILL and sees each remaining row once; too small a cluster is said at once."""

import os
import signal
import threading
import time
from pathlib import Path

import psutil
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
    "log_every=1",
    "checkpoint_every=5",
    "val_split=null",
    "model.image.image_size=16",
    "model.image.widths=[8, 16]",
    "model.image.depths=[1, 1]",
    "model.text.width=16",
    "model.text.depth=1",
    "model.tokenizer.vocab_size=600",
]


# A loss with a state of its own, micro-batches of unequal size, and the exchange with the most moving parts.
EVERYTHING = [
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


def kill_a_worker_after_a_checkpoint(folder: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if len(list((folder / "runs").glob("train-*/checkpoint*/position.json"))) >= 2:
            found = psutil.process_iter(["cmdline"])
            workers = [p for p in found if "RayTrainWorker" in " ".join(p.info["cmdline"] or [])]
            if workers:
                os.kill(workers[-1].pid, signal.SIGKILL)
                return
        time.sleep(0.1)


@pytest.mark.slow
def test_a_killed_worker_changes_nothing_of_the_result(corpus: str, tmp_path: Path) -> None:
    whole = run(corpus, tmp_path / "whole", *EVERYTHING)
    killer = threading.Thread(target=kill_a_worker_after_a_checkpoint, args=(tmp_path / "killed",))
    killer.start()
    resumed = run(corpus, tmp_path / "killed", *EVERYTHING)
    killer.join()
    assert [row["step"] for row in resumed.info["training"]] == list(range(1, 31))
    # Single-threaded workers on a CPU: the same numbers to the last bit, whatever happened in between.
    assert [row["loss"] for row in resumed.info["training"]] == [row["loss"] for row in whole.info["training"]]


def test_more_workers_than_cpus_is_an_error_and_no_wait(corpus: str, tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="needs 12 CPUs and the cluster has 4"):
        run(corpus, tmp_path, "workers=8")


def test_a_batch_larger_than_the_split_is_refused(corpus: str, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match="fewer than one batch") as caught:
        run(corpus, tmp_path, "batch_size=100000")
    assert caught.value.where == "train.batch_size"


def test_vectors_that_are_not_finite_end_the_run_and_name_the_rank(corpus: str, tmp_path: Path) -> None:
    with pytest.raises(TrainError, match=r"row \d+ is not finite") as caught:
        run(corpus, tmp_path, "learning_rate=1e30", "warmup_steps=0", "max_failures=0")
    assert "rank 0 of 2" in str(caught.value)


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
