"""What is computed on one tile of logits `(b, m)`, in fp32 or better; masked entries are -inf.

Plain expressions: eager on CPU (what is new is changed in place: half the memory), fused by `torch.compile` on a GPU.
(`torch.logsumexp` took 20 times as long as these on CPU, torch 2.13.)
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger(__name__)

KernelName = Literal["auto", "eager", "compiled"]


@dataclass(frozen=True)
class Tiling:
    """Size of a tile and who computes it. None: chosen for the device."""

    rows: int | None = None
    columns: int | None = None
    kernels: KernelName = "auto"

    def sizes(self, device: torch.device) -> tuple[int, int]:
        """Rows and columns of a tile: 4 MiB of fp32 logits on CPU, 128 MiB on a GPU unless said otherwise."""
        rows, columns = (4096, 8192) if device.type == "cuda" else (1024, 1024)
        return self.rows or rows, self.columns or columns


def row_lse(logits: Tensor) -> Tensor:
    """Log-sum-exp of each row `(b,)`; -inf where everything is masked."""
    return _lse(logits, 1)


def column_lse(logits: Tensor) -> Tensor:
    """Log-sum-exp of each column `(m,)`; -inf where everything is masked."""
    return _lse(logits, 0)


def row_gradient(logits: Tensor, lse: Tensor, grad: Tensor) -> Tensor:
    """`grad * exp(logits - lse)`: a tile's part of the gradient of row log-sum-exps `(b,)` over all tiles."""
    return _softmax(logits, lse[:, None]).mul_(grad[:, None])


def column_gradient(logits: Tensor, lse: Tensor, grad: Tensor) -> Tensor:
    """The same of column log-sum-exps `(m,)`."""
    return _softmax(logits, lse[None]).mul_(grad[None])


def softplus_sum(logits: Tensor) -> Tensor:
    """`sum_j log(1 + exp(logits_j))` per row (F.softplus is linear above 20: 2e-9 off)."""
    return -F.logsigmoid(-logits).sum(1)


def softplus_gradient(logits: Tensor, grad: Tensor) -> Tensor:
    """`grad * sigmoid(logits)`, `grad` a row's."""
    return torch.sigmoid(logits) * grad[:, None]


def _lse(logits: Tensor, dim: int) -> Tensor:
    peak = logits.amax(dim, keepdim=True)
    peak = peak.masked_fill(peak == float("-inf"), 0.0)
    return ((logits - peak).exp_().sum(dim, keepdim=True).log() + peak).squeeze(dim)


def _softmax(logits: Tensor, lse: Tensor) -> Tensor:
    # Where nothing was left to sum, lse is -inf and so are the logits: 0, not nan.
    return (logits - lse.masked_fill(lse == float("-inf"), 0.0)).exp_()


@dataclass(frozen=True)
class Kernels:
    """The functions above, plain or compiled. (One for rows, one for columns: a shared one would keep recompiling.)"""

    row_lse: Callable[[Tensor], Tensor] = row_lse
    column_lse: Callable[[Tensor], Tensor] = column_lse
    row_gradient: Callable[[Tensor, Tensor, Tensor], Tensor] = row_gradient
    column_gradient: Callable[[Tensor, Tensor, Tensor], Tensor] = column_gradient
    softplus_sum: Callable[[Tensor], Tensor] = softplus_sum
    softplus_gradient: Callable[[Tensor, Tensor], Tensor] = softplus_gradient


EAGER = Kernels()


def kernels_for(name: KernelName, device: torch.device) -> Kernels:
    """The kernels of that name; `auto` compiles on CUDA. Falls back to eager, with one log line, if that fails."""
    if name == "eager" or (name == "auto" and device.type != "cuda"):
        return EAGER
    return _compiled(device)


@cache
def _compiled(device: torch.device) -> Kernels:
    functions = (row_lse, column_lse, row_gradient, column_gradient, softplus_sum, softplus_gradient)
    try:
        compiled = Kernels(*(torch.compile(function, dynamic=True) for function in functions))
        tile, side = torch.zeros(8, 8, device=device), torch.zeros(8, device=device)
        for lse, gradient in (
            (compiled.row_lse, compiled.row_gradient),
            (compiled.column_lse, compiled.column_gradient),
        ):
            gradient(tile, lse(tile), side)
        compiled.softplus_gradient(tile, compiled.softplus_sum(tile))
    except Exception as error:  # whatever the compiler of this machine lacks: the eager kernels need nothing
        logger.warning("tiles run uncompiled on %s: %s", device, _first_line(error))
        return EAGER
    return compiled


def product(anchors: Tensor, candidates: Tensor) -> Tensor:
    """`anchors @ candidates.T` accumulated in fp32; on CUDA, 16-bit inputs go through the tensor cores as they are."""
    if anchors.dtype == candidates.dtype and anchors.element_size() == 2 and anchors.is_cuda:
        out: Tensor = torch.mm(anchors, candidates.T, out_dtype=torch.float32)
        return out
    with _full_precision(anchors):
        return widened(anchors) @ widened(candidates).T


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right` in `total`'s precision; see `product`."""
    if right.element_size() == 2 and right.is_cuda:
        total += torch.mm(left.to(right.dtype), right, out_dtype=torch.float32)
    else:
        with _full_precision(right):
            total.addmm_(left, widened(right))


def _full_precision(rows: Tensor) -> torch.autocast:
    # Autocast would make a product of fp32 one of 16 bits; a backward inside of it is under autocast as well.
    return torch.autocast(rows.device.type, enabled=False)


def widened(rows: Tensor) -> Tensor:
    """The rows in fp32, or as they are if they have that already."""
    return rows if rows.element_size() >= 4 else rows.float()


def _first_line(error: Exception) -> Any:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
