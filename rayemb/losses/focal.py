"""Focal reweighting of any softmax loss (KaLM-Embedding-V2, 2025; card S003, after Lin et al., 2017)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator

from rayemb.losses.base import Batch, Loss, Rows, Wrapper, WrapperConfig, names_within
from rayemb.parallel import Exchange


class FocalConfig(WrapperConfig):
    """`(1 - p) ** gamma * L` per anchor, p = exp(-L) the probability of its positive; not divided by the weights."""

    name: Literal["focal"] = "focal"
    gamma: float = Field(0.5, ge=0, description="0 leaves the loss as it is; more forgets easy anchors sooner")
    detach: bool = Field(False, description="the weights are constants; the focal loss proper does differentiate them")

    @model_validator(mode="after")
    def _probabilities(self) -> FocalConfig:
        if "decoupled" in names_within(self.loss):
            raise ValueError("decoupled has no lower bound, exp(-L) is no probability: it cannot be inside focal")
        return self

    def build(self, dim: int) -> Focal:
        """The loss around the inner one."""
        return Focal(self, self.loss.build(dim))


class Focal(Wrapper):
    """Choose it where most anchors are easy and the hard ones matter. Softmax losses only: p must be a probability."""

    def __init__(self, config: FocalConfig, loss: Loss) -> None:
        super().__init__(loss)
        self.config = config

    def rows(self, batch: Batch, exchange: Exchange) -> Rows:
        """As many rows as the inner loss has."""
        losses, counted = self.loss.rows(batch, exchange)
        if self.config.gamma == 0:
            return Rows(losses, counted)
        miss = -torch.expm1(-losses)
        # The derivative of x ** gamma at 0 is infinite for gamma < 1: anchors that are sure keep a weight of ~0.
        weights = miss.clamp(min=1e-12) ** self.config.gamma
        return Rows(losses * (weights.detach() if self.config.detach else weights), counted)
