"""Muon: the momentum of each hidden matrix made orthogonal, AdamW for everything else (Jordan et al., 2024)."""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from rayemb.train.optimizers.adamw import Beta
from rayemb.train.optimizers.base import Group, OptimizerConfig


class MuonConfig(OptimizerConfig):
    """Torch's Muon on the weights of linear layers, torch's AdamW on the rest, at one rate. `zero_stage: 0`."""

    whole_matrices: ClassVar[bool] = True

    name: Literal["muon"] = "muon"
    momentum: float = Field(0.95, ge=0, lt=1, description="of the hidden matrices' gradients (Nesterov)")
    iterations: int = Field(5, ge=1, lt=100, description="of Newton and Schulz, towards the orthogonal matrix")
    betas: tuple[Beta, Beta] = Field((0.9, 0.98), description="AdamW's, for the other parameters")
    eps: float = Field(1e-8, gt=0, description="AdamW's, for the other parameters")

    def build(self, groups: list[Group]) -> torch.optim.Optimizer:
        """The optimizer; `hidden` says which groups are hidden matrices."""
        hidden = [group for group in groups if group["hidden"]]
        others = [group for group in groups if not group["hidden"]]
        parts: list[torch.optim.Optimizer] = []
        if hidden:
            # Steps of AdamW's size (Liu et al., 2025): the one rate is right for both parts.
            parts.append(
                torch.optim.Muon(
                    hidden,
                    lr=self.learning_rate,
                    momentum=self.momentum,
                    ns_steps=self.iterations,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
        if others:
            parts.append(torch.optim.AdamW(others, lr=self.learning_rate, betas=self.betas, eps=self.eps))
        return Muon(parts)


class Muon(torch.optim.Optimizer):
    """Muon and AdamW as one optimizer, with one list of groups and one state to save."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = {bool(part.param_groups[0]["hidden"]): part for part in parts}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One step on the gradients there are."""
        for hidden, part in self.parts.items():
            # Each time: loading a state replaces both.
            part.param_groups = [group for group in self.param_groups if group["hidden"] is hidden]
            part.state = self.state
            part.step()
