"""Whether vectors have collapsed: all nearly one, or all in a handful of directions."""

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.metrics.arrays import Floats, as_units
from rayemb.evaluate.metrics.errors import MetricError

COLLAPSED_RANK, COLLAPSED_COSINE = 0.02, 0.99
"""Below this share of the rank there could be, or above this mean cosine, vectors no longer tell their inputs apart."""


def mean_cosine(vectors: Floats) -> float:
    """The mean cosine of distinct pairs of unit vectors `(N, D)`, in [-1/(N-1), 1]: near 1, all are one vector."""
    x_ND = as_units(vectors, "vectors")
    return mean_cosine_of(x_ND.sum(axis=0), len(x_ND))


def mean_cosine_of(total: NDArray[np.float64], rows: int) -> float:
    """`mean_cosine` of N = `rows` unit vectors from their sum `(D,)`."""
    if rows < 2:
        raise MetricError(f"pairs need two vectors, got {rows}", where="vectors")
    return float((np.square(total).sum() - rows) / (rows * (rows - 1)))


def collapse(rank: float, rows: int, dim: int, cosine: float) -> str | None:
    """Why N = `rows` vectors of `dim` dimensions count as collapsed, in words; None where they do not.

    Args:
        rank: their `rankme`; too low below 2 % of min(N, D), unless that is less than 2.
        cosine: their `mean_cosine`; too high above 0.99.
    """
    most = min(rows, dim)
    if cosine > COLLAPSED_COSINE:
        return f"all vectors are nearly one (mean cosine {cosine:.4f})"
    if most > 1 and rank < max(1.05, COLLAPSED_RANK * most):
        return f"the vectors have rank {rank:.2f} of {most}"
    return None
