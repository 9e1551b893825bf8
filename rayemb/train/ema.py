"""A running mean of the weights, kept where the optimizer keeps its own state (Polyak & Juditsky, 1992).

As one more entry of the optimizer's state it is sharded by ZeRO as the others are, in fp32 whatever the precision, and
is saved and restored with them.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from rayemb.config import Config
from rayemb.errors import RayembError

STATE = "ema"


class EMAConfig(Config):
    """A mean of the weights with exponentially fading memory: validated and saved instead of the weights."""

    decay: float = Field(
        0.999, gt=0, lt=1, description="kept of the mean at each step; at most (1 + step) / (10 + step) of it"
    )

    def at(self, step: int) -> float:
        """The decay of step `step` (0-based): the first weights, which know nothing, fade quickly."""
        return min(self.decay, (1 + step) / (10 + step))


def keep_mean(optimizer: torch.optim.Optimizer) -> None:
    """Has `optimizer` update the mean at each of its steps, by `ema_decay` of the parameter's group."""
    first: dict[Tensor, Tensor] = {}

    def before(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for parameter in _stepped(optimizer):
            state = optimizer.state.get(parameter, {})
            if not state:
                # Not into the state at once: optimizers take an empty one for the sign to set up theirs.
                first[parameter] = parameter.detach().clone()
            elif STATE not in state:
                raise RayembError(
                    "the checkpoint has no mean of the weights", where="train.ema", fix="start the run anew"
                )

    @torch.no_grad()
    def after(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = optimizer.state[parameter]
                if parameter in first:
                    state[STATE] = first.pop(parameter)
                state[STATE].lerp_(parameter, 1 - group["ema_decay"])

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


def _stepped(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """What this step moves. ZeRO calls the optimizer for one group at a time, or one part of a group."""
    for group in optimizer.param_groups:
        yield from (parameter for parameter in group["params"] if parameter.grad is not None)


@contextlib.contextmanager
def averaged(engine: Any, module: nn.Module, *, stage: int) -> Iterator[None]:
    """Within it the parameters of `module` have the values of their means, after it their own, bit for bit.

    All ranks must enter it. Parameters that are frozen, or were never stepped, are their own mean.
    """
    if stage in (1, 2):
        _link(engine.optimizer)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    kept: dict[nn.Parameter, Tensor] = {}
    for parameter in parameters:
        mean = _mean(engine, parameter, stage)
        if mean is not None:
            _write(engine, parameter, mean, stage, kept)
    # Not in a `finally`: what one rank raises ends the run, and the others would wait for its share here.
    yield
    for parameter in parameters:
        if parameter in kept or stage == 3:
            _write(engine, parameter, kept.get(parameter), stage, {})


def _link(zero: Any) -> None:
    """Has ZeRO 1 and 2 look up the state of all parameters: by itself it does so once, after the first group's step."""
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    for parameters, flat in zip(zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True):
        lazy_init_hp_params_optimizer_state(parameters, flat, zero.optimizer.state)


def _mean(engine: Any, parameter: nn.Parameter, stage: int) -> Tensor | None:
    from deepspeed.utils import safe_get_full_optimizer_state

    if engine.global_steps == engine.skipped_steps:
        return None
    if stage == 0 and parameter in engine.optimizer.state:
        found: Tensor | None = engine.optimizer.state[parameter].get(STATE)
    else:
        found = safe_get_full_optimizer_state(parameter, STATE)
    return found


@torch.no_grad()
def _write(
    engine: Any, parameter: nn.Parameter, value: Tensor | None, stage: int, kept: dict[nn.Parameter, Tensor]
) -> None:
    """Puts `value` into the parameter and its own into `kept`; under ZeRO-3 on rank 0, which tells the others."""
    import deepspeed

    whole = deepspeed.zero.GatheredParameters([parameter], modifier_rank=0) if stage == 3 else contextlib.nullcontext()
    with whole:
        if value is not None and (stage < 3 or engine.global_rank == 0):
            kept[parameter] = parameter.detach().clone()
            parameter.copy_(value.reshape(parameter.shape))
