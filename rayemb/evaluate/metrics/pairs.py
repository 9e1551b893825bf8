"""Are two things the same? Similarities of given pairs against yes or no (duplicates, paraphrases, verification).

Suffixes: N pairs, D dimensions, T distinct similarities, each a possible threshold.
"""

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.metrics.arrays import as_integers
from rayemb.evaluate.metrics.errors import MetricError
from rayemb.evaluate.metrics.lists import blocks

Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]


class PairClassification(NamedTuple):
    """How well one threshold on the similarity tells pairs that belong together from others.

    Average precision needs no threshold. The others are at the best threshold **of these very pairs**, as the field
    reports them: an upper bound. For a threshold that was chosen elsewhere see `pair_hits`.
    """

    average_precision: float
    accuracy: float
    accuracy_threshold: float
    f1: float
    f1_threshold: float
    precision: float
    """At `f1_threshold`, as `recall` and `mcc`."""
    recall: float
    mcc: float
    """Matthews' correlation; 0 where all pairs are on one side of the threshold."""
    pairs: int
    positives: int


def pair_similarities(
    a: NDArray[np.float32], b: NDArray[np.float32], similarity: Similarity = "cosine"
) -> NDArray[np.float64]:
    """How alike `(N,)` float64 the rows of `a` and `b`, both `(N, D)`, are; more is more alike.

    Distances (`euclidean`, `manhattan`) come negated. The cosine with a zero vector is 0. Memory beside the arguments
    is bounded. Raises MetricError for wrong shapes and names the first pair that is not finite.
    """
    a, b = np.asarray(a), np.asarray(b)
    if a.ndim != 2 or a.shape != b.shape or not all(np.issubdtype(x.dtype, np.floating) for x in (a, b)):
        raise MetricError(f"expected two of floats (N, D), got {a.dtype} {a.shape} and {b.dtype} {b.shape}", where="b")
    if similarity not in ("cosine", "dot", "euclidean", "manhattan"):
        raise MetricError(
            f"there is no similarity {similarity!r}", where="similarity", fix="cosine, dot, euclidean or manhattan"
        )
    result = np.empty(len(a))
    for part in blocks(*a.shape):
        x, y = a[part].astype(np.float64), b[part].astype(np.float64)
        bad = np.flatnonzero(~(np.isfinite(x).all(axis=1) & np.isfinite(y).all(axis=1)))
        if len(bad):
            raise MetricError(f"pair {part.start + bad[0]} holds NaN or infinity", where="a, b")
        if similarity == "euclidean":
            result[part] = -np.linalg.norm(x - y, axis=1)
        elif similarity == "manhattan":
            result[part] = -np.abs(x - y).sum(axis=1)
        elif similarity == "dot":
            result[part] = np.einsum("nd,nd->n", x, y)
        else:
            # Each to unit length first: the product of two norms could overflow or vanish.
            norms = [np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y)]
            x, y = (v / np.where(norm > 0, norm, 1) for v, norm in zip((x, y), norms, strict=True))
            result[part] = np.einsum("nd,nd->n", x, y)
    return result


