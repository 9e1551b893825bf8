"""Do two spaces agree on who is near whom? The share of nearest neighbours that they have in common.

Suffixes: N items, D and E dimensions of the two spaces, B rows of one block.
"""

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.diagnostics.spaces import two_spaces
from rayemb.evaluate.metrics.arrays import Floats
from rayemb.evaluate.metrics.errors import MetricError

TIE = 1e-9
"""Products of float64 unit vectors closer than this are a tie: rounding is below 1e-12, float32's own steps above."""


class MutualKNN(NamedTuple):
    """How many nearest neighbours two spaces share."""

    mean: float
    """Mean share of common neighbours, in [0, 1]."""
    chance: float
    """k / (N - 1), what unrelated spaces have."""
    k: int
    items: NDArray[np.float64]
    """`(N,)` the share of each item, for intervals and for a look at where the spaces part."""


def mutual_knn(
    x: Floats,
    y: Floats,
    *,
    k: int = 10,
    metric: Literal["cosine", "euclidean"] = "cosine",
    block: int = 1024,
) -> MutualKNN:
    """The mean share of the k nearest neighbours that `(N, D)` and `(N, E)` have in common (Huh et al., 2024).

    An item is no neighbour of its own. **Ties are drawn by lot**: of the items tied at the k-th place each is a
    neighbour with the same probability, and the share is the expected one. Libraries let the sort decide, by row
    number in both spaces alike, so that two spaces without any structure agree on everything; here they have the
    share of chance, k / (N - 1).

    Args:
        x: `(N, D)` floats, finite.
        y: `(N, E)`, row i the same item as in `x`.
        k: neighbours, 1 ≤ k < N.
        metric: "cosine" (vectors need a direction), or "euclidean".
        block: rows at a time; memory O(block · N), time O(N² (D + E)).

    Raises MetricError for tables of unequal length, non-finite or (cosine) zero rows, named, and k ≥ N.
    """
    x_ND, y_NE = two_spaces(x, y, least=2, why="a neighbour")
    rows = len(x_ND)
    if not 1 <= k < rows:
        raise MetricError(f"{rows:,} items have 1 to {rows - 1:,} neighbours, got k = {k}", where="k")
    if block < 1:
        raise MetricError(f"a block has at least one row, got {block}", where="block")
    x_ND, y_NE = _prepared(x_ND, metric, "vectors"), _prepared(y_NE, metric, "other")
    shares_N = np.empty(rows)
    for start in range(0, rows, block):
        p_BN, q_BN = _neighbours(x_ND, start, block, k), _neighbours(y_NE, start, block, k)
        shares_N[start : start + block] = (p_BN * q_BN).sum(axis=1) / k
    return MutualKNN(float(shares_N.mean()), k / (rows - 1), k, shares_N)


def _prepared(x_ND: NDArray[np.float64], metric: str, name: str) -> NDArray[np.float64]:
    if metric == "euclidean":
        x_ND = x_ND - x_ND.mean(axis=0)
        scale = np.linalg.norm(x_ND, axis=1).max()
        return x_ND / scale if scale > 0 else x_ND
    if metric != "cosine":
        raise MetricError(f"cosine or euclidean, got {metric!r}", where="metric")
    length_N = np.linalg.norm(x_ND, axis=1)
    zero = np.flatnonzero(length_N == 0)
    if len(zero):
        raise MetricError(f"row {zero[0]:,} is zero, so it has no cosine ({len(zero):,} are)", where=name)
    unit_ND: NDArray[np.float64] = x_ND / length_N[:, None]
    return unit_ND


def _neighbours(x_ND: NDArray[np.float64], start: int, block: int, k: int) -> NDArray[np.float64]:
    """`(B, N)` how probably each item is one of the row's k nearest: 1, 0, or a share of what a tie leaves."""
    part_BD = x_ND[start : start + block]
    # -‖a - b‖²/2 without ‖a‖²/2, which is one number a row: on unit vectors the order of the cosine.
    near_BN = part_BD @ x_ND.T - (x_ND**2).sum(axis=1) / 2
    rows = np.arange(len(part_BD))
    near_BN[rows, start + rows] = -np.inf
    last_B1 = np.partition(near_BN, -k, axis=1)[:, -k, None]
    sure_BN = near_BN > last_B1 + TIE
    tied_BN = (near_BN >= last_B1 - TIE) & ~sure_BN
    left_B1 = k - sure_BN.sum(axis=1, keepdims=True)
    share_BN: NDArray[np.float64] = sure_BN + tied_BN * (left_B1 / tied_BN.sum(axis=1, keepdims=True))
    return share_BN
