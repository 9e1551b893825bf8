"""How abruptly labels change over the space: the steepest slope between two items (S070).

Konz & Mazurowski, 2024. The public code's branch for many classes tests labels for equality and so measures the pairs
that agree; here the numerator is 1 where they differ, as in the paper.
Suffixes: N vectors, D dimensions, M sampled ones.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.metrics.arrays import Floats, as_integers, as_vectors
from rayemb.evaluate.metrics.errors import MetricError


class LabelSharpness(NamedTuple):
    """In 1 / units of the vectors: scaling them by c divides the slopes by c."""

    maximum: float
    """The paper's figure; that of a single pair, and noisy."""
    high: float
    """The 99.9th percentile over all sampled pairs, of which those of one label have slope 0."""
    conflicts: int
    """Vectors of which another row is an exact copy with another label: their slope is infinite and not counted."""
    conflict_rows: NDArray[np.int64]
    """`(conflicts,)` int64, the rows of those vectors."""


def label_sharpness(
    vectors: Floats, labels: NDArray[np.int64], *, samples: int = 1000, seed: int = 0
) -> LabelSharpness:
    """The largest 1[labels differ] / ‖x - y‖ over pairs of sampled vectors; 0 where all labels are one.

    Compare only spaces of equal scale: normalise first where the model's own length means nothing. Conflicts are
    looked for among all rows, not only those sampled. O(N D log N + M² D) time, O(M²) memory.

    Args:
        vectors: `(N, D)` floats, finite, N > 1.
        labels: `(N,)` integers.
        samples: M, all rows where there are fewer.
        seed: which rows are sampled.
    """
    x_ND = as_vectors(vectors, "vectors", least=2, why="a pair")
    l_N = as_integers(labels, len(x_ND), "labels")
    if samples < 2:
        raise MetricError(f"a pair needs two vectors, got {samples}", where="samples")
    conflict_rows = _conflicts(x_ND, l_N)
    if len(x_ND) > samples:
        rows = np.random.default_rng(seed).choice(len(x_ND), samples, replace=False)
        x_ND, l_N = x_ND[rows], l_N[rows]
    slopes = [_slopes(x_ND[at], x_ND[at + 1 :], l_N[at] != l_N[at + 1 :]) for at in range(len(x_ND) - 1)]
    slopes_P = np.concatenate(slopes)
    if not len(slopes_P):
        raise MetricError("all vectors are one", where="vectors")
    high = float(np.quantile(slopes_P, 0.999))
    return LabelSharpness(float(slopes_P.max()), high, len(conflict_rows), conflict_rows)


def _slopes(x_D: NDArray[np.float64], y_MD: NDArray[np.float64], differ_M: NDArray[np.bool_]) -> NDArray[np.float64]:
    distance_M = np.linalg.norm(y_MD - x_D, axis=1)
    there_M = distance_M > 0
    slopes: NDArray[np.float64] = differ_M[there_M] / distance_M[there_M]
    return slopes


def _conflicts(x_ND: NDArray[np.float64], l_N: NDArray[np.int64]) -> NDArray[np.int64]:
    _, of_N = np.unique(x_ND, axis=0, return_inverse=True)
    of_N = of_N.reshape(-1)
    kinds = np.unique(np.stack([of_N, l_N], axis=1), axis=0)[:, 0]
    groups, labels = np.unique(kinds, return_counts=True)
    return np.flatnonzero(np.isin(of_N, groups[labels > 1]))
