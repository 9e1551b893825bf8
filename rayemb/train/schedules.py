"""The learning rate over a run: linear warm-up, then one of four shapes."""

import math
from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from rayemb.config import Config


class ScheduleConfig(Config, ABC):
    """Fields of every schedule."""

    warmup_steps: int = Field(50, ge=0, description="steps of linear warm-up")

    def rate(self, peak: float, step: int, steps: int) -> float:
        """The rate of step `step` (0-based) of `steps`."""
        warm = min(1.0, (step + 1) / max(1, self.warmup_steps))
        return peak * warm * self.shape(step, steps)

    @abstractmethod
    def shape(self, step: int, steps: int) -> float:
        """Share of the peak at step `step` (0-based) of `steps`, warm-up left aside."""


class DecayingConfig(ScheduleConfig, ABC):
    """Fields of the schedules that come down."""

    final_fraction: float = Field(0.0, ge=0, le=1, description="of the peak, where the run ends")

    def between(self, height: float) -> float:
        """Share of the peak at `height` (1 to 0) between the peak and the end."""
        return self.final_fraction + (1 - self.final_fraction) * height


class CosineConfig(DecayingConfig):
    """Half a cosine from the peak to the end."""

    name: Literal["cosine"] = "cosine"

    def shape(self, step: int, steps: int) -> float:
        """See `ScheduleConfig.shape`."""
        return self.between(0.5 * (1 + math.cos(math.pi * step / steps)))


class LinearConfig(DecayingConfig):
    """A straight line from the peak to the end."""

    name: Literal["linear"] = "linear"

    def shape(self, step: int, steps: int) -> float:
        """See `ScheduleConfig.shape`."""
        return self.between(1 - step / steps)


class WSDConfig(DecayingConfig):
    """Warm-up, stable, decay: the peak until the last steps, then a straight line; a longer run shares its start."""

    name: Literal["wsd"] = "wsd"
    decay_fraction: float = Field(0.2, gt=0, le=1, description="share of the steps that come down, at the end")

    def shape(self, step: int, steps: int) -> float:
        """See `ScheduleConfig.shape`."""
        return self.between(min(1.0, (1 - step / steps) / self.decay_fraction))


class ConstantConfig(ScheduleConfig):
    """The peak to the end."""

    name: Literal["constant"] = "constant"

    def shape(self, step: int, steps: int) -> float:
        """See `ScheduleConfig.shape`."""
        return 1.0


def _named(value: Any) -> Any:
    # A `schedule:` block that only sets the warm-up means the default schedule.
    return {"name": "cosine", **value} if isinstance(value, dict) else value


AnySchedule = Annotated[
    CosineConfig | WSDConfig | LinearConfig | ConstantConfig, Field(discriminator="name"), BeforeValidator(_named)
]
