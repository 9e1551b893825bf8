"""One optimizer step of a DeepSpeed engine over as many micro-batches as fit, with the gradient of all of them."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from torch import Tensor

from rayemb.errors import RayembError
from rayemb.parallel.cache import Encoded, gradient_cache, most_over_ranks

Reduction = Literal["auto", "coalesce", "boundary"]


def train_step(
    engine: Any,
    micro_batches: Sequence[dict[str, Tensor]],
    loss: Callable[[Encoded], Tensor],
    *,
    reduction: Reduction = "auto",
) -> Tensor:
    """This rank's share of the loss, detached, after one optimizer step on its exact gradient.

    `engine(micro_batch)` must return an `Encoded`. Ranks may bring different numbers of micro-batches.
    """
    rounds = most_over_ranks(len(micro_batches), engine.device)

    def backward(surrogate: Tensor, last: bool) -> None:
        if chosen == "boundary":
            engine.set_gradient_accumulation_boundary(last)
        engine.backward(surrogate)

    chosen = resolve(engine, reduction)
    if rounds > 1 and chosen == "coalesce":
        with engine.coalesce_grad_reduction():
            value = gradient_cache(engine, micro_batches, loss, backward, rounds=rounds)
    else:
        value = gradient_cache(engine, micro_batches, loss, backward, rounds=rounds)
    engine.step()
    return value


def resolve(engine: Any, reduction: Reduction) -> Literal["coalesce", "boundary"]:
    if reduction == "auto":
        return "boundary" if engine.zero_optimization_stage() == 0 else "coalesce"
    return reduction
