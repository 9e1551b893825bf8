"""How well clusters found without labels agree with the classes that people gave.

Suffixes: N items, K clusters, C classes. A cluster's number is only a name; -1 (noise of a density method) is one too.
"""

from collections.abc import Collection
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.metrics.arrays import as_integers, finite_vectors
from rayemb.evaluate.metrics.errors import MetricError
from rayemb.evaluate.metrics.retrieval import TIE


class ClusterScores(NamedTuple):
    """Agreement of clusters with classes: 1 is perfect. `nmi` equals `v_measure`; only `ami`, `ari` are 0 by chance."""

    nmi: float
    ami: float
    ari: float
    homogeneity: float
    completeness: float
    v_measure: float
    purity: float
    accuracy: float
    clusters: int
    classes: int


class ClusterAccuracy(NamedTuple):
    """Shares in [0, 1] of all items, of known classes' and of new ones'; None where no class was called known."""

    all: float
    old: float | None
    new: float | None


def kmeans_clusters(
    vectors: NDArray[np.float32], k: int, *, seed: int, n_init: int = 10, max_iter: int = 300
) -> NDArray[np.int64]:
    """The cluster `(N,)` int64 of each vector `(N, D)`: k-means++ and Lloyd's steps, the best of `n_init` starts.

    Figures of clustering move with `seed` and `n_init`: report both, and `k`, which the field sets to the number of
    classes. Fewer than `k` distinct vectors make fewer clusters. Vectors that differ by rounding alone (`TIE`) are one
    cluster, so that a constant encoder earns nothing from noise. O(n_init · max_iter · N K D) time at most; memory is
    little more than two copies of the vectors. Raises MetricError for non-finite vectors and fewer than `k` of them.
    """
    x_ND = finite_vectors(vectors, "vectors")
    if not 1 <= k <= len(x_ND):
        raise MetricError(f"no {k} clusters of {len(x_ND)} vectors", where="k", fix="1 to the number of vectors")
    if n_init < 1 or max_iter < 1:
        raise MetricError(f"{n_init} starts of {max_iter} steps", where="n_init, max_iter", fix="both are at least 1")
    low_D, high_D, first_D = (part.astype(np.float64) for part in (x_ND.min(axis=0), x_ND.max(axis=0), x_ND[0]))
    if max((high_D - first_D).max(), (first_D - low_D).max()) <= TIE * max(high_D.max(), -low_D.min()):
        return np.zeros(len(x_ND), np.int64)
    from sklearn.cluster import KMeans  # a second to import, and every worker of a training imports this module

    most = _distinct(x_ND, k)
    found = KMeans(most, n_init=n_init, max_iter=max_iter, random_state=seed).fit_predict(x_ND)
    clusters: NDArray[np.int64] = found.astype(np.int64)
    return clusters


def _distinct(x_ND: NDArray[np.floating], most: int) -> int:
    """How many different rows there are; counted no further than `most`, which a table of many rows has soon."""
    seen: set[bytes] = set()
    for x_D in x_ND:
        seen.add((x_D + 0.0).tobytes())  # -0 is 0
        if len(seen) == most:
            break
    return len(seen)


def cluster_scores(labels: NDArray[np.int64], clusters: NDArray[np.int64]) -> ClusterScores:
    """All figures of one clustering: `labels` and `clusters` are `(N,)` integers.

    NMI (arithmetic mean), homogeneity, completeness and V-measure (Rosenberg & Hirschberg, 2007) rise with the number
    of clusters even for random ones; AMI (Vinh et al., 2010) and ARI (Hubert & Arabie, 1985) are corrected for chance
    and may be negative. Purity is the share of items in their cluster's largest class: it is 1 for clusters of one item
    and is not the accuracy, which is `cluster_accuracy(...).all`.

    Raises MetricError for wrong shapes, no items, or labels of one class, with which every clustering agrees.
    """
    counts_KC, _, _ = _contingency(labels, clusters)
    from sklearn import metrics  # as above

    y_N, found_N = np.asarray(labels), np.asarray(clusters)
    homogeneity, completeness, v_measure = metrics.homogeneity_completeness_v_measure(y_N, found_N)
    return ClusterScores(
        nmi=float(metrics.normalized_mutual_info_score(y_N, found_N)),
        ami=float(metrics.adjusted_mutual_info_score(y_N, found_N)),
        ari=float(metrics.adjusted_rand_score(y_N, found_N)),
        homogeneity=float(homogeneity),
        completeness=float(completeness),
        v_measure=float(v_measure),
        purity=float(counts_KC.max(axis=1).sum() / len(y_N)),
        accuracy=cluster_accuracy(y_N, found_N).all,
        clusters=counts_KC.shape[0],
        classes=counts_KC.shape[1],
    )


