"""Two tables of vectors of the same items: what every comparison of spaces asks of them."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.metrics.arrays import as_vectors
from rayemb.evaluate.metrics.errors import MetricError


def table(array: NDArray[Any], name: str, *, least: int = 1, why: str = "a figure") -> NDArray[np.float64]:
    """`array` as finite float64 `(N, D)` with N ≥ `least`, D ≥ 1; MetricError naming `name` and the first bad row."""
    array = np.asarray(array)
    if array.ndim == 2 and np.issubdtype(array.dtype, np.floating):
        bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
        if len(bad):
            raise MetricError(f"row {bad[0]:,} holds NaN or infinity ({len(bad):,} of {len(array):,} do)", where=name)
    return as_vectors(array, name, least=least, why=why)


def two_spaces(
    x: NDArray[Any], y: NDArray[Any], *, least: int, why: str, names: tuple[str, str] = ("vectors", "other")
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """`(N, D)` and `(N, E)` of the same N items, float64; MetricError where row i cannot be one item in both."""
    x_ND, y_NE = table(x, names[0], least=least, why=why), table(y, names[1], least=least, why=why)
    if len(x_ND) != len(y_NE):
        raise MetricError(
            f"{names[0]} have {len(x_ND):,} rows, {names[1]} {len(y_NE):,}",
            where=names[1],
            fix="row i must be the same item in both",
        )
    return x_ND, y_NE


def centred(x_ND: NDArray[np.float64], name: str) -> NDArray[np.float64]:
    """Less the mean row; MetricError if nothing but rounding is left, as when all rows are one vector."""
    rest_ND: NDArray[np.float64] = x_ND - x_ND.mean(axis=0)
    if np.abs(rest_ND).max() <= 1e-12 * np.abs(x_ND).max():
        raise MetricError(f"all {len(x_ND):,} vectors are one and the same, which has no structure", where=name)
    return rest_ND
