"""What a linear classifier reads from frozen vectors, and how many labels it needs for that.

Suffixes: N training items, Q test items, C classes, D dimensions, S numbers of shots, R repeats.
"""

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from rayemb.evaluate.metrics.arrays import as_integers, as_vectors
from rayemb.evaluate.metrics.errors import MetricError
from rayemb.evaluate.metrics.naive_bayes import class_moments, naive_bayes, won

STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
HELD_OUT = 0.2


class Probe(NamedTuple):
    """Per test item 1 or 0 `(Q,)`, their mean, the mean over classes, and how the probe was found."""

    hits: NDArray[np.float64]
    accuracy: float
    per_class: float
    strength: float
    """C, the inverse of the regularisation. At an end of those swept, a wider sweep may do better."""
    swept: Mapping[float, float]
    """Accuracy on the held-out part of the training items by C; empty where none could be held out."""
    converged: bool


class LearningCurves(NamedTuple):
    """Test accuracy against labels a class, of the generative and the discriminative probe."""

    shots: tuple[int, ...]  # S numbers of items a class
    bayes: NDArray[np.float64]  # (S, R)
    logistic: NDArray[np.float64]  # (S, R)
    bayes_whole: float
    """With all training items: the asymptote."""
    logistic_whole: float
    skipped: tuple[int, ...]
    """Numbers of shots that the smallest class does not have."""

    def reached(self, share: float = 0.98) -> tuple[int | None, int | None]:
        """The fewest shots from which on the mean of each curve stays at `share` of its own asymptote.

        Naive Bayes first, then logistic regression; None where no number of shots that was tried is enough.
        """
        return (
            _first_lasting(self.shots, self.bayes.mean(axis=1) >= share * self.bayes_whole),
            _first_lasting(self.shots, self.logistic.mean(axis=1) >= share * self.logistic_whole),
        )

    @property
    def crossing(self) -> int | None:
        """The fewest shots from which on logistic regression is at least as good; None: never, of those tried."""
        return _first_lasting(self.shots, self.logistic.mean(axis=1) >= self.bayes.mean(axis=1))


def linear_probe(
    train: NDArray[np.floating[Any]],
    labels_train: NDArray[np.int64],
    test: NDArray[np.floating[Any]],
    labels_test: NDArray[np.int64],
    *,
    strengths: Sequence[float] = STRENGTHS,
    normalise: bool = True,
    seed: int,
    max_iter: int = 1000,
) -> Probe:
    """Multinomial logistic regression (L-BFGS, L2) on frozen vectors, as CLIP's (Radford et al., 2021).

    C is chosen on a fifth of each class of the *training* items (at least one where the class has two), by accuracy,
    of equals by log loss; the probe is then fitted to all of them. The test items are looked at once. Ties are misses.

    Args:
        train, labels_train: `(N, D)` floats and `(N,)` integers.
        test, labels_test: `(Q, D)` and `(Q,)`; every class must have occurred in training.
        strengths: the values of C to try; with one, or with no class of two items, nothing is swept (1 where it is one
            of several, else the middle one).
        normalise: to unit length first, as the convention has it; what C means depends on the vectors' length.
        seed: of the split: report mean and spread over several.
        max_iter: of L-BFGS; `converged` says whether it was enough.

    Raises MetricError for wrong shapes, non-finite vectors, no test items, one class, and test classes without
    training; the message names the class and the row. O(|strengths| · steps · N D C) time.
    """
    x_ND, y_N, x_QD, y_Q = _checked(train, labels_train, test, labels_test)
    grid = sorted({float(c) for c in strengths})
    if not grid or not all(np.isfinite(c) and c > 0 for c in grid):
        raise MetricError(f"{list(strengths)} are no strengths", where="strengths", fix="positive, one or more")
    if normalise:
        for x in (x_ND, x_QD):
            _to_unit_length(x)
    kept = len(x_ND)
    if len(grid) > 1:
        held_N = _held_out(y_N, seed)
        order_N, kept = np.argsort(held_N, kind="stable"), int((~held_N).sum())
        x_ND, y_N = x_ND[order_N], y_N[order_N]  # in which both parts are views
    strength, swept = _sweep(x_ND, y_N, kept, grid, max_iter)
    classes, scores_QC, converged = _logistic(x_ND, y_N, x_QD, strength, max_iter)
    hits = won(scores_QC, classes, y_Q)
    return Probe(hits, float(hits.mean()), _per_class(hits, y_Q), strength, swept, converged)


