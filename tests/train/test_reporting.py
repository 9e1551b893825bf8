"""Real runs: what they report, where it goes, and that it is there once after an interruption."""

import os
import signal
import threading
import time
from pathlib import Path

import psutil
import pytest

from rayemb.config import load
from rayemb.data import Corpus
from rayemb.models import Model
from rayemb.train import TrainConfig, TrainError, train
from rayemb.train.clock import PHASES
from rayemb.train.sinks import read_rows
from tests.data.corpora import write_corpus

QUICK = [
    "steps=12",
    "batch_size=16",
    "logging.every=2",
    "checkpoints.every=4",
    "schedule.warmup_steps=0",
    "model.dim=16",
    "model.image.image_size=16",
    "model.image.widths=[8, 16]",
    "model.image.depths=[1, 1]",
    "model.text.width=16",
    "model.text.depth=1",
    "model.tokenizer.vocab_size=600",
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"), {"train": [60, 40], "val": [23]}, concepts=10)


def run(folder: Path, corpus: Corpus, *overrides: str) -> Model:
    config = load(TrainConfig, None, [*QUICK, *overrides])
    return train(config, corpus.uri, str(folder / "model"), str(folder / "runs"))


def kill_a_worker_after_a_checkpoint(folder: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if list((folder / "runs").glob("train-*/checkpoints/*/position.json")):
            # Of this session's cluster only: others may train on the same machine.
            found = psutil.Process().children(recursive=True)
            workers = [p for p in found if p.is_running() and "RayTrainWorker" in p.name() + " ".join(p.cmdline())]
            if workers:
                os.kill(workers[-1].pid, signal.SIGKILL)
                return
        time.sleep(0.05)


@pytest.mark.slow
def test_a_killed_run_reports_every_step_once_everywhere(
    ray_cluster: str, corpus: Corpus, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    killer = threading.Thread(target=kill_a_worker_after_a_checkpoint, args=(tmp_path,))
    killer.start()
    model = run(
        tmp_path,
        corpus,
        "steps=60",
        "zero_stage=3",
        "micro_batch_size=5",
        "evaluation.every=20",
        "evaluation.tasks={val: {kind: retrieval}, near: {kind: knn, k: 3}, names: {kind: zero_shot}}",
        # A tracker that nobody answers at: told of once, and the run goes on.
        "logging.sinks=[{name: tensorboard}, {name: mlflow, uri: 'ftp://nobody/here'}]",
    )
    killer.join()
    (uri,) = (tmp_path / "runs").glob("train-*")
    rows, history = read_rows(str(uri)), model.info["training"]
    assert [row["step"] for row in rows] == list(range(2, 61, 2))
    assert [row["loss"] for row in rows] == [row["loss"] for row in history]
    events = event_accumulator.EventAccumulator(str(uri / "tensorboard"), {"scalars": 0}).Reload().Scalars("loss")
    assert [event.step for event in events] == [row["step"] for row in rows]
    assert sum("the metrics sink mlflow failed" in record.message for record in caplog.records) <= 2  # attempts
    assert any("the metrics sink mlflow failed" in record.message for record in caplog.records)
    last = rows[-1]
    assert sorted(row["step"] for row in rows if "val/recall@1" in row) == [20, 40, 60]
    for name in ("val/document_recall@10", "near/accuracy", "names/accuracy@5"):
        assert 0 <= last[name] <= 1
    assert 1 <= last["val/rankme"] <= 16
    assert isinstance(last["collapsed"], bool)
    for row in rows:
        assert 0 < sum(row[f"time/{phase}"] for phase in PHASES) <= 1.001
    for phase in PHASES:  # an evaluation, or a checkpoint, counts in the row after it
        assert any(row[f"time/{phase}"] > 0 for row in rows), phase
    for row in rows:
        assert row["tokens_per_second"] > row["pairs_per_second"] > 0
        assert 0 < row["mfu"] < 1
        assert row["gradient_norm"] > 0
        assert row["noise/trace"] > 0
    assert model.info["config"]["steps"] == 60


@pytest.mark.slow
def test_a_run_that_gets_no_better_ends_and_says_its_best(ray_cluster: str, corpus: Corpus, tmp_path: Path) -> None:
    pairs = write_corpus(tmp_path / "pairs", {"train": [40]})
    with pytest.raises(TrainError, match="val/recall@1 is not measured"):
        run(tmp_path / "none", pairs, "early_stopping={}")
    stopping = "early_stopping={metric: val/recall@1, min_delta: 2, patience: 2}"
    model = run(tmp_path, corpus, "steps=50", "evaluation.every=3", stopping)
    history = model.info["training"]
    assert history[-1]["step"] == 9  # the first is the best, for the next ones cannot be better by 2
    assert model.info["best"] == {
        "metric": "val/recall@1",
        "value": next(row["val/recall@1"] for row in history if row["step"] == 3),
        "step": 3,
        "stopped_early": True,
    }
