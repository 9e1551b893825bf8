"""Vectors laid out in the plane, for people to look at: of an index's rows, of what a report was made of."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayemb.errors import RayembError

Vectors = NDArray[np.float32]
Method = Literal["umap", "pca"]

KEPT_OF = 10
"""Nearest points that `neighbours_kept` asks for."""
_KEPT_QUERIES = 256
# Fewer rows have no neighbourhoods to keep: principal components show all there is.
_FEWEST_FOR_UMAP = 16


class ProjectionError(RayembError):
    """Vectors that cannot be laid out, or a method that is not installed."""


class Layout(NamedTuple):
    """Points of the plane, and how they were found."""

    method: Method
    points: Vectors  # (N, 2) within the unit square, of one scale in both directions
    neighbours_kept: float | None


def layout_by(method: Method, *, neighbours: int = 15, seed: int = 0, where: str = "") -> Callable[[Vectors], Layout]:
    """What lays vectors `(N, D)` out in the plane.

    Two steps, so that what is not installed is found out before the vectors are read. `neighbours`: nearest rows that
    umap lays a row out by. Fewer than 16 rows are laid out by their principal components whatever the method. The same
    seed gives the same points. UMAP: McInnes, Healy, Melville 2018 (arXiv:1802.03426); O(N log N) time, of cosines.
    PCA: O(N D²), memory of a copy in float64.

    Raises ProjectionError naming `where` if umap is asked for and not installed; what it gives, if a vector is not
    finite.
    """
    project = _principal if method == "pca" else _umap(neighbours, seed, where)

    def lay_out(x_ND: Vectors) -> Layout:
        if x_ND.ndim != 2 or not len(x_ND):
            raise ProjectionError(f"expected vectors (N, D) with N > 0, got {x_ND.shape}", where=where)
        if not (finite_N := np.isfinite(x_ND).all(axis=1)).all():
            raise ProjectionError(f"vector {int((~finite_N).argmax())} is not finite", where=where)
        few = len(x_ND) < _FEWEST_FOR_UMAP
        points = _framed(_principal(x_ND) if few else project(x_ND))
        return Layout("pca" if few else method, points, neighbours_kept(x_ND, points, seed))

    return lay_out


def neighbours_kept(x_ND: Vectors, points: Vectors, seed: int = 0) -> float | None:
    """The share of a point's ten nearest points in the plane `(N, 2)` that are nearest by inner product too.

    Mean over a seeded sample; None for a single point. Memory O(N) for each of 256 rows.
    """
    k = min(KEPT_OF, len(x_ND) - 1)
    if k < 1:
        return None
    chosen = np.random.default_rng(seed).permutation(len(x_ND))[:_KEPT_QUERIES]
    near_vectors = -(x_ND[chosen] @ x_ND.T)
    near_points = ((points[chosen, None] - points[None]) ** 2).sum(axis=2)
    shares = []
    for row, by_vector, by_point in zip(chosen, near_vectors, near_points, strict=True):
        by_vector[row] = by_point[row] = np.inf
        nearest = set(np.argpartition(by_vector, k - 1)[:k].tolist())
        shares.append(len(nearest & set(np.argpartition(by_point, k - 1)[:k].tolist())) / k)
    return round(float(np.mean(shares)), 4)


def _umap(neighbours: int, seed: int, where: str) -> Callable[[Vectors], Vectors]:
    try:
        import umap  # seconds, with its compiler: not for those who only read maps
    except ImportError as error:
        fix = "pip install 'rayemb[map]', or take the method pca"
        raise ProjectionError("umap-learn is not installed", where=where, fix=fix) from error

    def project(x_ND: Vectors) -> Vectors:
        # init: the spectral start takes long, and warns, where the neighbours fall into several parts.
        near = min(neighbours, len(x_ND) - 1)
        found: Vectors = umap.UMAP(
            n_neighbors=near, metric="cosine", init="pca", random_state=seed, n_jobs=1
        ).fit_transform(x_ND)
        return found

    return project


def _principal(x_ND: Vectors) -> Vectors:
    """The two first principal components `(N, 2)`; each points to where its largest weight is positive."""
    centred = x_ND.astype(np.float64) - x_ND.mean(axis=0, dtype=np.float64)
    _, axes = np.linalg.eigh(centred.T @ centred)
    first = axes[:, ::-1][:, :2]
    first = first * np.where(first[np.abs(first).argmax(axis=0), np.arange(first.shape[1])] < 0, -1, 1)
    found = np.zeros((len(x_ND), 2), np.float32)
    found[:, : first.shape[1]] = centred @ first
    return found


def _framed(points: Vectors) -> Vectors:
    """The points in the unit square, in the middle of it, as far from each other in both directions as before."""
    points = np.nan_to_num(np.asarray(points, np.float32))
    low, high = points.min(axis=0), points.max(axis=0)
    size = float((high - low).max())
    framed: Vectors = np.full_like(points, 0.5) if size == 0 else (points - (low + high) / 2) / size + 0.5
    return framed.clip(0, 1)