def pair_classification(similarities: NDArray[np.float64], labels: NDArray[np.int64]) -> PairClassification:
    """Average precision, best accuracy and best F1 of `(N,)` similarities with `(N,)` labels, 1 same and 0 not.

    Equal similarities stand on one side of every threshold: their order among themselves has no effect, and a constant
    model has the share of positives as its average precision. A pair is "same" from the threshold on; thresholds lie
    halfway between neighbours. The best accuracy may be that of calling all pairs different (as in
    sentence-transformers 6; mteb leaves this threshold and that of calling all the same out). Of equally good
    thresholds the highest. O(N log N).

    Raises MetricError for wrong shapes, similarities that are not finite (naming the pair), labels other than 0 and 1,
    and labels of one class only.
    """
    s_N, y_N = _pairs(similarities, labels)
    positives = int(y_N.sum())
    if positives in (0, len(y_N)):
        raise MetricError(
            f"all {len(y_N):,} pairs are of class {int(positives > 0)}, so that there is nothing to tell apart",
            where="labels",
            fix="bring pairs of both classes",
        )
    order = np.argsort(-s_N, kind="stable")
    s_N, y_N = s_N[order], y_N[order]
    last_T = np.flatnonzero(np.append(s_N[1:] != s_N[:-1], True))  # where each run of equal similarities ends
    called_T = last_T + 1
    right_T = np.cumsum(y_N)[last_T]
    threshold_T = _halfway(s_N[last_T])

    precision_T, recall_T = right_T / called_T, right_T / positives
    average_precision = float((np.diff(recall_T, prepend=0.0) * precision_T).sum())
    f1_T = 2 * right_T / (called_T + positives)
    best = int(f1_T.argmax())

    correct_T = right_T + (len(y_N) - positives) - (called_T - right_T)
    correct = np.concatenate([[len(y_N) - positives], correct_T])
    thresholds = np.concatenate([[np.nextafter(s_N[0], np.inf)], threshold_T])
    top = int(correct.argmax())
    return PairClassification(
        average_precision=average_precision,
        accuracy=float(correct[top] / len(y_N)),
        accuracy_threshold=float(thresholds[top]),
        f1=float(f1_T[best]),
        f1_threshold=float(threshold_T[best]),
        precision=float(precision_T[best]),
        recall=float(recall_T[best]),
        mcc=_mcc(int(right_T[best]), int(called_T[best]), positives, len(y_N)),
        pairs=len(y_N),
        positives=positives,
    )


def pair_hits(similarities: NDArray[np.float64], labels: NDArray[np.int64], threshold: float) -> NDArray[np.float64]:
    """Per pair `(N,)` float64: 1 where the threshold says what the label says, else 0; from the threshold on is "same".

    With a threshold from other pairs (a validation part) the mean is an accuracy without hindsight.
    """
    s_N, y_N = _pairs(similarities, labels)
    if not np.isfinite(threshold):
        raise MetricError(f"the threshold is {threshold}", where="threshold")
    hits: NDArray[np.float64] = ((s_N >= threshold) == (y_N == 1)).astype(np.float64)
    return hits


def _pairs(
    similarities: NDArray[np.float64], labels: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    s_N: NDArray[np.float64] = np.asarray(similarities)
    if s_N.ndim != 1 or not np.issubdtype(s_N.dtype, np.floating):
        raise MetricError(f"expected floats (N,), got {s_N.dtype} {s_N.shape}", where="similarities")
    labels = np.asarray(labels)
    y_N = as_integers(labels.astype(np.int64) if labels.dtype == bool else labels, len(s_N), "labels")
    bad, other = np.flatnonzero(~np.isfinite(s_N)), np.flatnonzero((y_N != 0) & (y_N != 1))
    if len(bad):
        raise MetricError(f"pair {bad[0]} has the similarity {s_N[bad[0]]}", where="similarities")
    if len(other):
        raise MetricError(f"pair {other[0]} has the label {y_N[other[0]]}", where="labels", fix="1 is same, 0 is not")
    if not len(s_N):
        raise MetricError("there are no pairs", where="similarities")
    return np.asarray(s_N, np.float64), y_N


def _halfway(s_T: NDArray[np.float64]) -> NDArray[np.float64]:
    """Between each similarity and the next lower one; the last is its own. Never the lower one itself by rounding."""
    lower = np.append(s_T[1:], s_T[-1])
    half = s_T / 2 + lower / 2  # the sum itself may overflow
    halfway: NDArray[np.float64] = np.where(half > lower, half, s_T)
    return halfway


def _mcc(right: int, called: int, positives: int, pairs: int) -> float:
    """Matthews' correlation of a table in whole numbers, which at this size must not overflow 64 bits."""
    wrong, missed = called - right, positives - right
    rest = pairs - called - missed
    sides = called * (pairs - called) * positives * (pairs - positives)
    return float((right * rest - wrong * missed) / sides**0.5) if sides else 0.0
