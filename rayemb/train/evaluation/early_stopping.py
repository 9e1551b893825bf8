"""When a training has stopped getting better."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import Field

from rayemb.config import Config


class EarlyStoppingConfig(Config):
    """Ends a run whose metric no longer improves."""

    metric: str = Field("val/recall@1", description="task/metric of an evaluation")
    patience: int = Field(5, ge=1, description="evaluations in a row without a new best before the run ends")
    min_delta: float = Field(0.0, ge=0, description="a new best is better by more than this")
    mode: Literal["max", "min"] = Field("max", description="whether more or less of it is better")


class EarlyStopping:
    """The best value of a run so far; all of its state follows from the rows of the metrics, which checkpoints hold."""

    def __init__(self, config: EarlyStoppingConfig, history: Iterable[Mapping[str, Any]] = ()) -> None:
        self.config = config
        self.best: float | None = None
        self.step: int | None = None
        self.waited = 0
        for row in history:
            self.update(row)

    def update(self, row: Mapping[str, Any]) -> bool:
        """Takes the metrics of a step; whether the run should end. A row without the metric says nothing.

        A metric that is None, for which there was no honest figure, is no new best.
        """
        if self.config.metric not in row:
            return False
        value = row[self.config.metric]
        if value is not None and self._better(value):
            self.best, self.step, self.waited = value, row["step"], 0
        else:
            self.waited += 1
        return self.over

    @property
    def over(self) -> bool:
        """Whether the run should end."""
        return self.waited >= self.config.patience

    def _better(self, value: float) -> bool:
        if self.best is None:
            return True
        gain = value - self.best if self.config.mode == "max" else self.best - value
        return gain > self.config.min_delta

    @property
    def info(self) -> dict[str, Any]:
        """For the model's manifest."""
        return {"metric": self.config.metric, "value": self.best, "step": self.step}
