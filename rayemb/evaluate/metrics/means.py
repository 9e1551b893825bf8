"""Means that say over which queries they go."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.metrics.arrays import as_integers
from rayemb.evaluate.metrics.errors import MetricError


class Mean(NamedTuple):
    """A mean, the number of queries in it, and of those left out because they have no figure."""

    value: float
    queries: int
    left_out: int


def mean_over(values: NDArray[np.float64], classes: NDArray[np.int64] | None = None) -> Mean:
    """The mean of `values` `(Q,)` over the queries that have a figure; NaN says that a query has none.

    Args:
        values: `(Q,)` floats, one a query, finite or NaN.
        classes: `(Q,)` integers. Given, the mean of the classes' means (a class counts the same whatever its size);
            None: the mean of the queries. The two differ wherever classes differ in size, so say which it is.

    Raises MetricError for wrong shapes, for an infinite value, and if no query has a figure.
    """
    values = np.asarray(values, np.float64)
    if values.ndim != 1:
        raise MetricError(f"expected floats (Q,), got {values.shape}", where="values")
    infinite = np.flatnonzero(np.isinf(values))
    if len(infinite):
        raise MetricError(f"query {infinite[0]} is infinite", where="values")
    there = ~np.isnan(values)
    if not there.any():
        raise MetricError(f"none of {len(values):,} queries has a figure, so there is no mean", where="values")
    count, left_out = int(there.sum()), int((~there).sum())
    if classes is None:
        return Mean(float(values[there].mean()), count, left_out)
    _, member = np.unique(as_integers(classes, len(values), "classes")[there], return_inverse=True)
    sums = np.bincount(member, weights=values[there])
    return Mean(float((sums / np.bincount(member)).mean()), count, left_out)
