"""How far one softmax over the candidates of all ranks is from another one: distillation, tile by tile.

Nothing (anchors x candidates) large is kept, as in `contrast`. Shapes: B anchors, C candidates of this rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rayemb.parallel.exchange import Alone, Exchange
from rayemb.parallel.tiles import add_product, product, widened


def divergence(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor], *, exchange: Exchange | None = None
) -> Tensor:
    """`KL(softmax(teacher's logits) || softmax(student's logits))` of each anchor, `(B,)`, fp32 or better.

    Each is `(anchors (B, D), candidates (C, D))`, D may differ between them; a logit is a product of their rows, over
    the candidates of all ranks. The teacher gets no gradient. Gradients are those of the sum over ranks, as in
    `contrast`. Every rank must call it, in the same order. 0 where no rank has a candidate.

    Raises ExchangeError, on every rank, if one rank's student and teacher are of other rows.
    """
    exchange = exchange or Alone()
    (anchors, candidates), (guide_anchors, guides) = student, teacher
    shapes = [tuple(x.shape) for x in (anchors, candidates, guide_anchors, guides)]
    fit = shapes[0][0] == shapes[2][0] and shapes[1][0] == shapes[3][0]
    # Backward exchanges, too: all ranks must come to it or none.
    graph = torch.is_grad_enabled() and (anchors.requires_grad or candidates.requires_grad)
    alike = f"vectors of {shapes[1][1:]} and {shapes[3][1:]}, {'a graph' if graph else 'no graph'}"
    problem = None if fit else f"student and teacher are of other rows: {shapes}"
    sizes = [size for (size,) in exchange.agree(problem, candidates.shape[0], alike=alike)]
    found: Tensor = _Divergence.apply(  # type: ignore[no-untyped-call]
        anchors, candidates, guide_anchors.detach(), guides.detach(), exchange, sizes
    )
    return found


class _Divergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        anchors: Tensor,
        candidates: Tensor,
        above: Tensor,
        guides: Tensor,
        exchange: Exchange,
        sizes: list[int],
    ) -> Tensor:
        visits, tile = exchange.visits((candidates.detach(), guides), sizes), exchange.tiling.sizes(anchors.device)
        dtype = torch.float64 if anchors.dtype == torch.float64 else torch.float32
        student = torch.full((anchors.shape[0],), float("-inf"), dtype=dtype, device=anchors.device)
        teacher, gap = student.clone(), torch.zeros_like(student)
        for _, block in visits.blocks():
            for rows, columns in _tiles(anchors.shape[0], block[0].shape[0], tile):
                s, t = _logits(anchors[rows], block[0][columns]), _logits(above[rows], block[1][columns])
                both = torch.logsumexp(t, 1)
                joined = torch.logaddexp(teacher[rows], both)
                # The teacher's mean of (its logit - the student's), over what has gone by.
                mean = ((t - both[:, None]).exp() * (t - s)).sum(1)
                gap[rows] = gap[rows] * (teacher[rows] - joined).exp() + mean * (both - joined).exp()
                teacher[rows] = joined
                student[rows] = torch.logaddexp(student[rows], torch.logsumexp(s, 1))
        ctx.visits, ctx.tile, ctx.dtype = visits, tile, candidates.dtype
        ctx.save_for_backward(anchors, above, student, teacher)
        return gap - teacher + student if sum(sizes) else gap

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:
        anchors, above, student, teacher = ctx.saved_tensors
        d_anchors = torch.zeros_like(anchors, dtype=student.dtype)

        def compute(owner: int, block: tuple[Tensor, ...], d_candidates: Tensor) -> None:
            for rows, columns in _tiles(anchors.shape[0], block[0].shape[0], ctx.tile):
                s, t = _logits(anchors[rows], block[0][columns]), _logits(above[rows], block[1][columns])
                grad = (s - student[rows, None]).exp() - (t - teacher[rows, None]).exp()
                grad *= grads[0][rows, None]
                add_product(d_anchors[rows], grad, block[0][columns])
                add_product(d_candidates[columns], grad.T, anchors[rows])

        d_candidates = ctx.visits.collect(compute).to(ctx.dtype)
        return d_anchors.to(anchors.dtype), d_candidates, None, None, None, None


def _tiles(rows: int, columns: int, tile: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    for left in range(0, columns, tile[1]):
        for top in range(0, rows, tile[0]):
            yield slice(top, min(top + tile[0], rows)), slice(left, min(left + tile[1], columns))


def _logits(anchors: Tensor, candidates: Tensor) -> Tensor:
    return product(anchors, candidates if anchors.element_size() == 2 else widened(candidates))