def bayes_probe(
    train: NDArray[np.floating[Any]],
    labels_train: NDArray[np.int64],
    test: NDArray[np.floating[Any]],
    labels_test: NDArray[np.int64],
    *,
    shrinkage: float | None = None,
    uniform: bool = False,
) -> NDArray[np.float64]:
    """Per test item `(Q,)`: 1 where the naive-Bayes probe of the training items is right (S017), else 0.

    Without anything to tune, and linear as the other. Arguments and errors as for `linear_probe` and `naive_bayes`.
    """
    x_ND, y_N, x_QD, y_Q = _checked(train, labels_train, test, labels_test)
    return naive_bayes(class_moments(x_ND, y_N), shrinkage=shrinkage, uniform=uniform).hits(x_QD, y_Q)


def learning_curves(
    train: NDArray[np.floating[Any]],
    labels_train: NDArray[np.int64],
    test: NDArray[np.floating[Any]],
    labels_test: NDArray[np.int64],
    *,
    shots: Sequence[int] = (1, 2, 5, 10, 20, 50, 100),
    repeats: int = 5,
    strengths: Sequence[float] = STRENGTHS,
    normalise: bool = True,
    seed: int,
) -> LearningCurves:
    """Both probes on ever more items a class (S017; Zheng et al., 2023): which of them to take with how many labels.

    Every repeat draws one order of each class's items and takes its first ones, the same for both probes: within a
    repeat more shots contain fewer. The asymptotes are from all training items. Arguments and errors as for
    `linear_probe`; numbers of shots that the smallest class does not have are skipped and named, and with none left
    MetricError says which class lacks items. O(|shots| · repeats) fits of each.
    """
    x_ND, y_N, x_QD, y_Q = _checked(train, labels_train, test, labels_test)
    if repeats < 1 or not len(shots) or min(shots) < 1:
        raise MetricError(f"shots {list(shots)}, {repeats} repeats", where="shots, repeats", fix="all are at least 1")
    if normalise:
        for x in (x_ND, x_QD):
            _to_unit_length(x)
    names, sizes = np.unique(y_N, return_counts=True)
    tried = tuple(k for k in sorted({int(k) for k in shots}) if k <= sizes.min())
    if not tried:
        raise MetricError(
            f"class {names[sizes.argmin()]} has {sizes.min()} items, fewer than {min(shots)} shots",
            where="labels_train",
            fix="ask for fewer shots, or leave that class out",
        )

    def both(rows: NDArray[np.int64], split: int) -> tuple[float, float]:
        x_MD, y_M = x_ND[rows], y_N[rows]
        found = linear_probe(x_MD, y_M, x_QD, y_Q, strengths=strengths, normalise=False, seed=split)
        return float(bayes_probe(x_MD, y_M, x_QD, y_Q).mean()), found.accuracy

    curves = np.empty((len(tried), repeats, 2))
    for r in range(repeats):
        rng = np.random.default_rng([seed, r])
        orders = [rng.permutation(np.flatnonzero(y_N == name)) for name in names]
        for s, k in enumerate(tried):
            curves[s, r] = both(np.concatenate([order[:k] for order in orders]), seed + r)
    bayes_whole, logistic_whole = both(np.arange(len(x_ND)), seed)
    skipped = tuple(sorted({int(k) for k in shots} - set(tried)))
    return LearningCurves(tried, curves[:, :, 0], curves[:, :, 1], bayes_whole, logistic_whole, skipped)


Checked = tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]


def _checked(
    train: NDArray[np.floating[Any]],
    labels_train: NDArray[np.int64],
    test: NDArray[np.floating[Any]],
    labels_test: NDArray[np.int64],
) -> Checked:
    """Copies, to write to; all that can be wrong, before the first fit."""
    x_ND, x_QD = as_vectors(train, "train"), as_vectors(test, "test")
    y_N, y_Q = as_integers(labels_train, len(x_ND), "labels_train"), as_integers(labels_test, len(x_QD), "labels_test")
    if x_ND.shape[1] != x_QD.shape[1]:
        raise MetricError(f"train has {x_ND.shape[1]} dimensions, test {x_QD.shape[1]}", where="test")
    if not len(x_QD) or not len(x_ND):
        raise MetricError(f"{len(x_ND)} training and {len(x_QD)} test items", where="train, test")
    if (y_N == y_N[0]).all():
        raise MetricError(
            f"all {len(y_N):,} items are of class {y_N[0]}", where="labels_train", fix="bring two classes or more"
        )
    unknown = np.flatnonzero(~np.isin(y_Q, y_N))
    if len(unknown):
        raise MetricError(
            f"class {y_Q[unknown[0]]} in row {unknown[0]} has no item in training ({len(unknown):,} such rows)",
            where="labels_test",
            fix="leave those items out before, and say how many they were",
        )
    return x_ND, y_N, x_QD, y_Q


