"""Diagnostics against the cards' figures, naive loops, autograd and closed forms."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from rayemb.evaluate.metrics import (
    MetricError,
    Spread,
    alignment,
    collapse,
    mean_cosine,
    mean_cosine_of,
    negative_entropy,
    rankme,
    rankme_of,
    relative_penalties,
    spread,
    tolerance,
    uniformity,
    uniformity_sum,
)

Array = NDArray[np.float64]


def unit(rng: np.random.Generator, rows: int, dim: int) -> Array:
    x = rng.normal(size=(rows, dim))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_rankme_has_the_values_of_the_card() -> None:
    assert rankme(np.eye(8)) == pytest.approx(8.000007, abs=1e-6)
    assert rankme(np.eye(8), eps=0) == pytest.approx(8, abs=1e-12)
    assert rankme(np.ones((4, 4))) == pytest.approx(1.000005, abs=1e-6)
    assert rankme(np.ones((4, 4)), eps=0) == pytest.approx(1, abs=1e-6)
    assert rankme(np.diag([3.0, 1.0])) == pytest.approx(1.754765, abs=1e-6)
    # exp of the entropy of (3/4, 1/4), by hand.
    assert rankme(np.diag([3.0, 1.0]), eps=0) == pytest.approx(4 / 3**0.75, abs=1e-12)


def test_rankme_does_not_see_rotation_order_scale_copies_or_empty_columns() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=(40, 6)) * np.arange(1, 7)
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    for other in (z @ rotation, z[rng.permutation(40)], 17 * z, np.concatenate([z, z])):
        assert rankme(other) == pytest.approx(rankme(z), rel=1e-9)
    padded = np.pad(z, ((0, 0), (0, 3)))
    assert rankme(padded) == pytest.approx(rankme(z), rel=1e-5)
    assert rankme(padded, eps=0) == pytest.approx(rankme(z, eps=0), rel=1e-9)


@pytest.mark.parametrize(("rows", "dim"), [(200, 12), (5, 12), (12, 12)])
def test_rankme_from_shards_is_that_of_the_whole(rows: int, dim: int) -> None:
    z = np.random.default_rng(1).normal(size=(rows, dim)) * np.linspace(1, 1e-2, dim)
    shards = [spread(part) for part in np.split(z, [1, 1, rows // 2])]  # one of them is empty
    whole = Spread(*map(sum, zip(*shards, strict=True)))
    assert whole.rows == rows
    np.testing.assert_allclose(whole.total, z.sum(0))
    assert rankme_of(whole.gram, whole.rows) == pytest.approx(rankme(z), rel=1e-6)


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
    cosines = [x[i] @ x[j] for i, j in pairs]
    assert mean_cosine(x) == pytest.approx(np.mean(cosines))
    assert mean_cosine_of(x.sum(0), 23) == mean_cosine(x)


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


def test_a_collapse_is_told_from_a_small_rank() -> None:
    rng = np.random.default_rng(7)
    good = unit(rng, 300, 64)
    assert collapse(rankme(good), 300, 64, mean_cosine(good)) is None
    narrow = good @ np.diag([1.0] * 8 + [0.0] * 56)
    narrow /= np.linalg.norm(narrow, axis=1, keepdims=True)
    assert collapse(rankme(narrow), 300, 64, mean_cosine(narrow)) is None
    cone = unit(rng, 1, 64) + 0.01 * good
    cone /= np.linalg.norm(cone, axis=1, keepdims=True)
    assert "nearly one (mean cosine 0.99" in str(collapse(rankme(cone), 300, 64, mean_cosine(cone)))
    line = np.where(np.arange(300) % 2, 1.0, -1.0)[:, None] * unit(rng, 1, 64)
    assert "rank 1.00 of 64" in str(collapse(rankme(line), 300, 64, mean_cosine(line)))


def test_what_has_no_honest_figure_is_refused() -> None:
    x = unit(np.random.default_rng(8), 4, 3)
    with pytest.raises(MetricError, match="not of length 1"):
        uniformity(2 * x)
    with pytest.raises(MetricError, match="NaN or infinity"):
        rankme(np.full((2, 2), np.nan))
    with pytest.raises(MetricError, match="all vectors are zero"):
        rankme(np.zeros((2, 2)))
    with pytest.raises(MetricError, match="no class has two"):
        tolerance(x, np.arange(4))
    with pytest.raises(MetricError, match="two vectors, got 1"):
        uniformity(x[:1])
    with pytest.raises(MetricError, match="expected pairs"):
        alignment(x, x[:2])
    with pytest.raises(MetricError, match="no negatives"):
        relative_penalties(x[:, :1], np.zeros(4, np.int64), 0.1)
