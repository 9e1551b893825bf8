"""What every optimizer's config says, and where its arithmetic is the paper's."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from rayemb.config import Config

Group = dict[str, Any]  # `params`, `weight_decay`, and what `rayemb.train.parameters` notes of them


class OptimizerConfig(Config, ABC):
    """Fields of every optimizer.

    `whole_matrices`: the update of an entry depends on the rest of its matrix (a norm, an orthogonal factor). ZeRO 1
    to 3 gives an optimizer this rank's slice of all parameters in one vector, where no matrix is left: such an
    optimizer is for stage 0. (Tried: four steps of LAMB went 16 % astray there, LARS 10 %; Muon refused.)
    """

    whole_matrices: ClassVar[bool] = False

    learning_rate: float = Field(2e-3, gt=0, description="at the peak of the schedule")
    weight_decay: float = Field(0.1, ge=0, description="decoupled; not on norms, biases, positions or the temperature")

    @abstractmethod
    def build(self, groups: list[Group]) -> torch.optim.Optimizer:
        """The optimizer of these parameter groups, each with its own `weight_decay`."""


class MatrixOptimizer(torch.optim.Optimizer, ABC):
    """An optimizer that moves each parameter on its own."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step on the gradients there are."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._move(weight, weight.grad, group)

    @abstractmethod
    def _move(self, weight: Tensor, gradient: Tensor, group: Group) -> None:
        """Moves one parameter by its gradient."""


def by_layer(group: Group) -> bool:
    """Whether the rate is adapted to each matrix: as in the papers' code, not for norms, biases and the like."""
    return bool(group.get("matrices", True))
