"""Metrics and settings in Weights & Biases."""

import os
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field

from rayemb import storage
from rayemb.train.sinks.base import Row, Run, Sink, SinkConfig, figures, require


class WandbConfig(SinkConfig):
    """A run in Weights & Biases; the key comes from its own environment."""

    name: Literal["wandb"] = "wandb"
    project: str = Field("rayemb", description="name of the project")
    mode: Literal["online", "offline"] = Field("online", description="offline keeps files, to be sent by `wandb sync`")
    uri: str | None = Field(None, description="local folder of its files; null: the run's, if that is local")

    def build(self) -> "Wandb":
        """The sink."""
        require("wandb", self.name)
        return Wandb(self)


class Wandb(Sink):
    """One W&B run for one run of ours, however often it is started again; a step is logged once."""

    def __init__(self, config: WandbConfig) -> None:
        self.config = config
        self._run: Any = None
        self._last = -1

    def begin(self, run: Run, step: int | None) -> None:
        """See `Sink.begin`. W&B forgets nothing: steps that it has are not logged again."""
        import wandb

        if self._run is not None:
            return
        folder = self.config.uri or (None if run.uri.startswith("s3://") else storage.normalise(run.uri))
        if folder:
            os.makedirs(folder, exist_ok=True)
        self._run = wandb.init(
            project=self.config.project,
            id=run.name,
            name=run.name,
            dir=folder,
            mode=self.config.mode,
            resume="allow" if self.config.mode == "online" else None,
            config={**run.config, **run.tags},
            settings=wandb.Settings(silent=True, console="off", x_disable_stats=True),
        )
        self._last = int(self._run.step) - 1 if self._run.resumed else -1

    def write(self, rows: Sequence[Row]) -> None:
        """See `Sink.write`."""
        for row in rows:
            if row["step"] > self._last:
                self._run.log(figures(row), step=row["step"])
                self._last = row["step"]

    def close(self) -> None:
        """See `Sink.close`."""
        if self._run is not None:
            self._run.finish()
