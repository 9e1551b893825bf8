"""Uniformity, alignment, tolerance and penalties against naive loops, autograd and closed forms."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from rayemb.evaluate.diagnostics import (
    alignment,
    negative_entropy,
    relative_penalties,
    tolerance,
    uniformity,
    uniformity_sum,
)
from rayemb.evaluate.metrics import MetricError

Array = NDArray[np.float64]


def unit(rng: np.random.Generator, rows: int, dim: int) -> Array:
    x = rng.normal(size=(rows, dim))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_uniformity_alignment_and_tolerance_are_those_of_naive_loops() -> None:
    rng = np.random.default_rng(2)
    x, y, labels = unit(rng, 23, 5), unit(rng, 23, 5), rng.integers(0, 7, 23)
    pairs = [(i, j) for i, j in itertools.product(range(23), repeat=2) if i != j]
    expected = math.log(np.mean([math.exp(-2 * np.sum((x[i] - x[j]) ** 2)) for i, j in pairs]))
    assert uniformity(x, block=4) == pytest.approx(expected, rel=1e-12)
    shards = [uniformity_sum(x[a:b], x, a) for a, b in ((0, 9), (9, 9), (9, 23))]
    assert math.log(sum(shards) / len(pairs)) == pytest.approx(expected, rel=1e-12)
    assert alignment(x, y) == pytest.approx(np.mean([np.sum((a - b) ** 2) for a, b in zip(x, y, strict=True)]))
    same = [x[i] @ x[j] for i, j in pairs if labels[i] == labels[j]]
    assert tolerance(x, labels) == pytest.approx(np.mean(same))


def test_uniformity_on_the_sphere_and_of_one_vector() -> None:
    dim = 512
    # exp(-4) E exp(4 s), s of variance 1/D: -4 + 8/D.
    assert uniformity(unit(np.random.default_rng(3), 2000, dim)) == pytest.approx(-4 + 8 / dim, abs=2e-3)
    one = np.tile(unit(np.random.default_rng(4), 1, 8), (50, 1))
    assert uniformity(one) == pytest.approx(0, abs=1e-12)
    assert tolerance(one, np.zeros(50, np.int64)) == pytest.approx(1, abs=1e-12)
    assert alignment(one, one) == 0


def test_penalties_are_the_shares_of_the_gradient() -> None:
    rng = np.random.default_rng(5)
    x, y = torch.tensor(unit(rng, 9, 6)), torch.tensor(unit(rng, 12, 6))
    positives = torch.tensor(rng.integers(0, 12, 9))
    for temperature in (0.05, 0.5, 5.0):
        s = (x @ y.T).requires_grad_()
        F.cross_entropy(s / temperature, positives, reduction="sum").backward()
        assert s.grad is not None
        grad, at = s.grad.numpy(), (np.arange(9), positives.numpy())
        penalties = relative_penalties(s.detach().numpy(), positives.numpy(), temperature)
        np.testing.assert_allclose(grad.sum(1), 0, atol=1e-8)
        np.testing.assert_allclose(penalties.sum(1), 1, atol=1e-12)
        pull = -grad[at]
        grad[at] = 0
        np.testing.assert_allclose(grad, penalties * pull[:, None], atol=1e-8)


def test_the_entropy_of_the_penalties_rises_with_the_temperature() -> None:
    rng = np.random.default_rng(6)
    s, positives = unit(rng, 8, 6) @ unit(rng, 20, 6).T, np.arange(8)
    entropies = [negative_entropy(s, positives, tau) for tau in (1e-4, 0.05, 0.1, 0.3, 1, 10, 1e4)]
    assert all((low <= high + 1e-12).all() for low, high in itertools.pairwise(entropies))
    np.testing.assert_allclose(entropies[0], 0, atol=1e-6)
    np.testing.assert_allclose(entropies[-1], math.log(19), atol=1e-6)


def test_what_has_no_honest_figure_is_refused() -> None:
    x = unit(np.random.default_rng(8), 4, 3)
    with pytest.raises(MetricError, match="not of length 1"):
        uniformity(2 * x)
    with pytest.raises(MetricError, match="no class has two"):
        tolerance(x, np.arange(4))
    with pytest.raises(MetricError, match="two vectors, got 1"):
        uniformity(x[:1])
    with pytest.raises(MetricError, match="expected pairs"):
        alignment(x, x[:2])
    with pytest.raises(MetricError, match="no negatives"):
        relative_penalties(x[:, :1], np.zeros(4, np.int64), 0.1)
