"""Progressive weights, from easy anchors to hard ones (PEG, 2023; card S130, whose formula is a stand-in)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rayemb.config import Config
from rayemb.losses.base import Batch, Loss, Rows, Wrapper
from rayemb.parallel import Exchange

if TYPE_CHECKING:
    from rayemb.losses import AnyLoss


class ProgressiveConfig(Config):
    """Weights are a bell over the difficulty's percentile in the global batch; its centre moves with the training."""

    name: Literal["progressive"] = "progressive"
    loss: AnyLoss = Field(description="the loss that is reweighted")
    start: float = Field(0.2, ge=0, le=1, description="the bell's centre at the beginning: easy anchors")
    end: float = Field(0.8, ge=0, le=1, description="its centre at the end: hard anchors")
    width: float = Field(0.3, gt=0, description="its standard deviation, in percentiles")
    noise_above: float = Field(
        0.98, gt=0, le=1, description="anchors above this percentile count as noise while noise_until lasts"
    )
    noise_until: float = Field(0.5, ge=0, le=1, description="share of the training for which they are left out")

    @model_validator(mode="after")
    def _no_twice(self) -> ProgressiveConfig:
        if self.loss.name == "progressive":
            raise ValueError("progressive weights of progressive weights: one schedule is enough")
        return self

    def build(self, dim: int) -> Progressive:
        """The loss around the inner one."""
        return Progressive(self, self.loss.build(dim))


class Progressive(Wrapper):
    """Choose it for large noisy sets of pairs. Reads `Batch.progress`; weights have mean 1 over the global batch."""

    def __init__(self, config: ProgressiveConfig, loss: Loss) -> None:
        super().__init__(loss)
        self.config = config

    def rows(self, batch: Batch, exchange: Exchange) -> Rows:
        """As many rows as the inner loss has."""
        losses, counted = self.loss.rows(batch, exchange)
        weights = self._weights(-torch.expm1(-losses.detach()), counted, batch.progress, exchange)
        return Rows(losses * weights, counted)

    def _weights(self, difficulty: Tensor, counted: Tensor, progress: float, exchange: Exchange) -> Tensor:
        config = self.config
        sizes = [size for (size,) in exchange.agree(None, difficulty.shape[0])]
        everyone = exchange.share(torch.stack([difficulty, counted], 1), sizes)
        known = everyone[everyone[:, 1] > 0, 0].sort().values
        percentile = _percentile(difficulty, known)
        centre = config.start + progress * (config.end - config.start)
        weights = torch.exp(-((percentile - centre) ** 2) / (2 * config.width**2))
        if progress < config.noise_until:
            weights = weights * (percentile <= config.noise_above)
        total = exchange.reduce((weights * counted).sum().reshape(1))[0]
        return weights * (known.shape[0] / total if float(total) > 0 else 0.0)


def _percentile(values: Tensor, known: Tensor) -> Tensor:
    """Mean rank of each value among the sorted `known`, 0 to 1; ties share theirs, a lone value is in the middle."""
    if known.shape[0] < 2:
        return torch.full_like(values, 0.5)
    first = torch.searchsorted(known, values, right=False)
    last = torch.searchsorted(known, values, right=True) - 1
    return (first + last).to(values.dtype) / (2 * (known.shape[0] - 1))
