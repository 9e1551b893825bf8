"""The nearest neighbours of every vector among the others, exactly and in blocks."""

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.metrics.arrays import Floats, as_vectors
from rayemb.evaluate.metrics.errors import MetricError


def nearest(
    vectors: Floats, k: int, *, among: Floats | None = None, block: int = 512
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The rows `(N, k)` int64 and Euclidean distances `(N, k)` float64 of each vector's k nearest, nearest first.

    A vector is not its own neighbour: it is left out by its row, so that an exact duplicate is one, at distance 0.
    Distances are taken from differences, not from products: those of near duplicates would be rounding. Equally near
    ones come in no promised order. O(block · (M + k D)) memory, O(N M D) time.

    Args:
        vectors: `(N, D)` floats, finite.
        k: 1 .. N - 1.
        among: `(M, D)`, to look for neighbours there, and leave nobody out.

    Raises MetricError where there are no k others.
    """
    x_ND = as_vectors(vectors, "vectors")
    y_MD = x_ND if among is None else as_vectors(among, "among")
    if x_ND.shape[1] != y_MD.shape[1]:
        raise MetricError(f"vectors have {x_ND.shape[1]} dimensions, these {y_MD.shape[1]}", where="among")
    others = len(y_MD) - (among is None)
    if not 1 <= k <= others:
        raise MetricError(f"{k} neighbours are wanted of {max(others, 0):,} others", where="k")
    # Distances do not see a shift, and products of centred vectors cancel less.
    mean_D = y_MD.mean(axis=0)
    from_ND, to_MD = x_ND - mean_D, y_MD - mean_D
    squares_M = (to_MD**2).sum(axis=1)
    rows_NK, distances_NK = np.empty((len(x_ND), k), np.int64), np.empty((len(x_ND), k))
    for start in range(0, len(x_ND), block):
        part = slice(start, start + block)
        d_BM = squares_M - 2 * (from_ND[part] @ to_MD.T)
        if among is None:
            own = np.arange(len(d_BM))
            d_BM[own, start + own] = np.inf
        at_BK = np.argpartition(d_BM, k - 1, axis=1)[:, :k]
        exact_BK = np.linalg.norm(x_ND[part, None] - y_MD[at_BK], axis=2)
        order_BK = np.argsort(exact_BK, axis=1, kind="stable")
        rows_NK[part] = np.take_along_axis(at_BK, order_BK, axis=1)
        distances_NK[part] = np.take_along_axis(exact_BK, order_BK, axis=1)
    return rows_NK, distances_NK
