"""Which directions do two spaces share, whatever their bases? Canonical correlations of their main subspaces.

Suffixes: N items, D and E dimensions of the two spaces, K of the smaller subspace that is kept.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.diagnostics.spaces import centred, two_spaces
from rayemb.evaluate.metrics.arrays import Floats
from rayemb.evaluate.metrics.errors import MetricError

ROUNDING = 1e-10
"""Singular values below this share of the largest are rounding, not directions."""


class SVCCA(NamedTuple):
    """The canonical correlations of two spaces, and of what."""

    mean: float
    """Mean canonical correlation, in [0, 1]."""
    kept: int
    """Directions kept of the first space."""
    kept_other: int
    chance: float
    """The root mean square of unrelated noise of this shape, √(larger number kept / (N - 1)): what means nothing."""
    correlations: NDArray[np.float64]
    """`(K,)` falling, K the smaller of the two numbers kept."""


def svcca(x: Floats, y: Floats, *, variance: float = 0.99, most: int | None = None) -> SVCCA:
    """Canonical correlations of the main directions of `(N, D)` and `(N, E)` (SVCCA, Raghu et al., 2017).

    Each table is centred and cut to the fewest singular directions that hold `variance` of its variance; then the
    correlations between the two subspaces are the cosines of their principal angles. Any invertible linear map *of
    what is kept* leaves them as they are: direction counts, length does not, which is what sets it apart from CKA.

    Args:
        x: `(N, D)` floats, finite.
        y: `(N, E)`, row i the same item as in `x`.
        variance: share of the variance kept, in (0, 1]; 0.99 in the paper.
        most: keep no more directions than this (some use 10); None: as many as `variance` asks for.

    N must exceed what is kept of both together: two subspaces of more dimensions than there are items always meet,
    and would show correlations of 1 between noise. Raises MetricError then, and for tables of unequal length,
    non-finite rows (named) and a table that is one vector N times. Time O(N D²), memory O(N (D + E)).
    """
    if not 0 < variance <= 1:
        raise MetricError(f"a share lies in (0, 1], got {variance}", where="variance")
    if most is not None and most < 1:
        raise MetricError(f"at least one direction is kept, got {most}", where="most")
    x_ND, y_NE = two_spaces(x, y, least=3, why="a correlation")
    u_NK, v_NK = _main(centred(x_ND, "vectors"), variance, most), _main(centred(y_NE, "other"), variance, most)
    kept, other = u_NK.shape[1], v_NK.shape[1]
    if kept + other > len(x_ND) - 1:
        raise MetricError(
            f"{len(x_ND):,} items cannot tell {kept} directions from {other}: some would correlate by force",
            where="vectors, other",
            fix=f"bring more than {kept + other} items, or keep fewer directions (most, variance)",
        )
    correlations_K = np.linalg.svd(u_NK.T @ v_NK, compute_uv=False).clip(0.0, 1.0)
    chance = float(np.sqrt(max(kept, other) / (len(x_ND) - 1)))
    return SVCCA(float(correlations_K.mean()), kept, other, chance, correlations_K)


def _main(x_ND: NDArray[np.float64], variance: float, most: int | None) -> NDArray[np.float64]:
    """Orthonormal columns `(N, K)` that span the directions of most variance."""
    u_NK, values_K, _ = np.linalg.svd(x_ND, full_matrices=False)
    held_K = np.cumsum(values_K**2) / (values_K**2).sum()
    enough = int(np.searchsorted(held_K, variance * (1 - 1e-12)) + 1)
    real = int((values_K > ROUNDING * values_K[0]).sum())
    return u_NK[:, : min(enough, real, most or real)]
