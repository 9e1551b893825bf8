"""What is measured of a trial's model when its training is over, beyond what the training reports.

A measure is a config with a literal `name`, like every method: its metrics may be objectives of the sweep.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Literal

from rayemb.config import Config
from rayemb.models import Model
from rayemb.train import TrainConfig


@dataclass(frozen=True)
class Trained:
    """A trained model and what it was trained with."""

    model: Model
    model_uri: str
    corpus_uri: str
    config: TrainConfig


class Measure(Config, ABC):
    """Base of the configs of measures."""

    @property
    @abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """Names of what it gives."""

    @abstractmethod
    def measure(self, trained: Trained) -> dict[str, float]:
        """The figures, by those names; runs in the trial's driver, which holds no CPU of the cluster."""


class Size(Measure):
    """How large the model and its vectors are."""

    name: Literal["size"] = "size"

    @property
    def metrics(self) -> tuple[str, ...]:
        """See `Measure.metrics`."""
        return ("bytes_per_vector", "parameters")

    def measure(self, trained: Trained) -> dict[str, float]:
        """Bytes of a vector in fp32, and the number of weights of the towers."""
        parameters = sum(parameter.numel() for parameter in trained.model.network.parameters())
        return {"bytes_per_vector": 4.0 * trained.model.dim, "parameters": float(parameters)}


# A union discriminated by `name` once there are several.
AnyMeasure = Size
