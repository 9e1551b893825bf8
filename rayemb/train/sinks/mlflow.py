"""Metrics and settings in MLflow: a database or a server."""

import os
import time
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from rayemb import storage
from rayemb.train.sinks.base import Row, Run, Sink, SinkConfig, SinkError, figures, plain_name, require

AT_ONCE = 1000  # metrics of a call, which MLflow limits
PARAMETERS_AT_ONCE, PARAMETER_CHARS = 100, 500
TAG = "rayemb.run"


class MLflowConfig(SinkConfig):
    """A run in MLflow."""

    name: Literal["mlflow"] = "mlflow"
    uri: str | None = Field(
        None,
        description="tracking URI (sqlite:///..., http://...); null: `mlflow.db` in the run's folder, if that is local",
    )
    experiment: str = Field("rayemb", description="name of the experiment; made if it is not there")

    def build(self) -> "MLflow":
        """The sink."""
        require("mlflow", self.name)
        if not (self.uri or "").startswith("http"):
            require("sqlalchemy", self.name)
        return MLflow(self)

    def abandon(self, run: str) -> None:
        """See `SinkConfig.abandon`."""
        from mlflow.tracking import MlflowClient

        if self.uri is None:
            return  # a database of that run alone, in its folder
        client = MlflowClient(tracking_uri=self.uri)
        experiment = client.get_experiment_by_name(self.experiment)
        for found in _runs(client, experiment.experiment_id, run) if experiment else ():
            client.set_terminated(found.info.run_id, "KILLED")


class MLflow(Sink):
    """One MLflow run for one run of ours, however often it is started again; a step is logged once."""

    def __init__(self, config: MLflowConfig) -> None:
        self.config = config
        self._client: Any = None
        self._run = ""
        self._last = -1

    def begin(self, run: Run, step: int | None) -> None:
        """See `Sink.begin`. MLflow forgets nothing: steps that it has are not logged again."""
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        uri = self.config.uri
        if uri is None:
            if run.uri.startswith("s3://"):
                raise SinkError("an S3 folder is no MLflow store", where="train.logging.sinks", fix="give its uri")
            os.makedirs(storage.normalise(run.uri), exist_ok=True)
            uri = f"sqlite:///{storage.join(run.uri, 'mlflow.db')}"
        self._client = MlflowClient(tracking_uri=uri)
        there = self._client.get_experiment_by_name(self.config.experiment)
        experiment = there.experiment_id if there else self._client.create_experiment(self.config.experiment)
        found = _runs(self._client, experiment, run.name)
        if found:
            self._run = found[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            self._last = max((m.step for m in self._client.get_metric_history(self._run, "loss")), default=-1)
            return
        self._run = self._client.create_run(experiment, run_name=run.name, tags={**run.tags, TAG: run.name}).info.run_id
        params = [Param(plain_name(key), text[:PARAMETER_CHARS]) for key, text in run.settings.items()]
        for start in range(0, len(params), PARAMETERS_AT_ONCE):
            self._client.log_batch(self._run, params=params[start : start + PARAMETERS_AT_ONCE])

    def write(self, rows: Sequence[Row]) -> None:
        """See `Sink.write`."""
        from mlflow.entities import Metric

        metrics = []
        for row in rows:
            if row["step"] > self._last:
                at = int(1000 * row.get("time", time.time()))
                metrics += [Metric(plain_name(k), value, at, row["step"]) for k, value in figures(row).items()]
                self._last = row["step"]
        for start in range(0, len(metrics), AT_ONCE):
            self._client.log_batch(self._run, metrics=metrics[start : start + AT_ONCE])

    def close(self) -> None:
        """See `Sink.close`."""
        if self._run:
            self._client.set_terminated(self._run)


def _runs(client: Any, experiment: str, name: str) -> list[Any]:
    """MLflow's run for our run of that name, if there is one."""
    return list(client.search_runs([experiment], f"tags.`{TAG}` = '{name}'", max_results=1))
