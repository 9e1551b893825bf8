"""Sinks of a run whose folder is on S3, against a real server on loopback."""

from pathlib import Path

import pytest

from rayemb import storage
from rayemb.train.report import compare, write_page
from rayemb.train.sinks import JSONLines, Run, SinkError, read_rows
from rayemb.train.sinks.mlflow import MLflowConfig
from rayemb.train.sinks.tensorboard import TensorBoardConfig
from tests.storage.conftest import s3, s3_endpoint  # noqa: F401
from tests.train.sinks.test_sinks import CONFIG, EXPECTED, interrupted


def test_metrics_reach_a_store(s3: str, tmp_path: Path) -> None:  # noqa: F811
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run = Run(f"{s3}/runs/train-1", "train-1", CONFIG)
    for sink in (JSONLines(), TensorBoardConfig().build()):
        interrupted(sink, run)
    assert [row["loss"] for row in read_rows(run.uri)] == EXPECTED
    for uri in storage.list_files(f"{run.uri}/tensorboard"):
        (tmp_path / uri.rsplit("/", 1)[1]).write_bytes(storage.read_bytes(uri))
    events = event_accumulator.EventAccumulator(str(tmp_path)).Reload().Scalars("loss")
    assert [event.value for event in events] == pytest.approx(EXPECTED)
    page = write_page(f"{s3}/report.html", compare([f"{s3}/runs"]))
    assert b"train-1" in storage.read_bytes(page)
    with pytest.raises(SinkError, match="no MLflow store"):
        MLflowConfig().build().begin(run, None)