def cluster_accuracy(
    labels: NDArray[np.int64],
    clusters: NDArray[np.int64],
    known: Collection[int] | None = None,
    *,
    version: int = 2,
) -> ClusterAccuracy:
    """The share of items whose cluster is matched to their class, one cluster a class (Kuhn, 1955; Yang et al., 2010).

    Args:
        labels: `(N,)` integers.
        clusters: `(N,)` integers. Clusters beyond the number of classes are matched to none: their items are errors.
        known: the classes that had labels in training (novel and generalised class discovery); the others are new.
        version: 2: one matching over all items, whose hits are then split (Vaze et al., 2022). 1: a matching of its own
            for the known and for the new items, by which one cluster may serve an old and a new class: it flatters, and
            is here to compare with older papers. `all` is then the mean of the two, weighted by their items.

    Raises MetricError as `cluster_scores` does, for another version, and where no item is old or none is new.
    """
    if version not in (1, 2):
        raise MetricError(f"there is no version {version}", where="version", fix="2, or 1 for older papers")
    if known is None:
        return ClusterAccuracy(float(matched_hits(labels, clusters).mean()), None, None)
    hits_N = matched_hits(labels, clusters, known)
    old_N = np.isin(np.asarray(labels), list(known))
    for mask_N, kind in ((old_N, "a known"), (~old_N, "a new")):
        if not mask_N.any():
            raise MetricError(f"no item is of {kind} class; known are {_some(known)}", where="known")
    if version == 2:
        return ClusterAccuracy(float(hits_N.mean()), float(hits_N[old_N].mean()), float(hits_N[~old_N].mean()))
    old, new = (
        float(_matched(*_table(np.asarray(labels)[mask], np.asarray(clusters)[mask])).mean())
        for mask in (old_N, ~old_N)
    )
    share = float(old_N.mean())
    return ClusterAccuracy(share * old + (1 - share) * new, old, new)


def matched_hits(
    labels: NDArray[np.int64], clusters: NDArray[np.int64], known: Collection[int] | None = None
) -> NDArray[np.float64]:
    """Per item `(N,)` float64: 1 where its cluster is the one matched to its class, else 0; for intervals.

    Several matchings may be equally good over all. With `known`, the one with the fewest hits on new classes is taken:
    the split must not depend on how clusters are numbered, and a claim of discovery should not rest on a tie. Other
    arguments and errors as for `cluster_accuracy`.
    """
    counts_KC, member_N, class_N = _contingency(labels, clusters)
    new_C = None if known is None else ~np.isin(np.unique(np.asarray(labels)), list(known))
    return _matched(counts_KC, member_N, class_N, new_C)


Table = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def _contingency(labels: NDArray[np.int64], clusters: NDArray[np.int64]) -> Table:
    y_N = as_integers(labels, None, "labels")
    found_N = as_integers(clusters, len(y_N), "clusters")
    if not len(y_N):
        raise MetricError("there are no items", where="labels")
    if (y_N == y_N[0]).all():
        raise MetricError(
            f"all {len(y_N):,} items are of class {y_N[0]}", where="labels", fix="bring items of two classes or more"
        )
    return _table(y_N, found_N)


def _table(y_N: NDArray[np.int64], found_N: NDArray[np.int64]) -> Table:
    """Items per cluster and class `(K, C)`, and each item's row `(N,)` and column `(N,)` in it."""
    names_K, member_N = np.unique(found_N, return_inverse=True)
    names_C, class_N = np.unique(y_N, return_inverse=True)
    counts_KC = np.zeros((len(names_K), len(names_C)), np.int64)
    np.add.at(counts_KC, (member_N, class_N), 1)
    return counts_KC, member_N, class_N


def _matched(
    counts_KC: NDArray[np.int64],
    member_N: NDArray[np.int64],
    class_N: NDArray[np.int64],
    new_C: NDArray[np.bool_] | None = None,
) -> NDArray[np.float64]:
    from scipy.optimize import linear_sum_assignment  # as above

    gain_KC = counts_KC
    if new_C is not None:
        # Integers, so that the second aim decides between equals and never against the first.
        gain_KC = counts_KC * (len(member_N) + 1) - counts_KC * new_C
    rows, columns = linear_sum_assignment(gain_KC, maximize=True)
    class_of_K = np.full(len(counts_KC), -1)
    class_of_K[rows] = columns
    hits: NDArray[np.float64] = (class_of_K[member_N] == class_N).astype(np.float64)
    return hits


def _some(names: Collection[int], most: int = 8) -> str:
    """Up to `most` names, and how many more there are."""
    ordered = sorted(int(name) for name in names)
    rest = f" and {len(ordered) - most} more" if len(ordered) > most else ""
    return (", ".join(map(str, ordered[:most])) or "none") + rest
