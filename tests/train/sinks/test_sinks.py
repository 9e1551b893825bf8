"""Sinks read back with the trackers' own readers; a stream that goes on when one of them fails."""

import json
import math
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rayemb import storage
from rayemb.train.sinks import JSONLines, LoggingConfig, MetricsStream, Row, Run, Sink, SinkError, read_rows
from rayemb.train.sinks import jsonl as jsonl_module
from rayemb.train.sinks.mlflow import MLflowConfig
from rayemb.train.sinks.tensorboard import TensorBoardConfig
from rayemb.train.sinks.wandb import WandbConfig

CONFIG = {"steps": 40, "loss": {"name": "infonce", "temperature": 0.07}}


def rows(first: int, last: int, offset: float = 0.0) -> list[dict[str, Any]]:
    return [
        {"step": n, "time": 1e9 + n, "loss": n / 10 + offset, "val/recall@1": None if n % 2 else n / 100, "note": "x"}
        for n in range(first, last + 1)
    ]


def interrupted(sink: Sink, run: Run) -> None:
    """Ten steps, and again from the eighth on, with other figures."""
    sink.begin(run, None)
    sink.write(rows(1, 6))
    sink.write(rows(7, 10))
    sink.begin(run, 7)
    sink.write(rows(8, 12, offset=100.0))
    sink.close()


EXPECTED = [n / 10 for n in range(1, 8)] + [n / 10 + 100 for n in range(8, 13)]


def test_lines_of_json_hold_every_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl_module, "SEGMENT", 3)
    run = Run(str(tmp_path), "train-1", CONFIG)
    interrupted(JSONLines(), run)
    found = read_rows(run.uri)
    assert [row["step"] for row in found] == list(range(1, 13))
    assert [row["loss"] for row in found] == EXPECTED
    assert sorted(path.name for path in (tmp_path / "metrics").iterdir()) == [f"0000{n}.jsonl" for n in range(4)]
    assert json.loads((tmp_path / "run.json").read_text())["config"] == CONFIG
    # Another process goes on, from the start and from the middle.
    for step in (5, 0):
        again = JSONLines()
        again.begin(run, step)
        again.write([{"step": step + 1, "loss": math.nan}])
        found = read_rows(run.uri)
        assert [row["step"] for row in found] == list(range(1, step + 2))
        assert found[-1]["loss"] is None
    (tmp_path / "metrics" / "00000.jsonl").write_text('{"step": 1}\n{"st')
    with pytest.raises(storage.StorageError, match="line 2 is not JSON"):
        read_rows(run.uri)


def test_tensorboard_reads_its_events_without_void_steps(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    interrupted(TensorBoardConfig().build(), Run(str(tmp_path), "train-1", CONFIG))
    found = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    events = found.Scalars("loss")
    assert [event.step for event in events] == list(range(1, 13))
    assert [event.value for event in events] == pytest.approx(EXPECTED)
    assert events[0].wall_time == 1e9 + 1
    assert [event.step for event in found.Scalars("val/recall_at_1")] == [2, 4, 6, 8, 10, 12]


def test_mlflow_has_one_run_with_every_step_once(tmp_path: Path) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    run = Run(str(tmp_path), "train-1", CONFIG)
    interrupted(MLflowConfig().build(), run)
    again = MLflowConfig().build()  # another driver
    again.begin(run, 10)
    again.write(rows(11, 14))
    again.close()
    client = tracking.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (found,) = client.search_runs([client.get_experiment_by_name("rayemb").experiment_id])
    history = client.get_metric_history(found.info.run_id, "loss")
    assert sorted(metric.step for metric in history) == list(range(1, 15))
    assert client.get_metric_history(found.info.run_id, "val/recall_at_1")[0].value == 0.02
    assert found.data.params["loss.temperature"] == "0.07"
    assert found.info.status == "FINISHED"


def test_a_run_that_was_stopped_for_good_is_not_running_in_mlflow(tmp_path: Path) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    config = MLflowConfig(uri=f"sqlite:///{tmp_path}/mlflow.db")
    config.abandon("train-1")  # nothing is there yet
    for name in ("train-1", "train-2"):
        config.build().begin(Run(str(tmp_path / name), name, CONFIG), None)
    config.abandon("train-1")
    client = tracking.MlflowClient(config.uri)
    found = client.search_runs([client.get_experiment_by_name("rayemb").experiment_id])
    assert {run.info.run_name: run.info.status for run in found} == {"train-1": "KILLED", "train-2": "RUNNING"}


def test_tags_of_whoever_began_a_run_are_where_its_metrics_are(tmp_path: Path) -> None:
    tracking = pytest.importorskip("mlflow.tracking")
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = Run(str(tmp_path), "sweep-1-abc", CONFIG, {"trial": "abc", "loss.temperature": "0.05"})
    for sink in (MLflowConfig().build(), TensorBoardConfig().build(), JSONLines()):
        interrupted(sink, run)
    client = tracking.MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    (found,) = client.search_runs(
        [client.get_experiment_by_name("rayemb").experiment_id], "tags.`loss.temperature` = '0.05'"
    )
    assert (found.info.run_name, found.data.tags["trial"]) == ("sweep-1-abc", "abc")
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert b"abc" in events.Tensors("trial/text_summary")[0].tensor_proto.string_val[0]
    assert json.loads((tmp_path / "run.json").read_text())["tags"] == run.tags


def test_wandb_keeps_its_files_offline(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    interrupted(WandbConfig(mode="offline").build(), Run(str(tmp_path), "train-1", CONFIG))
    (file,) = tmp_path.glob("wandb/**/*.wandb")
    deadline = time.monotonic() + 30  # its own process writes
    while b"val/recall@1" not in (content := file.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert b"val/recall@1" in content
    assert b"infonce" in content


def test_a_sink_without_its_package_is_refused_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.setattr(sys, "meta_path", [])
    for name in ("wandb", "mlflow", "tensorboardX"):
        for module in [module for module in sys.modules if module.split(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
    for config in (WandbConfig(), MLflowConfig(), TensorBoardConfig()):
        with pytest.raises(SinkError, match=r"rayemb\[tracking\]") as caught:
            LoggingConfig(sinks=[config]).makers()
        assert caught.value.where == "train.logging.sinks"


class Broken(Sink):
    def begin(self, run: Run, step: int | None) -> None:
        pass

    def write(self, rows: Sequence[Row]) -> None:
        raise OSError("the tracker is away")

    def close(self) -> None:
        raise OSError("and stays away")


class Slow(Broken):
    def __init__(self, release: threading.Event) -> None:
        self.release = release

    def write(self, rows: Sequence[Row]) -> None:
        self.release.wait(60)


def test_a_sink_that_fails_or_hangs_is_told_of_once_and_the_others_go_on(tmp_path: Path) -> None:
    said: list[str] = []
    release = threading.Event()
    run = Run(str(tmp_path), "train-1", CONFIG)
    sinks = {"jsonl": JSONLines, "broken": Broken, "slow": lambda: Slow(release)}
    stream = MetricsStream(run, sinks, said.append)
    stream.begin(None)
    for row in rows(1, 200):
        stream.add(row)
    stream.close(timeout=1.0)
    assert [row["step"] for row in read_rows(run.uri)] == list(range(1, 201))
    assert stream.failures["broken"] >= 2
    assert sorted(text.split(" failed")[0] for text in said) == ["the metrics sink broken", "the metrics sink slow"]
    assert any("OSError: the tracker is away" in text for text in said)
    release.set()
