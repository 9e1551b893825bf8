"""Near-equal vectors by clusters: k-means, then the greedy choice of what to keep inside each. Knows no Ray."""

from typing import Literal

import faiss
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Keep = Literal["farthest", "closest"]

TILE = 1024  # rows compared with the kept ones at once: bounds the similarities held to TILE x kept


def unit(vectors_ND: Floats) -> Floats:
    """Unit vectors `(N, D)` float32; a zero vector stays zero."""
    norms = np.linalg.norm(vectors_ND.astype(np.float64), axis=1, keepdims=True)
    return (vectors_ND / np.where(norms > 0, norms, 1)).astype(np.float32)


def centroids_of(sample_ND: Floats, count: int, *, seed: int, rounds: int = 20) -> Floats:
    """Spherical k-means centroids `(count, D)`, unit length; no more of them than there are distinct rows."""
    sample_ND = np.ascontiguousarray(unit(sample_ND))
    count = min(count, len(np.unique(sample_ND, axis=0)))
    # FAISS warns on stderr below 39 points a centroid, and draws a subsample above 256: the sample is ours already.
    kmeans = faiss.Kmeans(
        sample_ND.shape[1],
        count,
        niter=rounds,
        seed=seed,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=len(sample_ND),
    )
    kmeans.train(sample_ND)
    return np.asarray(kmeans.centroids, np.float32)


def assign(vectors_ND: Floats, centroids_KD: Floats) -> tuple[Ints, Floats]:
    """The nearest centroid `(N,)` of each row and the cosine to it `(N,)`."""
    cosines_NK = unit(vectors_ND) @ centroids_KD.T
    nearest = cosines_NK.argmax(1)
    return nearest.astype(np.int64), cosines_NK[np.arange(len(nearest)), nearest]


def duplicate_of(vectors_ND: Floats, to_centroid_N: Floats, *, epsilon: float, keep: Keep = "farthest") -> Ints:
    """For each row of one cluster the row that stands for it `(N,)`; -1: it is kept itself.

    Rows are taken in the order of their cosine to the centroid (`farthest` first, or `closest`; equals in row
    order), and one is dropped if a row *kept before* has a cosine above 1 - epsilon to it. So whatever is dropped
    has a kept row that close. The released code drops a row for being close to a dropped one too, so that a chain
    a-b-c leaves nothing near c.
    """
    sign = 1 if keep == "farthest" else -1
    order = np.argsort(sign * to_centroid_N, kind="stable")
    rows_ND, threshold = unit(vectors_ND)[order], 1 - epsilon
    stands = np.full(len(order), -1, np.int64)
    kept: list[int] = []  # positions in `order`
    for start in range(0, len(order), TILE):
        tile = rows_ND[start : start + TILE]
        before = tile @ rows_ND[kept].T if kept else np.zeros((len(tile), 0), np.float32)
        among, first = tile @ tile.T, len(kept)
        for at in range(len(tile)):
            earlier = np.flatnonzero(before[at] > threshold)
            if len(earlier):
                stands[order[start + at]] = order[kept[earlier[0]]]
                continue
            inside = np.array(kept[first:], np.int64)
            close = inside[among[at, inside - start] > threshold]
            if len(close):
                stands[order[start + at]] = order[close[0]]
            else:
                kept.append(start + at)
    return stands


def across_borders(vectors_ND: Floats, clusters_N: Ints, *, epsilon: float) -> tuple[int, int]:
    """Near-equal pairs among these rows, by brute force, and how many of them lie in two clusters: what is missed."""
    rows_ND = unit(vectors_ND)
    pairs = across = 0
    for start in range(0, len(rows_ND), TILE):
        close = rows_ND[start : start + TILE] @ rows_ND.T > 1 - epsilon
        a, b = np.nonzero(close)
        a, b = (a + start)[a + start < b], b[a + start < b]
        pairs += len(a)
        across += int((clusters_N[a] != clusters_N[b]).sum())
    return pairs, across
