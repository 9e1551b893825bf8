"""How many dimensions the vectors really fill, from the distances to their nearest neighbours (S070).

Konz & Mazurowski, 2024, on what it says of generalisation; the estimators are those of Levina & Bickel, 2004, with
the correction of MacKay & Ghahramani, 2005, and of Facco et al., 2017.
Suffixes: N vectors, D dimensions, K neighbours.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.diagnostics.neighbours import nearest
from rayemb.evaluate.metrics.arrays import Floats, as_vectors
from rayemb.evaluate.metrics.errors import MetricError


class IntrinsicDimension(NamedTuple):
    """Two estimates; where they differ much, the vectors are noisy at small scale or not one manifold."""

    mle: float
    """From the k nearest neighbours: the wider the look, the less noise and the more curvature it sees."""
    two_nn: float
    """From the two nearest alone."""
    duplicates: int
    """Rows left out since another row before them is the same: at distance 0 there is no ratio."""


def intrinsic_dimension(vectors: Floats, *, k: int = 20, discard: float = 0.1, block: int = 512) -> IntrinsicDimension:
    """The intrinsic dimension of `(N, D)` floats by maximum likelihood and by TwoNN. O(N² D) time, O(block · N) memory.

    Neither sees rotation, shift, scale or unused dimensions. Both need many vectors for a high dimension and are too
    low then (a 64-dimensional Gaussian of 2,000 measures 32 and 38): compare values of equal N.

    Args:
        k: neighbours of the likelihood estimate.
        discard: the share of the largest r2/r1 that TwoNN leaves out, as its authors do.

    Raises MetricError for fewer than k + 1 distinct vectors, and where all neighbours are equally far.
    """
    x_ND = np.unique(as_vectors(vectors, "vectors"), axis=0)
    if k < 2:
        raise MetricError(f"a ratio needs two neighbours, got k = {k}", where="k")
    if not 0 <= discard < 1:
        raise MetricError(f"expected a share in [0, 1), got {discard}", where="discard")
    if len(x_ND) <= k:
        raise MetricError(
            f"{k} neighbours need {k + 1} distinct vectors, got {len(x_ND)}", where="vectors", fix="lower k"
        )
    _, r_NK = nearest(x_ND, k, block=block)
    return IntrinsicDimension(_mle(r_NK), _two_nn(r_NK[:, 1] / r_NK[:, 0], discard), len(vectors) - len(x_ND))


def _mle(r_NK: NDArray[np.float64]) -> float:
    """One over the mean over vectors of mean ln(r_k / r_j), j < k: the inverses are averaged, not the dimensions."""
    inverse_N = np.log(r_NK[:, -1:] / r_NK[:, :-1]).mean(axis=1)
    return _inverse(float(inverse_N.mean()))


def _two_nn(ratio_N: NDArray[np.float64], discard: float) -> float:
    """The slope through the origin of -ln(1 - F(mu)) over ln(mu), mu = r2/r1, F the empirical distribution."""
    x_N = np.log(np.sort(ratio_N))
    keep = min(max(int(len(x_N) * (1 - discard)), 1), len(x_N) - 1)  # at the last one F is 1
    y_N = -np.log1p(-np.arange(1, keep + 1) / len(x_N))
    x_N = x_N[:keep]
    return _inverse(float((x_N @ x_N) / (x_N @ y_N)))


def _inverse(value: float) -> float:
    if not value > 0:
        raise MetricError("all neighbours are equally far, which no dimension explains", where="vectors")
    return 1 / value
