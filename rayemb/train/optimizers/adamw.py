"""AdamW, Adam with decoupled weight decay (Loshchilov & Hutter, 2019)."""

from typing import Annotated, Literal

import torch
from pydantic import Field

from rayemb.train.optimizers.base import Group, OptimizerConfig

Beta = Annotated[float, Field(ge=0, lt=1)]


class AdamWConfig(OptimizerConfig):
    """Torch's AdamW: entry by entry, so that every ZeRO stage computes the same."""

    name: Literal["adamw"] = "adamw"
    betas: tuple[Beta, Beta] = Field((0.9, 0.98), description="decay of the running mean and of the mean square")
    eps: float = Field(1e-8, gt=0, description="added to the root of the mean square")

    def build(self, groups: list[Group]) -> torch.optim.Optimizer:
        """The optimizer."""
        return torch.optim.AdamW(groups, lr=self.learning_rate, betas=self.betas, eps=self.eps, fused=True)
