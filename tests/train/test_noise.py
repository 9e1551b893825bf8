"""The noise scale of gradients whose mean and scatter are known."""

from typing import Any

import pytest
import torch
from torch import nn

from rayemb.parallel import Alone
from rayemb.train.noise import SCALE, SQUARE, TRACE, GradientNoise

DIM, PARTS, SIZE = 20, 8, 4


def measured(mean: torch.Tensor, scatter: float, steps: int) -> list[dict[str, Any]]:
    """Of the loss w x, whose gradient is x: normal around `mean`."""
    weights = nn.Parameter(torch.zeros(DIM, dtype=torch.float64))
    frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
    noise, history = GradientNoise([weights, frozen], [], Alone()), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        x = mean + scatter * torch.randn(PARTS * SIZE, DIM, generator=generator, dtype=torch.float64)
        weights.grad = None
        noise.begin_step(True)
        for part in x.chunk(PARTS):
            ((part @ weights).sum() / len(x)).backward()
        assert weights.grad is not None
        history.append(noise.figures(PARTS, len(x), float(weights.grad.norm()), history))
    return history


def test_it_is_the_scatter_of_one_pair_by_the_square_of_the_mean() -> None:
    mean, scatter, steps = torch.full((DIM,), 0.5, dtype=torch.float64), 3.0, 2000
    history = measured(mean, scatter, steps)
    trace, square = DIM * scatter**2, float(mean @ mean)
    for name, true in ((TRACE, trace), (SQUARE, square)):
        values = torch.tensor([row[name] for row in history], dtype=torch.float64)
        # Without bias: the mean of many is within four of its standard errors.
        assert float(values.mean()) == pytest.approx(true, abs=4 * float(values.std()) / steps**0.5)
    # Of ten steps or so, the last ones weighing most.
    assert history[-1][SCALE] == pytest.approx(trace / square, rel=0.5)
    last = [row for row in history if row[SCALE] is not None]
    assert len(last) > 0.9 * steps


def test_what_was_reported_before_smooths_what_comes() -> None:
    history = measured(torch.ones(DIM, dtype=torch.float64), 1.0, 3)
    weights = [0.81, 0.9, 1.0]
    noise = sum(w * row[TRACE] for w, row in zip(weights, history, strict=True))
    signal = sum(w * row[SQUARE] for w, row in zip(weights, history, strict=True))
    assert history[-1][SCALE] == pytest.approx(noise / signal)


def test_nothing_where_nothing_can_be_told() -> None:
    weights = nn.Parameter(torch.ones(3))
    noise = GradientNoise([weights], [], Alone())
    noise.begin_step(False)
    weights.sum().backward()
    assert noise.figures(2, 4, 1.0, []) == {}
    noise.begin_step(True)
    weights.sum().backward()
    assert noise.figures(1, 4, 1.0, []) == {}  # one micro-batch on one rank
    noise.begin_step(True)
    for _ in range(2):
        weights.sum().backward()
    # Both gradients alike: no noise.
    found = noise.figures(2, 4, float((2 * torch.ones(3)).norm()), [])
    assert (found[TRACE], found[SQUARE], found[SCALE]) == pytest.approx((0.0, 12.0, 0.0), abs=1e-5)
    noise.begin_step(True)
    for sign in (1, -1):
        (sign * weights.sum()).backward()
    assert noise.figures(2, 4, 0.0, [])[SCALE] is None  # all noise
