"""How well similarities follow what people said of the same pairs."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.metrics.errors import MetricError

CONSTANT = 1e-6
"""Cosines closer together than this differ by rounding; what followed of their order would be noise."""


class Correlation(NamedTuple):
    """Both in [-1, 1]; NaN where one side is constant, for which there is no figure."""

    spearman: float
    pearson: float


def correlation(similarities: NDArray[np.float64], scores: NDArray[np.float64]) -> Correlation:
    """Of `(N,)` similarities with `(N,)` scores; equal values share the mean of their ranks."""
    x_N, y_N = (np.asarray(values, np.float64) for values in (similarities, scores))
    if x_N.ndim != 1 or x_N.shape != y_N.shape:
        raise MetricError(f"expected two of (N,), got {x_N.shape} and {y_N.shape}", where="scores")
    if len(x_N) < 2:
        raise MetricError(f"a correlation needs two pairs, got {len(x_N)}", where="scores")
    bad = int((~np.isfinite(x_N) | ~np.isfinite(y_N)).sum())
    if bad:
        raise MetricError(f"{bad:,} of {len(x_N):,} pairs hold NaN or infinity", where="scores")
    if np.ptp(x_N) < CONSTANT or np.ptp(y_N) == 0:
        return Correlation(float("nan"), float("nan"))
    from scipy import stats  # 0.6 s, and every worker of a training imports this module

    return Correlation(_pearson(stats.rankdata(x_N), stats.rankdata(y_N)), _pearson(x_N, y_N))


def _pearson(x_N: NDArray[np.float64], y_N: NDArray[np.float64]) -> float:
    x_N, y_N = x_N - x_N.mean(), y_N - y_N.mean()
    return float((x_N @ y_N) / np.sqrt((x_N @ x_N) * (y_N @ y_N)))
