"""The mean cosine against a naive loop; a collapse is told from a small rank."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from rayemb.evaluate.diagnostics import collapse, mean_cosine, mean_cosine_of, rankme
from rayemb.evaluate.metrics import MetricError

Array = NDArray[np.float64]


def unit(rng: np.random.Generator, rows: int, dim: int) -> Array:
    x = rng.normal(size=(rows, dim))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_the_mean_cosine_is_that_of_a_naive_loop() -> None:
    x = unit(np.random.default_rng(2), 23, 5)
    cosines = [x[i] @ x[j] for i, j in itertools.product(range(23), repeat=2) if i != j]
    assert mean_cosine(x) == pytest.approx(np.mean(cosines))
    assert mean_cosine_of(x.sum(0), 23) == mean_cosine(x)
    with pytest.raises(MetricError, match="two vectors, got 1"):
        mean_cosine(x[:1])


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
