"""The modality gap: how far apart the two sides of a two-tower model lie (Liang et al., 2022).

Suffixes: N pairs, D dimensions.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.metrics.arrays import Floats, normalised
from rayemb.evaluate.metrics.errors import MetricError


class ModalityGap(NamedTuple):
    """All are 0 where both sides are the same vectors, but `separable`, which is 0.5 then."""

    distance: float
    """‖Δ‖ in [0, 2], Δ the difference of the two sides' means."""
    relative: float
    """In [0, 1]: a pair's mean cosine distance against that within a side (Schrodi et al., 2025); 0.5: the same."""
    share: float
    """The share of all variance, in [0, 1], that tells the sides apart along Δ."""
    separable: float
    """The share of vectors nearer to their own side's mean than to the other's: 1, and cosines across sides and
    within one cannot be put into one list."""


def modality_gap(vectors: Floats, pairs: Floats) -> ModalityGap:
    """The gap between `(N, D)` vectors and `(N, D)` their pairs, N > 1, all taken at length 1. O(N D)."""
    x_ND, y_ND = normalised(vectors, "vectors"), normalised(pairs, "pairs")
    if x_ND.shape != y_ND.shape:
        raise MetricError(f"expected pairs, got {x_ND.shape} and {y_ND.shape}", where="pairs")
    rows = len(x_ND)
    if rows < 2:
        raise MetricError(f"a spread needs two pairs, got {rows}", where="pairs")
    x_D, y_D = x_ND.mean(axis=0), y_ND.mean(axis=0)
    gap_D = x_D - y_D
    gap = float(gap_D @ gap_D)
    # Unit vectors: the pooled variance is 1 minus the squared length of the pooled mean.
    variance = 1 - float(np.square((x_D + y_D) / 2).sum())
    matched = 1 - float((x_ND * y_ND).sum(axis=1).mean())
    within = (_apart(x_D, rows) + _apart(y_D, rows)) / 2
    total = within + matched
    middle = float(gap_D @ (x_D + y_D)) / 2
    own = _side(x_ND @ gap_D - middle) + _side(middle - y_ND @ gap_D)
    return ModalityGap(
        distance=gap**0.5,
        relative=matched / total if total > 1e-12 else 0.0,
        share=gap / 4 / variance if variance > 1e-12 else 0.0,
        separable=own / (2 * rows),
    )


def _apart(mean_D: NDArray[np.float64], rows: int) -> float:
    """The mean cosine distance of distinct pairs of unit vectors, from their mean."""
    return 1 - float((rows**2 * (mean_D @ mean_D) - rows) / (rows * (rows - 1)))


def _side(score_N: NDArray[np.float64]) -> float:
    """How many are on their own side; one in the middle counts half."""
    return float((score_N > 1e-12).sum() + (abs(score_N) <= 1e-12).sum() / 2)
