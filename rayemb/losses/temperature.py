"""The temperature that softmax and sigmoid losses share: fixed or learned, one or one per task."""

from __future__ import annotations

import math
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from rayemb.losses.base import Loss, LossConfig


class TemperatureConfig(LossConfig):
    """Fields of every loss with a temperature."""

    temperature: float = Field(0.07, gt=0, description="softmax temperature, or its start if it is learnable")
    learnable_temperature: bool = Field(True, description="whether the temperature is trained with the encoder")
    min_temperature: float = Field(0.01, gt=0, description="floor of a learnable temperature (CLIP's 1/100)")

    @model_validator(mode="after")
    def _above_floor(self) -> TemperatureConfig:
        if self.learnable_temperature and self.temperature < self.min_temperature:
            raise ValueError(f"temperature ({self.temperature}) is below min_temperature ({self.min_temperature})")
        return self


class Temperature(nn.Module):
    """`scale() = 1 / temperature`.

    Held at its floor by clamping in forward, not by editing the parameter: under ZeRO the parameter is a copy of a
    partitioned master weight.
    """

    def __init__(self, config: TemperatureConfig, tasks: int = 1) -> None:
        super().__init__()
        self.ceiling = -math.log(config.min_temperature) if config.learnable_temperature else math.inf
        # One element, not zero dimensions: DeepSpeed's broadcast of the weights cannot view a scalar as bytes.
        log_scale = torch.full((tasks,), -math.log(config.temperature))
        self.log_scale = nn.Parameter(log_scale, requires_grad=config.learnable_temperature)

    def scale(self, tasks: Tensor | None = None) -> Tensor:
        """`(1,)`, or `(B,)` for the tasks `(B,)` int64 of B rows; fp32 or better."""
        log_scale = self.log_scale if self.log_scale.element_size() >= 4 else self.log_scale.float()
        clamped: Tensor = _Ceiling.apply(log_scale, self.ceiling)  # type: ignore[no-untyped-call]
        return clamped.exp() if tasks is None else clamped.exp()[tasks]

    @property
    def value(self) -> float:
        """The current temperature; the mean over tasks."""
        return float((1.0 / self.scale().detach()).mean())


class ScaledLoss(Loss):
    """A loss with a temperature of its own."""

    scale: Temperature

    @property
    def temperature(self) -> float:
        """The current temperature; the mean over tasks."""
        return self.scale.value


class _Ceiling(torch.autograd.Function):
    """`clamp(max=ceiling)` whose gradient still flows where a descent step would lead back below the ceiling.

    The gradient of a plain clamp is zero above it: a temperature that once crossed its floor would stay there.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, ceiling: float) -> Tensor:
        ctx.save_for_backward(x > ceiling)
        return x.clamp(max=ceiling)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (above,) = ctx.saved_tensors
        return grads[0].masked_fill(above & (grads[0] < 0), 0.0), None
