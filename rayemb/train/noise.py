"""The gradient noise scale: how many pairs a batch may have before more of them stop paying.

The gradient of a batch is the mean of what its micro-batches give. By how much those are longer than their mean tells
the noise of one pair's gradient, tr(S), from the gradient itself, |G|^2; their ratio is the batch at which both weigh
the same. Far below it twice the batch takes half the steps; far above it more pairs change little (McCandlish et al.
2018, "An Empirical Model of Large-Batch Training", appendix A.1). In contrastive learning a larger batch also has more
negatives, so that the figure is of the loss at this batch size.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rayemb.parallel import Exchange

SCALE, TRACE, SQUARE = "noise/scale", "noise/trace", "noise/square"
# One step says little, and its |G|^2 may even come out negative: both parts are averaged before they are divided.
_DECAY = 0.9
_SPAN = 100  # reports that are averaged: an earlier one would weigh 3e-5


class GradientNoise:
    """Watches gradients as they are, before ranks average them; costs a pass over them in the steps it measures.

    `network`: what micro-batches share in, the parameters of an engine's module once the engine is there. `losses`: the
    parameters of the losses, whose gradient comes whole with one micro-batch and is left out of the figures.
    Micro-batches are taken to be of one size.
    """

    def __init__(self, network: Iterable[nn.Parameter], losses: Iterable[nn.Parameter], exchange: Exchange) -> None:
        self._exchange = exchange
        self._measures = False
        self._squares: list[Tensor] = []
        self._losses = [parameter for parameter in losses if parameter.requires_grad]
        self._of_losses: dict[int, Tensor] = {}
        for parameter in network:
            if parameter.requires_grad:
                parameter.register_hook(self._see)  # type: ignore[no-untyped-call]
        for number, parameter in enumerate(self._losses):
            parameter.register_hook(partial(self._see_loss, number))  # type: ignore[no-untyped-call]

    def begin_step(self, measure: bool) -> None:
        """Call it before a step, with whether `figures` will be asked for after it, on all ranks alike."""
        self._measures, self._squares, self._of_losses = measure, [], {}

    def figures(
        self, micro_batches: int, rows: int, norm: float, history: Sequence[Mapping[str, Any]]
    ) -> dict[str, float | None]:
        """What the step tells, collectively: nothing if it was not measured.

        Args:
            micro_batches: that this rank had.
            rows: of the whole batch.
            norm: of the whole batch's gradient, of losses too, before clipping.
            history: what was reported before; earlier figures in it smooth the scale.

        Returns:
            tr(S) and |G|^2 of this step, and the scale in pairs; that is None while the gradient is all noise. Nothing
            if there is one micro-batch on one rank, which has nothing to differ from.
        """
        if not self._measures:
            return {}
        mine = float(torch.stack(self._squares).double().sum()) if self._squares else 0.0
        seen = self._exchange.everyone(torch.tensor([[mine, micro_batches]], dtype=torch.float64))
        total, count = seen.sum(0).tolist()
        if count < 2 or not rows:
            return {}
        whole = norm**2 - self._square_of_losses()
        # Ranks are averaged and micro-batches summed: on this scale each of them is an estimate of the whole gradient.
        mean = total * count / len(seen) ** 2
        trace, square = rows * (mean - whole) / (count - 1), (count * whole - mean) / (count - 1)
        parts = [(row[TRACE], row[SQUARE]) for row in history[-_SPAN:] if row.get(TRACE) is not None] + [
            (trace, square)
        ]
        weights = [_DECAY**age for age in range(len(parts))][::-1]
        noise, signal = (sum(w * part[of] for w, part in zip(weights, parts, strict=True)) for of in (0, 1))
        return {TRACE: trace, SQUARE: square, SCALE: noise / signal if signal > 0 else None}

    def _square_of_losses(self) -> float:
        """Of the gradient that the losses' own parameters have of the whole batch."""
        found = 0.0
        for number, parameter in enumerate(self._losses):
            gradient = self._of_losses.get(number, torch.zeros(parameter.shape, device=parameter.device))
            mean = self._exchange.reduce(gradient.double()) / self._exchange.world
            found += float(mean.square().sum())
        return found

    def _see(self, gradient: Tensor) -> None:
        if self._measures:
            exact = torch.promote_types(gradient.dtype, torch.float32)
            self._squares.append(torch.linalg.vector_norm(gradient.detach(), dtype=exact).square())

    def _see_loss(self, number: int, gradient: Tensor) -> None:
        if self._measures:
            before = self._of_losses.get(number)
            self._of_losses[number] = gradient.detach() if before is None else before + gradient.detach()
