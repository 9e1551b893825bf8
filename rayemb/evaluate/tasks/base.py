"""What every kind of task is made of: its config, its data once read, and what it finds."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from rayemb.config import Config
from rayemb.evaluate.diagnostics import DIAGNOSTICS
from rayemb.evaluate.encoders import Encoder
from rayemb.evaluate.exact import VectorSearch
from rayemb.evaluate.report import Confusion, Curve, Example, Similarities, Space

USUAL = ("rankme", "uniformity", "alignment", "tolerance", "hubness", "modality_gap")
"""Diagnostics that are always of use, where there is what they look at."""


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
    candidates: int  # among which each query looked, or items there were
    shown: Shown = field(default_factory=Shown)
    diagnostics: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Means:
    """What a task may use beside its encoder, and how much it has to show."""

    seed: int = 0
    show: bool = True
    map: Literal["umap", "pca"] | None = "pca"
    ray_tasks: int | None = None  # that share an exact search; None: this process
    open_index: Callable[[str], VectorSearch] | None = None


class TaskConfig(Config, ABC):
    """A task of a suite; `kind` tells them apart in YAML."""

    gives: ClassVar[frozenset[str]] = frozenset({"vectors"})
    """Which inputs of diagnostics there are (`rayemb.evaluate.diagnostics.Inputs`)."""

    description: str = Field("", description="one sentence on the page: what the data are")
    diagnostics: tuple[str, ...] | None = Field(
        None, description="of the vectors, by name (`rayemb.evaluate.diagnostics`); null: the usual ones"
    )

    @model_validator(mode="after")
    def _possible_diagnostics(self) -> "TaskConfig":
        possible = [name for name, each in DIAGNOSTICS.items() if each.needs <= self.gives]
        for name in self.diagnostics or ():
            if name not in DIAGNOSTICS:
                raise ValueError(f"there is no diagnostic {name!r}; possible here: {', '.join(possible)}")
            if missing := sorted(DIAGNOSTICS[name].needs - self.gives):
                raise ValueError(f"the diagnostic {name!r} needs {', '.join(missing)}, which this kind of task has not")
        return self

    @property
    @abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """Names of its figures, the main one first."""

    @property
    def diagnosed(self) -> tuple[str, ...]:
        """Names of the diagnostics of its vectors: those asked for, else the usual ones."""
        if self.diagnostics is not None:
            return self.diagnostics
        return tuple(name for name in USUAL if DIAGNOSTICS[name].needs <= self.gives)

    @property
    @abstractmethod
    def direction(self) -> str:
        """What looks for what, as "query→document"."""

    @abstractmethod
    def load(self, where: str) -> "Task":
        """Reads its data. Raises EvaluateError naming the file and the row, id or label that is wrong."""

    def figures(self, columns: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
        """The figures of items, any of them, some more than once; here: the means of the columns of their names.

        NaN, or a MetricError, says that these items have no figure.
        """
        return {name: float(columns[name].mean()) for name in self.metrics}


class Task(ABC):
    """A task whose data are there."""

    digest: str
    """SHA-256 (hex) of the data: what was found of others does not hold for these."""

    @abstractmethod
    def run(self, encoder: Encoder, means: Means) -> Found:
        """What the encoder makes of it. Raises EvaluateError for vectors that are not finite, naming the item."""
