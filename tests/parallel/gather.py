"""An all-gather with autograd, written on its own: what toy losses in tests exchange with.

If every rank scales the sum over its own rows by `GatheredRows.weight` and gradients are averaged over ranks,
parameters get the gradient of the mean over the whole batch.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class GatheredRows:
    """The rows of all ranks in rank order, and where this rank's own lie."""

    rows: Tensor  # (M, ...)
    start: int
    count: int
    world_size: int

    @property
    def weight(self) -> float:
        """Factor that turns a *sum* over this rank's rows into its share of the mean over all M rows.

        W / M rather than 1 / B: ranks are averaged afterwards, and a short last batch must not count double.
        """
        return self.world_size / self.rows.shape[0]


def gather_rows(local: Tensor) -> GatheredRows:
    """Rows `(B_r, ...)` of each rank r to `(M, ...)`, M the sum of all B_r; differentiable, B_r may differ.

    Without an initialised process group: the rows as they are. Costs O(M) memory a rank and one all-reduce of
    that size in backward (gloo has no ragged reduce-scatter).
    """
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return GatheredRows(local, 0, local.shape[0], 1)
    world, rank = dist.get_world_size(), dist.get_rank()
    sizes = [torch.zeros(1, dtype=torch.int64, device=local.device) for _ in range(world)]
    dist.all_gather(sizes, torch.tensor([local.shape[0]], dtype=torch.int64, device=local.device))
    counts = [int(size) for size in sizes]
    rows: Tensor = (
        _Gather.apply(local, counts, rank)  # type: ignore[no-untyped-call]
        if local.is_floating_point()
        else _gather(local, counts)
    )
    return GatheredRows(rows, sum(counts[:rank]), counts[rank], world)


def _gather(local: Tensor, counts: list[int]) -> Tensor:
    # gloo wants equal sizes: rows are padded to the longest rank and cut again.
    longest = max(counts)
    padded = local.new_zeros((longest, *local.shape[1:]))
    padded[: local.shape[0]] = local
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, local: Tensor, counts: list[int], rank: int) -> Tensor:
        ctx.start, ctx.count = sum(counts[:rank]), counts[rank]
        return _gather(local.detach(), counts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        # Every rank's loss used these rows, so their gradient is the sum over ranks, not this rank's part.
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.start : ctx.start + ctx.count], None, None
