"""What a frozen encoder is good for with nothing but a linear SVM and a distance (S111, Razavian et al., 2014).

The row that every report of a new method should have beside it: features as they are, lightly processed.

Suffixes: N items, M of the training part, D dimensions, K after whitening, Q queries, P and R patches of a query and of
a reference, B of one block.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.diagnostics.graph_reconstruction import average_precision
from rayemb.evaluate.diagnostics.spaces import table
from rayemb.evaluate.metrics.arrays import Floats, as_integers
from rayemb.evaluate.metrics.errors import MetricError

Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]
PENALTIES = (0.01, 0.1, 1.0, 10.0, 100.0)


class Processing(NamedTuple):
    """How features are made ready: length 1, a signed power, whitening, length 1 again."""

    power: float | None
    mean: Doubles | None
    """`(D,)`"""
    projection: Doubles | None
    """`(D, K)`"""

    def raised(self, vectors: Floats, name: str = "vectors") -> Doubles:
        """`(N, D)` of length 1, each entry raised to the power with its sign, and of length 1 again."""
        x_ND = _unit(table(vectors, name), name)
        return x_ND if self.power is None else _unit(np.sign(x_ND) * np.abs(x_ND) ** self.power, name)

    def whitened(self, vectors: Floats, name: str = "vectors") -> Doubles:
        """`(N, K)`, on the items it was fitted to with the identity as covariance; `raised` if nothing was fitted."""
        x_ND = self.raised(vectors, name)
        return x_ND if self.mean is None or self.projection is None else (x_ND - self.mean) @ self.projection

    def apply(self, vectors: Floats, name: str = "vectors") -> Doubles:
        """`(N, K)` of length 1: what is searched."""
        return _unit(self.whitened(vectors, name), name)


def fit_processing(train: Floats, *, whiten: int | None = None, power: float | None = None) -> Processing:
    """Fits the processing to the training items `(M, D)`.

    Args:
        train: `(M, D)` floats, finite, none zero.
        whiten: keep this many principal directions at variance 1 (256 to 500 of 4,096 in the paper); None: do not.
        power: each entry becomes sign(x) |x|^power; .5 spreads what a few large entries dominate. None: as they are.

    Raises MetricError for non-finite and zero rows (named) and if the items do not span `whiten` directions.
    Time O(M D²), memory O(M D).
    """
    if power is not None and not 0 < power < 10:
        raise MetricError(f"lies between 0 and 10, got {power}", where="power")
    plain = Processing(power, None, None)
    if whiten is None:
        return plain
    if whiten < 1:
        raise MetricError(f"at least one direction is kept, got {whiten}", where="whiten")
    x_MD = plain.raised(train, "train")
    mean_D = x_MD.mean(axis=0)
    _, values, axes_KD = np.linalg.svd(x_MD - mean_D, full_matrices=False)
    rank = int((values > 1e-9 * max(values[0], 1e-30)).sum()) if values[0] > 1e-12 else 0
    if whiten > rank:
        raise MetricError(
            f"{len(x_MD):,} items span {rank} directions, not {whiten}", where="whiten", fix="keep fewer, or bring more"
        )
    return Processing(power, mean_D, axes_KD[:whiten].T * (np.sqrt(len(x_MD)) / values[:whiten]))


class OffTheShelf(NamedTuple):
    """The baseline row of a frozen encoder."""

    svm: float
    """Accuracy of a one-against-rest linear SVM, in [0, 1]."""
    nearest: float
    """Share of the test items whose nearest training item is of their class; ties count against it."""
    map: float
    """Mean average precision of finding the training items of a test item's class by distance."""
    chance: float
    """Accuracy of always saying the most frequent training class."""
    c: float
    """The SVM's penalty, chosen on folds of the training items."""
    dims: int
    """Dimensions that the search sees."""
    left_out: int
    """Items of classes too small to split (`off_the_shelf_split` only)."""
    svm_hits: Doubles
    """`(N,)` 1 where the SVM is right, for intervals and paired tests."""
    average_precisions: Doubles
    """`(N,)`"""


