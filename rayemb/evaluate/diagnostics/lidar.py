"""LiDAR: how many directions tell items apart beyond what their views differ by (Thilak et al., 2023).

Suffixes: N items, V views of each, D dimensions, B items of one block.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.diagnostics.rankme import EPS, effective_rank
from rayemb.evaluate.metrics.errors import MetricError

RIDGE = 1e-4
"""The paper names no value; 1e-4 is that of Skean et al., 2025, there absolute."""


def lidar(views: NDArray[Any], *, ridge: float = RIDGE, eps: float = EPS, block: int = 256) -> float:
    """The effective rank in [1, min(D, N - 1)] of a linear discriminant analysis in which each item is a class.

    exp of the entropy of the eigenvalues of W^-1/2 B W^-1/2: B the covariance of the items' means, W that of views
    around their own item's mean, which a direction of pure noise fills as much as B. RankMe counts such directions;
    this does not, and pays for it with V encodings an item. Compare only values of equal N, V and D, with N above D
    (the paper: N = 1,000 items, V = 50).

    W gets `ridge` times the mean of its diagonal on the diagonal: a fixed one makes the figure depend on the scale of
    the vectors. O(N V D² + D³) time, O(N D + D² + block · V · D) memory beside the input.

    Args:
        views: `(N, V, D)` floats, finite; V views of each item that should not change what it is. The item itself
            need not be among them.

    Raises MetricError for fewer than two items or views, and where every item's views are one vector.
    """
    views = np.asarray(views)
    if views.ndim != 3 or not np.issubdtype(views.dtype, np.floating):
        raise MetricError(f"expected floats (N, V, D), got {views.dtype} {views.shape}", where="views")
    items, each, dim = views.shape
    if items < 2 or each < 2 or not dim:
        raise MetricError(f"expected two items of two views or more, got {views.shape}", where="views")
    mean_ND, within_DD = np.empty((items, dim)), np.zeros((dim, dim))
    for start in range(0, items, block):
        part_BVD = views[start : start + block].astype(np.float64)
        bad = np.flatnonzero(~np.isfinite(part_BVD).all(axis=(1, 2)))
        if len(bad):
            raise MetricError("holds NaN or infinity", where=f"views, item {start + bad[0]}")
        mean_BD = part_BVD.mean(axis=1)
        mean_ND[start : start + block] = mean_BD
        apart = (part_BVD - mean_BD[:, None]).reshape(-1, dim)
        within_DD += apart.T @ apart
    within_DD /= items * each
    scale = float(np.trace(within_DD)) / dim
    largest = float(abs(mean_ND).max())
    if scale <= (1e-12 * largest) ** 2:
        raise MetricError("the views of each item are one vector", where="views", fix="augment what is encoded")
    centred_ND = mean_ND - mean_ND.mean(axis=0)
    lower_DD = np.linalg.cholesky(within_DD + ridge * scale * np.eye(dim))
    # The eigenvalues of W^-1/2 B W^-1/2 are the squared singular values of the whitened means.
    white_DN = np.linalg.solve(lower_DD, centred_ND.T) / items**0.5
    values = np.linalg.eigvalsh(white_DN @ white_DN.T).clip(min=0.0)[::-1][: min(dim, items - 1)]
    if values.sum() <= 1e-20:
        raise MetricError("all items have one mean", where="views")
    return effective_rank(values, eps)
