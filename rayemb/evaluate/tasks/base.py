"""What every kind of task is made of: its config, its data once read, and what it finds."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rayemb.config import Config
from rayemb.evaluate.encoders import Encoder
from rayemb.evaluate.report import Confusion, Curve, Example, Similarities, Space


@dataclass(frozen=True)
class Items:
    """What was found for each query (pair, episode) of a task, and all that its figures are computed from.

    So that intervals and comparisons draw items again, later and without the encoder.
    """

    ids: list[str]
    columns: Mapping[str, NDArray[np.float64]]  # each (Q,): a metric of the query, or what the metrics are made of
    clusters: NDArray[np.int64] | None = None  # (Q,) items of one number are drawn together; None: each for itself


@dataclass(frozen=True)
class Shown:
    """What the page shows of a task, where there is something to show."""

    space: Space | None = None
    similarities: Similarities | None = None
    curves: tuple[Curve, ...] = ()
    confusion: Confusion | None = None
    examples: tuple[Example, ...] = ()


@dataclass(frozen=True)
class Found:
    """What a task found of one encoder."""

    items: Items
    shown: Shown = field(default_factory=Shown)
    diagnostics: Mapping[str, float] = field(default_factory=dict)


class TaskConfig(Config, ABC):
    """A task of a suite; `kind` tells them apart in YAML."""

    @property
    @abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """Names of its figures, the main one first."""

    @abstractmethod
    def load(self, where: str) -> "Task":
        """Reads its data. Raises EvaluateError naming the file and the row, id or label that is wrong."""

    def figures(self, columns: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
        """The figures of items, any of them, some more than once; here: the means of the columns of their names."""
        return {name: float(columns[name].mean()) for name in self.metrics}


class Task(ABC):
    """A task whose data are there."""

    @abstractmethod
    def run(self, encoder: Encoder) -> Found:
        """What the encoder makes of it."""
