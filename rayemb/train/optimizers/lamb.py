"""LAMB: Adam's direction, each matrix moved in proportion to its norm (You et al., 2020)."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rayemb.train.optimizers.adamw import Beta
from rayemb.train.optimizers.base import Group, MatrixOptimizer, OptimizerConfig, by_layer


class LAMBConfig(OptimizerConfig):
    """For batches of many thousands, where AdamW's rate can no longer be raised with the batch. `zero_stage: 0`."""

    whole_matrices: ClassVar[bool] = True

    name: Literal["lamb"] = "lamb"
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="decay of the running mean and of the mean square")
    eps: float = Field(1e-6, gt=0, description="added to the root of the mean square")

    def build(self, groups: list[Group]) -> torch.optim.Optimizer:
        """The optimizer."""
        return LAMB(groups, lr=self.learning_rate, betas=self.betas, eps=self.eps)


class LAMB(MatrixOptimizer):
    """Algorithm 2 of the paper with bias correction and the identity as its scaling function.

    A matrix whose norm, or whose update's, is zero moves at the plain rate; so do groups with `matrices: False`.
    """

    def __init__(self, groups: list[Group], *, lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})

    def _move(self, weight: Tensor, gradient: Tensor, group: Group) -> None:
        state, (beta, beta_square) = self.state[weight], group["betas"]
        if "step" not in state:
            state.update(step=0, exp_avg=torch.zeros_like(weight), exp_avg_sq=torch.zeros_like(weight))
        state["step"] += 1
        state["exp_avg"].lerp_(gradient, 1 - beta)
        state["exp_avg_sq"].mul_(beta_square).addcmul_(gradient, gradient, value=1 - beta_square)
        mean = state["exp_avg"] / (1 - beta ** state["step"])
        square = state["exp_avg_sq"] / (1 - beta_square ** state["step"])
        update = mean / (square.sqrt() + group["eps"]) + group["weight_decay"] * weight
        rate = torch.as_tensor(group["lr"], dtype=weight.dtype, device=weight.device)
        if by_layer(group):
            size, change = weight.norm(), update.norm()
            # No branch on a value: on a GPU it would wait for the device at every matrix.
            rate = rate * torch.where((size > 0) & (change > 0), size / change, torch.ones_like(size))
        weight.sub_(rate * update)