def _to_unit_length(x_ND: NDArray[np.float64]) -> None:
    """In place: of many vectors another copy is what memory is full of."""
    x_ND /= np.maximum(np.sqrt(np.einsum("nd,nd->n", x_ND, x_ND)), 1e-12)[:, None]


def _sweep(
    x_ND: NDArray[np.float64], y_N: NDArray[np.int64], kept: int, grid: list[float], max_iter: int
) -> tuple[float, dict[float, float]]:
    """The best C for the items from `kept` on after a fit to those before, and the accuracy of each."""
    if kept == len(x_ND):
        return (1.0 if 1.0 in grid else grid[len(grid) // 2]), {}
    y_M = y_N[kept:]
    swept, best = {}, (-1.0, 0.0, 0.0)
    for c in grid:
        classes, scores_MC, _ = _logistic(x_ND[:kept], y_N[:kept], x_ND[kept:], c, max_iter)
        own_M = scores_MC[np.arange(len(y_M)), np.searchsorted(classes, y_M)]
        top_M = scores_MC.max(axis=1)
        log_loss = np.mean(top_M + np.log(np.exp(scores_MC - top_M[:, None]).sum(axis=1)) - own_M)
        swept[c] = float(won(scores_MC, classes, y_M).mean())
        best = max(best, (swept[c], -float(log_loss), c))
    return best[2], swept


def _held_out(y_N: NDArray[np.int64], seed: int) -> NDArray[np.bool_]:
    """True `(N,)` for a fifth of each class, at least one item of those that have two and never all."""
    rng = np.random.default_rng(seed)
    held_N = np.zeros(len(y_N), bool)
    for name in np.unique(y_N):
        mine = rng.permutation(np.flatnonzero(y_N == name))
        if len(mine) > 1:
            held_N[mine[: max(1, int(HELD_OUT * len(mine)))]] = True
    return held_N


def _logistic(
    x_ND: NDArray[np.float64], y_N: NDArray[np.int64], x_QD: NDArray[np.float64], strength: float, max_iter: int
) -> tuple[NDArray[np.int64], NDArray[np.float64], bool]:
    """The classes `(C,)`, the scores `(Q, C)`, and whether the fit came to its end."""
    from sklearn.exceptions import ConvergenceWarning  # a second, and every worker of a training imports this module
    from sklearn.linear_model import LogisticRegression

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", ConvergenceWarning)
        model = LogisticRegression(C=strength, max_iter=max_iter, tol=_tolerance(x_ND, y_N)).fit(x_ND, y_N)
    scores = model.decision_function(x_QD)
    if scores.ndim == 1:  # of the second of two classes, against the first
        scores = np.stack([np.zeros_like(scores), scores], axis=1)
    return model.classes_, scores, not any(issubclass(w.category, ConvergenceWarning) for w in told)


def _tolerance(x_ND: NDArray[np.float64], y_N: NDArray[np.int64]) -> float:
    """The largest entry of the gradient at which a fit is at its end: scikit-learn's, or a share of the first one.

    Entries are as small as one over the number of classes: of unit vectors of 2,000 classes all are below 1e-4 before
    the first step, and nothing would be learned.
    """
    classes, at_N = np.unique(y_N, return_inverse=True)
    of_CN = sparse.csr_array((np.ones(len(at_N)), (at_N, np.arange(len(at_N)))), (len(classes), len(at_N)))
    first_CD = (of_CN @ x_ND - x_ND.sum(axis=0) / len(classes)) / len(x_ND)
    return float(min(1e-4, max(5e-3 * np.abs(first_CD).max(), 1e-12)))


def _per_class(hits: NDArray[np.float64], y_Q: NDArray[np.int64]) -> float:
    _, at_Q = np.unique(y_Q, return_inverse=True)
    return float((np.bincount(at_Q, weights=hits) / np.bincount(at_Q)).mean())


def _first_lasting(shots: tuple[int, ...], held: NDArray[np.bool_]) -> int | None:
    """The first number of shots from which on it holds for all."""
    lasting = np.logical_and.accumulate(held[::-1])[::-1]
    return next((k for k, good in zip(shots, lasting, strict=True) if good), None)
