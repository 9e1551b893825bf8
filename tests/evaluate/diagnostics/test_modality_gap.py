"""The gap against naive loops; shifting one side closes it; untrained towers have one, as Liang et al. found."""

import itertools

import numpy as np
import pytest
import torch

from rayemb.evaluate.diagnostics import modality_gap
from rayemb.evaluate.metrics import MetricError


def test_the_figures_are_those_of_naive_loops() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 6)) + 1, rng.normal(size=(20, 6)) - 0.5
    found = modality_gap(x, y)
    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y))
    assert found.distance == pytest.approx(np.linalg.norm(x.mean(0) - y.mean(0)), rel=1e-12)
    matched = np.mean([1 - a @ b for a, b in zip(x, y, strict=True)])
    pairs = list(itertools.permutations(range(20), 2))
    within = sum(1 - v[i] @ v[j] for v in (x, y) for i, j in pairs) / (2 * len(pairs))
    assert found.relative == pytest.approx(matched / (within + matched), rel=1e-12)
    both = np.concatenate([x, y])
    sides = np.repeat([x.mean(0), y.mean(0)], 20, axis=0)
    between = ((sides - both.mean(0)) ** 2).sum() / ((both - both.mean(0)) ** 2).sum()
    assert found.share == pytest.approx(between, rel=1e-12)
    own = [np.linalg.norm(v - x.mean(0)) < np.linalg.norm(v - y.mean(0)) for v in both]
    assert found.separable == pytest.approx(np.mean(np.array(own) == (np.arange(40) < 20)))


def test_the_ends_of_the_scale() -> None:
    x = np.random.default_rng(1).normal(size=(50, 8))
    assert modality_gap(x, x) == pytest.approx((0, 0, 0, 0.5), abs=1e-9)
    one = np.tile([[0.0, 2.0]], (5, 1))
    assert modality_gap(one, -one) == pytest.approx((2, 1, 1, 1))
    assert modality_gap(one, one) == pytest.approx((0, 0, 0, 0.5))


def test_it_does_not_see_rotation_order_length_or_which_side_is_first() -> None:
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(30, 5)) + 0.3, rng.normal(size=(30, 5))
    rotation, order = np.linalg.qr(rng.normal(size=(5, 5)))[0], rng.permutation(30)
    for a, b in ((x @ rotation, y @ rotation), (x[order], y[order]), (3 * x, 0.1 * y), (y, x)):
        assert modality_gap(a, b) == pytest.approx(modality_gap(x, y), rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_untrained_towers_have_a_gap_that_a_shift_closes(digits, seed: int) -> None:
    # The cone effect: each random network sends all inputs into a narrow cone of its own.
    with torch.random.fork_rng():
        torch.manual_seed(seed)

        def tower() -> torch.nn.Sequential:
            layers = [m for _ in range(4) for m in (torch.nn.Linear(64, 64), torch.nn.ReLU())]
            return torch.nn.Sequential(*layers, torch.nn.Linear(64, 64))

        pixels = torch.tensor(digits.pixels[:500], dtype=torch.float32)
        with torch.no_grad():
            a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (tower()(pixels).numpy() for _ in range(2)))
    found = modality_gap(a, b)
    assert found.distance > 0.8
    assert found.separable == 1
    assert found.share > 0.7
    closed = modality_gap(a - a.mean(0), b - b.mean(0))
    assert closed.distance < found.distance / 5
    assert closed.separable < 0.7


def test_what_are_no_pairs_is_refused() -> None:
    with pytest.raises(MetricError, match="pairs: expected pairs"):
        modality_gap(np.eye(3), np.eye(3)[:2])
    with pytest.raises(MetricError, match="two pairs, got 1"):
        modality_gap(np.eye(3)[:1], np.eye(3)[:1])
    with pytest.raises(MetricError, match="pairs: 1 of 3 vectors hold NaN"):
        modality_gap(np.eye(3), np.where(np.eye(3) * [1, 0, 0], np.nan, 1.0))
    with pytest.raises(MetricError, match=r"vectors: 3 of 3 vectors are zero \(first: row 0\)"):
        modality_gap(np.zeros((3, 3)), np.eye(3))