def off_the_shelf(
    train: Floats,
    labels: NDArray[np.int64],
    test: Floats,
    test_labels: NDArray[np.int64],
    *,
    whiten: int | None = None,
    power: float | None = None,
    penalties: Sequence[float] = PENALTIES,
    folds: int = 5,
    seed: int = 0,
    block: int = 512,
) -> OffTheShelf:
    """Linear SVM and nearest-distance search on frozen features.

    The SVM sees features of length 1 (raised to `power`), its penalty chosen by cross-validation within the training
    items. The search sees the whitened ones: with vectors of length 1, by L2 distance or cosine is the same order.

    Args:
        train: `(M, D)` floats, finite, none zero.
        labels: `(M,)` int64, two classes or more, each with two items or more.
        test: `(N, D)`.
        test_labels: `(N,)` int64, of classes that `labels` have.
        whiten, power: see `fit_processing`.
        penalties: the C tried.
        folds: at most; fewer where the smallest class has fewer items.
        seed: of the folds and the SVM.
        block: test items searched at a time; memory O(block · M).

    Raises MetricError for one class alone, a class of one item, and a test class without training items, all named.
    """
    x_MD, y_ND = table(train, "train", least=4, why="folds"), table(test, "test")
    if x_MD.shape[1] != y_ND.shape[1]:
        raise MetricError(f"train has {x_MD.shape[1]} dimensions, test {y_ND.shape[1]}", where="test")
    l_M, l_N = as_integers(labels, len(x_MD), "labels"), as_integers(test_labels, len(y_ND), "test_labels")
    classes, sizes = _classes(l_M, l_N)
    processing = fit_processing(train, whiten=whiten, power=power)
    raised_MD, raised_ND = processing.raised(x_MD, "train"), processing.raised(y_ND, "test")
    c = _penalty(raised_MD, l_M, penalties, min(folds, int(sizes.min())), seed)
    hits_N = (_svm(c, seed).fit(raised_MD, l_M).predict(raised_ND) == l_N).astype(np.float64)
    found_MK, asked_NK = processing.apply(x_MD, "train"), processing.apply(y_ND, "test")
    nearest_N, precision_N = np.empty(len(y_ND)), np.empty(len(y_ND))
    for start in range(0, len(y_ND), block):
        part = slice(start, start + block)
        distance_BM = 1 - asked_NK[part] @ found_MK.T  # half the squared L2 distance
        own_BM = l_N[part, None] == l_M
        precision_N[part] = average_precision(distance_BM, own_BM, 1e-9)
        best_B, other_B = (np.where(mask, distance_BM, np.inf).min(axis=1) for mask in (own_BM, ~own_BM))
        nearest_N[part] = best_B < other_B - 1e-9
    chance = float((l_N == classes[sizes.argmax()]).mean())
    svm, nearest, mean = float(hits_N.mean()), float(nearest_N.mean()), float(precision_N.mean())
    return OffTheShelf(svm, nearest, mean, chance, c, found_MK.shape[1], 0, hits_N, precision_N)


def off_the_shelf_split(
    vectors: Floats,
    labels: NDArray[np.int64],
    *,
    held_out: float = 0.25,
    whiten: int | None = None,
    power: float | None = None,
    seed: int = 0,
) -> OffTheShelf:
    """`off_the_shelf` on one labelled table `(N, D)`: a share of each class is held out.

    Classes of fewer than four items are left out and counted.
    Compare models on the same `seed`, so that all see the same split. Errors as there.
    """
    if not 0 < held_out < 1:
        raise MetricError(f"a share lies between 0 and 1, got {held_out}", where="held_out")
    x_ND = table(vectors, "vectors")
    l_N = as_integers(labels, len(x_ND), "labels")
    rng = np.random.default_rng(seed)
    test: list[int] = []
    train: list[int] = []
    for value in np.unique(l_N):
        rows = rng.permutation(np.flatnonzero(l_N == value)).tolist()
        if len(rows) >= 4:
            out = min(max(1, round(held_out * len(rows))), len(rows) - 2)
            test += rows[:out]
            train += rows[out:]
    if not train:
        raise MetricError("no class has four items", where="labels", fix="a split needs two to learn from, and more")
    found = off_the_shelf(x_ND[train], l_N[train], x_ND[test], l_N[test], whiten=whiten, power=power, seed=seed)
    return found._replace(left_out=len(x_ND) - len(train) - len(test))


def spatial_boxes(levels: int) -> list[tuple[float, float, float, float]]:
    """Patches as shares of an image (top, left, bottom, right): the whole, then 2 × 2, 3 × 3, ..., half overlapping."""
    if levels < 1:
        raise MetricError(f"there is at least one level, got {levels}", where="levels")
    boxes = []
    for i in range(1, levels + 1):
        side = 2 / (i + 1)
        starts = [at / (i + 1) for at in range(i)]
        boxes += [(top, left, top + side, left + side) for top in starts for left in starts]
    return boxes


