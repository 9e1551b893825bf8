"""Progressive weights, from easy anchors to hard ones (PEG, 2023; card S130, whose formula is a stand-in)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rayemb.losses.base import Batch, Loss, Rows, Wrapper, WrapperConfig, names_within
from rayemb.parallel import Exchange


class ProgressiveConfig(WrapperConfig):
    """Weights are a bell over the difficulty's percentile in the global batch; its centre moves with the training."""

    name: Literal["progressive"] = "progressive"
    start: float = Field(0.2, ge=0, le=1, description="the bell's centre at the beginning: easy anchors")
    end: float = Field(0.8, ge=0, le=1, description="its centre at the end: hard anchors")
    width: float = Field(0.3, gt=0, description="its standard deviation, in percentiles")
    noise_above: float = Field(
        0.98, gt=0, le=1, description="anchors above this percentile count as noise while noise_until lasts"
    )
    noise_until: float = Field(0.5, ge=0, le=1, description="share of the training for which they are left out")

    @model_validator(mode="after")
    def _no_twice(self) -> ProgressiveConfig:
        if "progressive" in names_within(self.loss):
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
        everyone = exchange.everyone(torch.stack([difficulty, counted], 1))
        known = everyone[everyone[:, 1] > 0, 0].sort().values
        mine, all_of_them = (self._log_bell(_percentile(values, known), progress) for values in (difficulty, known))
        total = torch.logsumexp(all_of_them, 0)
        weights = known.shape[0] * torch.exp(mine - total)
        return torch.where((counted > 0) & (total > -math.inf), weights, 0.0)

    def _log_bell(self, percentile: Tensor, progress: float) -> Tensor:
        # A log: a bell narrower than the distance between anchors is 0 at all of them.
        config = self.config
        centre = config.start + progress * (config.end - config.start)
        bell = -((percentile - centre) ** 2) / (2 * config.width**2)
        return bell.masked_fill(percentile > config.noise_above, -math.inf) if progress < config.noise_until else bell


def _percentile(values: Tensor, known: Tensor) -> Tensor:
    """Mean rank of each value among the sorted `known`, 0 to 1; ties share theirs, a lone value is in the middle."""
    if known.shape[0] < 2:
        return torch.full_like(values, 0.5)
    first = torch.searchsorted(known, values, right=False)
    last = torch.searchsorted(known, values, right=True) - 1
    return (first + last).to(values.dtype) / (2 * (known.shape[0] - 1))
