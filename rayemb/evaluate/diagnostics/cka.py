"""Do two spaces place the same items alike? Linear centred kernel alignment, without an N × N matrix.

Suffixes: N items, D and E dimensions of the two spaces.
"""

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.diagnostics.spaces import centred, two_spaces
from rayemb.evaluate.metrics.arrays import Floats


def linear_cka(x: Floats, y: Floats, *, unbiased: bool = True) -> float:
    """Linear CKA of `(N, D)` and `(N, E)`: 1 if they differ by a rotation, a scale and a shift only.

    (Kornblith et al., 2019.) **Biased** values, `unbiased=False`, lie in [0, 1] and are too high where N is not far
    above D: two tables of noise with N = D have .5. The **unbiased** ones use the HSIC of Song et al. (2012) in its
    linear form (Nguyen et al., 2021): about 0 for unrelated spaces at any N, and so slightly negative at times; in
    [-1, 1].

    Compare only values of the same items. CKA sees the directions of much variance most of all: two spaces can have
    .9 and disagree on every nearest neighbour (see `mutual_knn`).

    Args:
        x: `(N, D)` floats, finite. N ≥ 4 for the unbiased form, else 2.
        y: `(N, E)`, row i the same item as in `x`.

    Time O(N D E), memory O(min(N², D E)) beside the tables. Raises MetricError for tables of unequal length,
    non-finite rows (named), and a table that is one vector N times.
    """
    x_ND, y_NE = two_spaces(x, y, least=4 if unbiased else 2, why="CKA")
    x_ND, y_NE = centred(x_ND, "vectors"), centred(y_NE, "other")
    # The scale cancels. Without this, squares of squares of a float32's range leave float64's.
    x_ND, y_NE = x_ND / np.abs(x_ND).max(), y_NE / np.abs(y_NE).max()
    hsic = hsic_unbiased if unbiased else hsic_biased
    return float(hsic(x_ND, y_NE) / np.sqrt(hsic(x_ND, x_ND) * hsic(y_NE, y_NE)))


def hsic_biased(x_ND: NDArray[np.float64], y_NE: NDArray[np.float64]) -> float:
    """tr(K L) / (N - 1)² of the linear kernels of two *centred* tables (Gretton et al., 2005)."""
    return _trace(x_ND, y_NE) / (len(x_ND) - 1) ** 2


def hsic_unbiased(x_ND: NDArray[np.float64], y_NE: NDArray[np.float64]) -> float:
    """The unbiased HSIC of the linear kernels of two tables (Song et al., 2012, equation 5), N ≥ 4.

    With K and L less their diagonals k and l, each of its three sums comes from the tables themselves: tr(KL) =
    ‖X'Y‖² - Σ k l, and row i of K sums to x_i · Σ x - k_i. Centring changes nothing but the rounding.
    """
    n = len(x_ND)
    k_N, l_N = (x_ND**2).sum(axis=1), (y_NE**2).sum(axis=1)
    rows_k_N, rows_l_N = x_ND @ x_ND.sum(axis=0) - k_N, y_NE @ y_NE.sum(axis=0) - l_N
    total = _trace(x_ND, y_NE) - k_N @ l_N
    total += rows_k_N.sum() * rows_l_N.sum() / ((n - 1) * (n - 2)) - 2 * (rows_k_N @ rows_l_N) / (n - 2)
    return float(total / (n * (n - 3)))


def _trace(x_ND: NDArray[np.float64], y_NE: NDArray[np.float64]) -> float:
    """tr(X X' Y Y') by the smaller of its two products."""
    if len(x_ND) ** 2 < x_ND.shape[1] * y_NE.shape[1]:
        return float(((x_ND @ x_ND.T) * (y_NE @ y_NE.T)).sum())
    return float(((x_ND.T @ y_NE) ** 2).sum())
