"""Confidence intervals of a mean over queries, when the queries come in families.

Cluster bootstrap (Cameron, Gelbach & Miller, 2008; Field & Welsh, 2007): whole clusters are drawn with
replacement. The queries of one concept succeed or fail together; drawing them one by one would pretend to
more evidence than there is and give intervals that are too narrow.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.metrics.errors import MetricError

_DRAWS = 1_000_000
"""Cluster draws held at once (24 MB): fixed, since the random stream is cut there."""


class Interval(NamedTuple):
    """A mean and the two ends of its confidence interval."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    values: NDArray[np.float64],
    clusters: NDArray[np.int64] | None = None,
    *,
    seed: int,
    confidence: float = 0.95,
    samples: int = 2000,
) -> Interval:
    """The mean of `values` with a percentile bootstrap interval.

    Args:
        values: `(Q,)` finite floats, one a query: `hits_at(...)`, `reciprocal_ranks(...)`.
        clusters: `(Q,)` integers: queries of the same number are drawn together. None: each query for itself.
        seed: the same seed gives the same interval.
        confidence: nominal coverage, between 0 and 1.
        samples: bootstrap samples.

    The interval speaks of other *queries* from the same source, for this one model; it says nothing of
    other training seeds. Percentile intervals are too narrow with fewer than about twenty clusters, and
    have no width where all values are equal. Raises MetricError for wrong shapes, non-finite values, or
    fewer than two clusters.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1 or not len(values):
        raise MetricError(f"expected floats (Q,) with Q > 0, got {values.shape}", where="values")
    if not np.isfinite(values).all():
        raise MetricError(f"{int((~np.isfinite(values)).sum()):,} values are NaN or infinite", where="values")
    if not 0 < confidence < 1 or samples < 1:
        raise MetricError(
            f"no interval for confidence {confidence} from {samples} samples",
            where="confidence, samples",
            fix="confidence lies between 0 and 1, samples is positive",
        )
    sums_C, sizes_C = _totals(values, clusters)
    if len(sums_C) < 2:
        raise MetricError("one cluster alone has no spread", where="clusters", fix="bring queries of two or more")

    rng = np.random.default_rng(seed)
    means = np.empty(samples)
    step = max(1, _DRAWS // len(sums_C))
    for start in range(0, samples, step):
        count = min(step, samples - start)
        drawn = rng.integers(0, len(sums_C), size=(count, len(sums_C)))
        # A ratio of totals: clusters differ in size, so that the number of queries is random too.
        means[start : start + count] = sums_C[drawn].sum(axis=1) / sizes_C[drawn].sum(axis=1)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(values.mean()), float(low), float(high))


def paired_bootstrap(
    a: NDArray[np.float64],
    b: NDArray[np.float64],
    clusters: NDArray[np.int64] | None = None,
    *,
    seed: int,
    confidence: float = 0.95,
    samples: int = 2000,
) -> Interval:
    """The mean of `a - b` over the same queries and its interval, which excludes 0 where the systems differ.

    `a` and `b` are `(Q,)`, query by query; what makes a query hard is in both and cancels, so that this
    interval is narrower than two separate ones suggest. Other arguments and errors as for
    `bootstrap_interval`.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise MetricError(f"the systems answered different queries: {a.shape} and {b.shape}", where="a, b")
    return bootstrap_interval(a - b, clusters, seed=seed, confidence=confidence, samples=samples)


def _totals(
    values: NDArray[np.float64], clusters: NDArray[np.int64] | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Sum `(C,)` and number `(C,)` of the values of each cluster."""
    if clusters is None:
        return values, np.ones(len(values))
    clusters = np.asarray(clusters)
    if clusters.shape != values.shape:
        raise MetricError(f"expected one entry a value, {values.shape}, got {clusters.shape}", where="clusters")
    _, member = np.unique(clusters, return_inverse=True)
    return np.bincount(member, weights=values).astype(np.float64), np.bincount(member).astype(np.float64)
