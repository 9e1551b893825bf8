"""Where a training's metrics go: one stream, several sinks."""

from collections.abc import Callable
from typing import Annotated

from pydantic import Field

from rayemb.config import Config
from rayemb.train.sinks.base import Row, Run, Sink, SinkError
from rayemb.train.sinks.jsonl import JSONLines, read_rows
from rayemb.train.sinks.mlflow import MLflowConfig
from rayemb.train.sinks.stream import MetricsStream
from rayemb.train.sinks.tensorboard import TensorBoardConfig
from rayemb.train.sinks.wandb import WandbConfig

AnySink = Annotated[TensorBoardConfig | MLflowConfig | WandbConfig, Field(discriminator="name")]


class LoggingConfig(Config):
    """How often a run reports, and where to; always to its own folder, as lines of JSON."""

    every: int = Field(10, ge=1, description="steps between reports")
    sinks: list[AnySink] = Field([], description="further places: tensorboard, mlflow, wandb")

    def makers(self) -> dict[str, Callable[[], Sink]]:
        """What makes each sink, by name. Raises SinkError for one whose package is not installed."""
        found: dict[str, Callable[[], Sink]] = {"jsonl": JSONLines}
        for number, sink in enumerate(self.sinks):
            sink.build()
            found[sink.name if sink.name not in found else f"{sink.name} {number}"] = sink.build
        return found


__all__ = ["JSONLines", "LoggingConfig", "MetricsStream", "Row", "Run", "Sink", "SinkError", "read_rows"]
