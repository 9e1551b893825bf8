"""The card's slopes, a naive loop, and noisy labels on digits."""

import math

import numpy as np
import pytest

from rayemb.evaluate.diagnostics import label_sharpness
from rayemb.evaluate.metrics import MetricError


def test_two_points_at_distance_two() -> None:
    x = np.array([[0.0, 0.0], [2.0, 0.0]])
    assert label_sharpness(x, np.array([3, 9])).maximum == 0.5
    assert label_sharpness(10 * x, np.array([3, 9])).maximum == 0.05
    assert label_sharpness(x, np.array([3, 3])).maximum == 0


def test_it_is_that_of_a_naive_loop_over_differing_pairs() -> None:
    rng = np.random.default_rng(0)
    x, labels = rng.normal(size=(40, 5)), rng.integers(0, 3, 40)
    slopes = [float(labels[i] != labels[j]) / math.dist(x[i], x[j]) for i in range(40) for j in range(i + 1, 40)]
    found = label_sharpness(x, labels)
    assert found.maximum == pytest.approx(max(slopes), rel=1e-12)
    assert found.high == pytest.approx(np.quantile(slopes, 0.999), rel=1e-12)
    order = rng.permutation(40)
    assert label_sharpness(x[order], labels[order])[:3] == pytest.approx(found[:3])
    # The names of the labels do not matter, only whether they differ.
    assert label_sharpness(x, np.array([100, -5, 7])[labels])[:3] == pytest.approx(found[:3])


def test_conflicts_are_counted_and_named_and_do_not_make_it_infinite() -> None:
    x = np.array([[0.0, 0], [0, 0], [3, 4], [3, 4], [0, 0]])
    found = label_sharpness(x, np.array([0, 1, 2, 2, 0]))
    assert found.maximum == pytest.approx(0.2)
    assert found.conflicts == 3
    assert found.conflict_rows.tolist() == [0, 1, 4]


@pytest.mark.parametrize("seed", range(3))
def test_noisy_labels_are_sharper(digits, seed: int) -> None:
    rng = np.random.default_rng(seed)
    noisy = np.where(rng.random(len(digits.labels)) < 0.1, (digits.labels + rng.integers(1, 10)) % 10, digits.labels)
    clean, flipped = (label_sharpness(digits.pixels, labels, seed=seed) for labels in (digits.labels, noisy))
    assert flipped.high > 1.2 * clean.high
    assert flipped.maximum > 1.2 * clean.maximum
    assert label_sharpness(digits.pixels, noisy, seed=seed)[:3] == flipped[:3]


def test_what_has_no_slope_is_refused() -> None:
    with pytest.raises(MetricError, match="all vectors are one"):
        label_sharpness(np.ones((3, 2)), np.arange(3))
    with pytest.raises(MetricError, match="vectors: a pair needs 2 vectors"):
        label_sharpness(np.ones((1, 2)), np.arange(1))
    with pytest.raises(MetricError, match="labels: expected 3 entries"):
        label_sharpness(np.eye(3), np.arange(2))
    with pytest.raises(MetricError, match="1 of 2 vectors hold NaN"):
        label_sharpness(np.array([[np.inf], [0.0]]), np.arange(2))
    with pytest.raises(MetricError, match="samples: a pair needs two"):
        label_sharpness(np.eye(3), np.arange(3), samples=1)
