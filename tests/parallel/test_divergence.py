"""Divergences over the candidates of all ranks: torch's own on one process, the same on two, in tiles."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from rayemb.parallel import ExchangeError, Gather, Ring, Tiling, divergence
from tests.parallel.processes import run_processes

SHARES = ((slice(0, 3), slice(0, 2)), (slice(3, 7), slice(2, 9)))  # anchors and candidates of each rank


def matrices(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((7, 4), (9, 4), (7, 6), (9, 6))
    return [2 * torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def expected() -> tuple[Tensor, Tensor, Tensor]:
    a, c, guide, others = matrices()
    a.requires_grad_()
    c.requires_grad_()
    student, teacher = F.log_softmax(a @ c.T, 1), F.log_softmax(guide @ others.T, 1)
    rows = F.kl_div(student, teacher, reduction="none", log_target=True).sum(1)
    (rows * torch.arange(1, 8)).sum().backward()
    return rows.detach(), a.grad, c.grad  # type: ignore[return-value]


@pytest.mark.parametrize("tile", [(1024, 1024), (2, 3), (1, 1)])
def test_on_one_process_it_is_torchs(tile: tuple[int, int]) -> None:
    from rayemb.parallel import Alone

    a, c, guide, others = matrices()
    a.requires_grad_()
    c.requires_grad_()
    rows = divergence((a, c), (guide, others), exchange=Alone(Tiling(*tile)))
    (rows * torch.arange(1, 8)).sum().backward()
    for found, wanted in zip((rows.detach(), a.grad, c.grad), expected(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def on_rank(rank: int, world: int) -> list[Any]:
    found: list[Any] = []
    for exchange in (Gather(Tiling(2, 3)), Ring(Tiling(2, 3))):
        anchors, candidates = SHARES[rank]
        a, c, guide, others = (x[share] for x, share in zip(matrices(), [anchors, candidates] * 2, strict=True))
        a, c = a.clone().requires_grad_(), c.clone().requires_grad_()
        rows = divergence((a, c), (guide, others), exchange=exchange)
        (rows * torch.arange(1, 8)[anchors]).sum().backward()
        found.append((rows.detach(), a.grad, c.grad))
        with pytest.raises(ExchangeError, match="rank 1 of 2: student and teacher are of other rows"):
            divergence((a, c), (guide, others[: len(others) - rank]), exchange=exchange)
    return found


def test_two_ranks_have_the_values_and_gradients_of_one() -> None:
    ranks = run_processes(2, on_rank)
    for exchange in range(2):
        for part, wanted in enumerate(expected()):
            found = torch.cat([rank[exchange][part] for rank in ranks])
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_nothing_and_large_logits_are_finite() -> None:
    a, c, guide, others = matrices(torch.float32)
    assert divergence((a, c[:0]), (guide, others[:0])).tolist() == [0.0] * 7
    assert divergence((a[:0], c), (guide[:0], others)).shape == (0,)
    far = divergence((a * 100, c), (guide * 100, others))
    assert torch.isfinite(far).all()
    assert divergence((a, c), (a, c)).abs().max() < 1e-5
    assert (divergence((a.bfloat16(), c.bfloat16()), (a.bfloat16(), c.bfloat16())).abs() < 1e-5).all()