def spatial_distances(queries: Floats, references: Floats, *, block: int = 16) -> Doubles:
    """`(Q, N)`: the mean over a query's patches of the L2 distance to the nearest patch of the reference.

    Finds a thing wherever in the reference it is, and at whatever size. With one patch each it is the plain distance.
    Not symmetric: what else there is in the reference costs nothing.

    Args:
        queries: `(Q, P, D)` floats, finite: features of each patch, see `spatial_boxes`.
        references: `(N, R, D)`.
        block: queries at a time; memory O(block · P · N · R), time O(Q P N R D).
    """
    q_QPD, c_NRD = _patches(queries, "queries"), _patches(references, "references")
    if q_QPD.shape[2] != c_NRD.shape[2]:
        raise MetricError(f"queries have {q_QPD.shape[2]} dimensions, references {c_NRD.shape[2]}", where="references")
    if block < 1:
        raise MetricError(f"a block has at least one query, got {block}", where="block")
    (n, r, d), p = c_NRD.shape, q_QPD.shape[1]
    flat_CD = c_NRD.reshape(n * r, d)
    square_C = (flat_CD**2).sum(axis=1)
    distances_QN = np.empty((len(q_QPD), n))
    for start in range(0, len(q_QPD), block):
        part_XD = q_QPD[start : start + block].reshape(-1, d)
        squares_XC = (part_XD**2).sum(axis=1, keepdims=True) + square_C - 2 * part_XD @ flat_CD.T
        nearest_XN = np.sqrt(squares_XC.clip(min=0.0)).reshape(-1, n, r).min(axis=2)
        distances_QN[start : start + block] = nearest_XN.reshape(-1, p, n).mean(axis=1)
    return distances_QN


def _unit(x_ND: Doubles, name: str) -> Doubles:
    length_N = np.linalg.norm(x_ND, axis=1)
    zero = np.flatnonzero(length_N == 0)
    if len(zero):
        raise MetricError(f"row {zero[0]:,} is zero, so it has no direction ({len(zero):,} are)", where=name)
    unit_ND: Doubles = x_ND / length_N[:, None]
    return unit_ND


def _classes(l_M: Integers, l_N: Integers) -> tuple[Integers, Integers]:
    classes, sizes = np.unique(l_M, return_counts=True)
    if len(classes) < 2:
        raise MetricError(f"all items are of class {classes[0]}", where="labels", fix="bring two classes or more")
    if sizes.min() < 2:
        raise MetricError(f"class {classes[sizes.argmin()]} has one item", where="labels", fix="leave it out")
    unknown = np.setdiff1d(l_N, classes)
    if len(unknown):
        raise MetricError(f"class {unknown[0]} has no training items ({len(unknown)} have none)", where="test_labels")
    return classes.astype(np.int64), sizes.astype(np.int64)


def _penalty(x_MD: Doubles, l_M: Integers, penalties: Sequence[float], folds: int, seed: int) -> float:
    from sklearn.model_selection import StratifiedKFold

    if not len(penalties) or min(penalties) <= 0:
        raise MetricError(f"positive numbers, got {list(penalties)}", where="penalties")
    if len(penalties) == 1:
        return float(penalties[0])
    if folds < 2:
        raise MetricError(f"at least 2, got {folds}", where="folds")
    parts = list(StratifiedKFold(folds, shuffle=True, random_state=seed).split(x_MD, l_M))
    scores = [np.mean([_svm(c, seed).fit(x_MD[a], l_M[a]).score(x_MD[b], l_M[b]) for a, b in parts]) for c in penalties]
    return float(penalties[int(np.argmax(scores))])  # of equals the first


def _svm(c: float, seed: int):  # type: ignore[no-untyped-def]
    from sklearn.svm import LinearSVC

    return LinearSVC(C=c, random_state=seed, max_iter=10_000)


def _patches(array: Floats, name: str) -> Doubles:
    array = np.asarray(array)
    if array.ndim != 3 or not np.issubdtype(array.dtype, np.floating) or not array.size:
        raise MetricError(f"expected floats (N, P, D), got {array.dtype} {array.shape}", where=name)
    bad = np.flatnonzero(~np.isfinite(array).all(axis=(1, 2)))
    if len(bad):
        raise MetricError(f"item {bad[0]:,} holds NaN or infinity ({len(bad):,} do)", where=name)
    return array.astype(np.float64)
