"""One optimizer step of a DeepSpeed engine over as many micro-batches as it takes, with the gradient of all of them."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from rayemb.errors import RayembError
from rayemb.parallel.cache import Encoded, gradient_cache, most_over_ranks

Reduction = Literal["auto", "coalesce", "boundary"]


class Step(NamedTuple):
    """What one step found.

    loss:          this rank's share of it, detached.
    gradient_norm: of the whole batch's gradient over all parameters that are trained, before clipping; infinite if
                   the step was skipped, for want of range in fp16.
    micro_batches: of this rank.
    """

    loss: Tensor
    gradient_norm: float
    micro_batches: int


def train_step(
    engine: Any,
    micro_batches: Sequence[dict[str, Tensor]],
    loss: Callable[[Encoded], Tensor],
    *,
    reduction: Reduction = "auto",
    at: Callable[[str], None] | None = None,
) -> Step:
    """One optimizer step on the gradient of the whole batch.

    `engine(micro_batch)` returns an `Encoded`; `loss` gets the rows of all micro-batches in order. All ranks must
    call it; they may bring different numbers of micro-batches, and a rank without rows brings one of zero rows.
    Gradients are averaged over ranks, and clipped once, as a whole, where the engine clips.

    `at` is told of the phase `step`, once all gradients are there.

    `reduction`: when ranks exchange gradients. Both give the same gradient at every stage, with the optimizer
    offloaded or not: parameters after four steps are within 6e-7 of one process with the whole batch, in fp32. What
    they cost in bytes per fp32 parameter on W ranks (measured: W = 2, 8 micro-batches):

    =====  ========================  =======================
    stage  boundary: held, sent      coalesce: held, sent
    =====  ========================  =======================
    0      4, 4                      DeepSpeed has none
    1      4, 4                      4, 4
    2      4/W, 4 each micro-batch   4, 4
    3      4/W, 4 each micro-batch   4 + 4/W, 4
    =====  ========================  =======================

    "auto" is `boundary`: it is there at every stage, keeps the shards for which stages 2 and 3 are chosen, and sums
    the gradients of micro-batches in fp32 where `deepspeed_config` asks for that (`coalesce` sums bf16 in bf16).
    Choose `coalesce` at stage 3 where the network is slow and whole gradients fit; at stage 2 it is stage 1.
    """
    rounds = most_over_ranks(len(micro_batches), engine.device)
    coalesce = reduction == "coalesce"
    if coalesce and not hasattr(engine.optimizer, "_coalesce_grad_reduction"):
        raise RayembError(
            f"DeepSpeed cannot coalesce gradients at ZeRO stage {engine.zero_optimization_stage()} with the optimizer "
            f"{type(engine.optimizer).__name__}",
            where="reduction",
            fix="use 'boundary' or 'auto'",
        )

    def backward(scalar: Tensor, last: bool) -> None:
        if not coalesce:
            engine.set_gradient_accumulation_boundary(last)
        # Divided by the accumulation steps of the engine, which are 1: its micro-batches are not ours.
        engine.backward(scalar)

    if coalesce and rounds > 1:
        with engine.coalesce_grad_reduction():
            value = gradient_cache(engine, micro_batches, loss, backward, rounds=rounds)
    else:
        value = gradient_cache(engine, micro_batches, loss, backward, rounds=rounds)
    if at is not None:
        at("step")
    norm = None
    if not engine.zero_optimization_stage():
        # DeepSpeed keeps it at the other stages only. Before the step, which clips the gradients and lets them go.
        norm = torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None])
    engine.step()
    return Step(value, float(engine.get_global_grad_norm() if norm is None else norm), len(micro_batches))
