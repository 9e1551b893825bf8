"""LARS: momentum SGD whose rate is set for each matrix by the norms of weight and gradient (You et al., 2017)."""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rayemb.train.optimizers.base import Group, MatrixOptimizer, OptimizerConfig, by_layer


class LARSConfig(OptimizerConfig):
    """SimCLR's optimizer, for convolutional towers at large batches. `zero_stage: 0`."""

    whole_matrices: ClassVar[bool] = True

    name: Literal["lars"] = "lars"
    learning_rate: float = Field(0.3, gt=0, description="at the peak of the schedule; SimCLR: 0.3 x batch / 256")
    weight_decay: float = Field(1e-6, ge=0, description="added to the gradient; not on norms, biases or temperature")
    momentum: float = Field(0.9, ge=0, lt=1, description="of the update, rate included")
    trust: float = Field(1e-3, gt=0, description="share of a matrix's norm that a step may move at rate 1")

    def build(self, groups: list[Group]) -> torch.optim.Optimizer:
        """The optimizer."""
        return LARS(groups, lr=self.learning_rate, momentum=self.momentum, trust=self.trust)


class LARS(MatrixOptimizer):
    """Algorithm 1 of the paper; the momentum holds the rate, as there.

    A matrix whose norm, or whose gradient's, is zero moves at the plain rate; so do groups with `matrices: False`.
    """

    def __init__(self, groups: list[Group], *, lr: float, momentum: float, trust: float) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": 0.0})

    def _move(self, weight: Tensor, gradient: Tensor, group: Group) -> None:
        state, decay = self.state[weight], group["weight_decay"]
        if "momentum" not in state:
            state["momentum"] = torch.zeros_like(weight)
        rate = torch.as_tensor(group["lr"], dtype=weight.dtype, device=weight.device)
        if by_layer(group):
            size, slope = weight.norm(), gradient.norm()
            # No branch on a value: on a GPU it would wait for the device at every matrix.
            local = group["trust"] * size / (slope + decay * size)
            rate = rate * torch.where((size > 0) & (slope > 0), local, torch.ones_like(size))
        state["momentum"].mul_(group["momentum"]).add_(rate * (gradient + decay * weight))
        weight.sub_(state["momentum"])
