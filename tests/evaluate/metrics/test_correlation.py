"""Correlations against SciPy; none where one side is constant."""

import math

import numpy as np
import pytest
from scipy import stats

from rayemb.evaluate.metrics import MetricError, correlation


def test_it_is_scipys_with_and_without_ties() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=50)
    for y in (x + rng.normal(size=50), np.round(x), -np.exp(x)):
        found = correlation(x, y)
        assert found.spearman == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
        assert found.pearson == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-12)
    assert correlation(x, -np.exp(x)).spearman == pytest.approx(-1)


def test_a_constant_side_has_no_figure() -> None:
    scores = np.arange(10.0)
    noise = 0.5 + 1e-8 * np.random.default_rng(1).normal(size=10)
    for x, y in ((np.full(10, 0.3), scores), (scores, np.ones(10)), (noise, scores)):
        assert all(math.isnan(value) for value in correlation(x, y))


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [([1.0], [1.0], "two pairs"), ([1, 2], [1, 2, 3], "expected two"), ([1, np.nan], [1, 2], "NaN or infinity")],
)
def test_what_cannot_be_compared_is_refused(x: list[float], y: list[float], message: str) -> None:
    with pytest.raises(MetricError, match=message):
        correlation(np.array(x), np.array(y))
