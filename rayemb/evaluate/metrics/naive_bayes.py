"""The generative linear probe: Gaussian naive Bayes with one variance a dimension, shared by the classes (S017).

Zheng et al., "Revisiting Discriminative vs. Generative Classifiers: Theory and Implications" (ICML 2023). It needs
O(log D) items to come near its best, logistic regression O(D), but its best may be lower. The fit is a sum over
items, so that it streams: `class_moments` of each chunk, `merge_moments` in any order, then `naive_bayes`.

Suffixes: N items, C classes, D dimensions.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.metrics.arrays import as_integers, as_vectors
from rayemb.evaluate.metrics.errors import MetricError
from rayemb.evaluate.metrics.retrieval import TIE

FLOOR = 1e-9
"""Of the largest variance of all dimensions: the least that a variance may be. Relative, as in scikit-learn; the
published code adds it absolutely, once a chunk, so that its fit depends on the chunks."""

ROUNDING = 1e-12
"""A standard deviation of less than this share of the mean is that of equal numbers whose mean was rounded."""


class ClassMoments(NamedTuple):
    """What a set of items leaves behind, by class number: chunks may lack classes and hold them in any order."""

    classes: NDArray[np.int64]  # (C,) sorted
    counts: NDArray[np.int64]  # (C,)
    means: NDArray[np.float64]  # (C, D)
    squares: NDArray[np.float64]  # (C, D) sums of squared deviations from the class's mean


class NaiveBayes(NamedTuple):
    """A linear classifier: class c scores (x - centre) · weights[c] + biases[c]."""

    classes: NDArray[np.int64]  # (C,)
    centre: NDArray[np.float64]  # (D,)
    weights: NDArray[np.float64]  # (C, D)
    biases: NDArray[np.float64]  # (C,)
    variance: NDArray[np.float64]  # (D,) the shared one

    def scores(self, vectors: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """The log joint probability `(N, C)` of each class, less what all classes of an item have in common."""
        x_ND = as_vectors(vectors, "vectors")
        if x_ND.shape[1] != len(self.centre):
            raise MetricError(f"{x_ND.shape[1]} dimensions; the probe has {len(self.centre)}", where="vectors")
        return np.asarray((x_ND - self.centre) @ self.weights.T + self.biases)

    def predict(self, vectors: NDArray[np.floating[Any]]) -> NDArray[np.int64]:
        """The class `(N,)` of the highest score; of equal ones the lowest number."""
        found: NDArray[np.int64] = self.classes[self.scores(vectors).argmax(axis=1)]
        return found

    def probabilities(self, vectors: NDArray[np.floating[Any]]) -> NDArray[np.float64]:
        """The posterior `(N, C)`. Dimensions that say the same are counted twice: expect it far too sure."""
        s_NC = self.scores(vectors)
        e_NC = np.exp(s_NC - s_NC.max(axis=1, keepdims=True))
        return np.asarray(e_NC / e_NC.sum(axis=1, keepdims=True))

    def hits(self, vectors: NDArray[np.floating[Any]], labels: NDArray[np.int64]) -> NDArray[np.float64]:
        """Per item `(N,)`: 1 where its class scores highest, alone; a tie (within rounding) is a miss."""
        return won(self.scores(vectors), self.classes, labels)


def class_moments(vectors: NDArray[np.floating[Any]], labels: NDArray[np.int64]) -> ClassMoments:
    """The moments of a chunk: `vectors` `(N, D)` floats, `labels` `(N,)` integers, N ≥ 0; O(N D) time, O(C D) memory.

    Raises MetricError for wrong shapes and non-finite vectors.
    """
    x_ND = as_vectors(vectors, "vectors")
    classes, class_N = np.unique(as_integers(labels, len(x_ND), "labels"), return_inverse=True)
    counts = np.bincount(class_N, minlength=len(classes)).astype(np.int64)
    means, squares = (np.zeros((len(classes), x_ND.shape[1])) for _ in range(2))
    for c in range(len(classes)):
        mine = x_ND[class_N == c]
        means[c] = mine.mean(axis=0)
        squares[c] = ((mine - means[c]) ** 2).sum(axis=0)
    return ClassMoments(classes, counts, means, squares)


def merge_moments(a: ClassMoments, b: ClassMoments) -> ClassMoments:
    """The moments of both sets (Chan et al., 1979): those of one pass over all items, to rounding."""
    if a.means.shape[1] != b.means.shape[1]:
        raise MetricError(f"chunks of {a.means.shape[1]} and {b.means.shape[1]} dimensions", where="vectors")
    classes = np.union1d(a.classes, b.classes)
    dim = a.means.shape[1]
    counts_a, counts_b = (np.zeros(len(classes), np.int64) for _ in range(2))
    means_a, means_b, squares = (np.zeros((len(classes), dim)) for _ in range(3))
    for part, counts, means in ((a, counts_a, means_a), (b, counts_b, means_b)):
        at = np.searchsorted(classes, part.classes)
        counts[at], means[at] = part.counts, part.means
        squares[at] += part.squares
    total = counts_a + counts_b
    share_b = (counts_b / total)[:, None]
    apart = means_b - means_a
    return ClassMoments(classes, total, means_a + share_b * apart, squares + counts_a[:, None] * share_b * apart**2)


def naive_bayes(moments: ClassMoments, *, shrinkage: float | None = None, uniform: bool = False) -> NaiveBayes:
    """The probe of the items behind `moments`.

    Args:
        shrinkage: in [0, 1]: how far the variance within classes is drawn to that of all items. None: classes / items,
            which is 1 with one item a class, where there is no variance within, and little with many. 0: the paper's.
        uniform: every class as probable as any other, rather than by its share of the items.

    A dimension in which all items agree has no say, whatever it holds later; one that is constant within each class but
    not between them has its variance raised to `FLOOR`. Raises MetricError for fewer than two classes, and where all
    items are the same.
    """
    if len(moments.classes) < 2:
        raise MetricError(
            "all items are of class " + ", ".join(map(str, moments.classes)) if len(moments.classes) else "no items",
            where="labels",
            fix="bring items of two classes or more",
        )
    items = int(moments.counts.sum())
    drawn = len(moments.classes) / items if shrinkage is None else shrinkage
    if not 0 <= drawn <= 1:
        raise MetricError(f"{drawn} is no share", where="shrinkage", fix="between 0 and 1")
    share_C = moments.counts / items
    centre = share_C @ moments.means
    away_CD = moments.means - centre
    within_D = moments.squares.sum(axis=0) / items
    whole_D = within_D + share_C @ away_CD**2
    dead_D = whole_D <= (ROUNDING * np.abs(centre)) ** 2
    if dead_D.all():
        raise MetricError(f"all {items:,} vectors are the same", where="vectors", fix="nothing can be learned of them")
    variance = np.maximum((1 - drawn) * within_D + drawn * whole_D, FLOOR * whole_D.max())
    # About the centre: squared distances in a dimension at the floor would drown all else.
    weights = np.where(dead_D, 0.0, away_CD / variance)
    prior_C = np.full(len(share_C), 1 / len(share_C)) if uniform else share_C
    biases = np.log(prior_C) - 0.5 * (away_CD * weights).sum(axis=1)
    return NaiveBayes(moments.classes, centre, weights, biases, variance)


def won(scores: NDArray[np.float64], classes: NDArray[np.int64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Per item `(N,)`: 1 where the score of its class is the highest of `(N, C)`, by more than rounding."""
    y_N = as_integers(labels, len(scores), "labels")
    at_N = np.searchsorted(classes, y_N).clip(max=len(classes) - 1)
    unknown = np.flatnonzero(classes[at_N] != y_N)
    if len(unknown):
        raise MetricError(
            f"class {y_N[unknown[0]]} in row {unknown[0]} has no item in training ({len(unknown):,} such rows)",
            where="labels",
            fix="leave those items out before, and say how many they were",
        )
    rest_NC = scores.copy()
    rows = np.arange(len(scores))
    mine_N = rest_NC[rows, at_N].copy()
    rest_NC[rows, at_N] = -np.inf
    tie_N = TIE * np.ptp(scores, axis=1)
    hits: NDArray[np.float64] = (mine_N - rest_NC.max(axis=1, initial=-np.inf) > tie_N).astype(np.float64)
    return hits
