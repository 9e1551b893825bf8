"""Whether a model that says 80 % is right in 80 of a hundred cases.

Suffixes: N items, C classes, B bins that hold any item.
"""

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.metrics.arrays import as_integers
from rayemb.evaluate.metrics.errors import MetricError

SUM = 1e-3
"""How far a row of probabilities may be from 1: what a softmax over thousands of classes loses in half precision."""


class ReliabilityBins(NamedTuple):
    """The reliability diagram: one row a bin that holds any item, from the lowest confidence up."""

    low: NDArray[np.float64]  # (B,) exclusive, but for a confidence of 0
    high: NDArray[np.float64]  # (B,) inclusive
    rows: NDArray[np.int64]  # (B,)
    confidence: NDArray[np.float64]  # (B,) mean of what was said
    accuracy: NDArray[np.float64]  # (B,) mean of what was right


class Calibration(NamedTuple):
    """`ece` and `mce` in [0, 1], 0 is best; `overconfidence` is mean confidence less accuracy, in [-1, 1]."""

    ece: float
    mce: float
    overconfidence: float
    bins: ReliabilityBins


class TopLabel(NamedTuple):
    """The most probable class: how probable, and whether it was right."""

    confidence: NDArray[np.float64]  # (N,)
    hits: NDArray[np.float64]  # (N,) 0 or 1


def top_label(probabilities: NDArray[np.float64], labels: NDArray[np.int64]) -> TopLabel:
    """The confidence and the hit of each row, for `calibration`.

    Args:
        probabilities: `(N, C)` floats, each row adding up to 1 within `SUM`.
        labels: `(N,)` integers in 0 .. C-1.

    A class that shares the first place has lost: a tie counts against the model, as everywhere here. (argmax would give
    it to the class of the lowest number.) Raises MetricError for wrong shapes, fewer than two classes, labels outside
    the classes, and rows that are no probabilities; the message names the first row.
    """
    p_NC, y_N = _probabilities(probabilities, labels)
    own_N = np.take_along_axis(p_NC, y_N[:, None], axis=1)[:, 0]
    best_N = p_NC.max(axis=1)
    alone_N = (p_NC == best_N[:, None]).sum(axis=1) == 1
    return TopLabel(best_N, ((own_N == best_N) & alone_N).astype(np.float64))


def calibration(
    confidence: NDArray[np.float64],
    hits: NDArray[np.float64],
    *,
    bins: int = 15,
    scheme: Literal["width", "mass"] = "width",
) -> Calibration:
    """Expected and maximum calibration error (Naeini et al., 2015; Guo et al., 2017) with the bins behind them.

    Args:
        confidence: `(N,)` floats in [0, 1]: what the model said.
        hits: `(N,)`: 1 where it was right, else 0. For the probability of one event: whether the event came.
        bins: their number at most.
        scheme: "width": bins (a, b] of equal width; 0 is in the first. "mass": as many items in each (Nguyen &
            O'Connor, 2015), which a model that is always sure needs. Equal confidences are never parted, whatever
            the order of the items: a constant model has one bin.

    The error is the mean over items (ece) or the maximum over bins (mce) of |accuracy - confidence|. It is biased up
    where bins hold few items: compare only at equal N, bins and scheme. Raises MetricError for wrong shapes, no items,
    and values outside the ranges; the message names the first row.
    """
    p_N, hit_N = np.asarray(confidence, np.float64), np.asarray(hits, np.float64)
    if p_N.ndim != 1 or p_N.shape != hit_N.shape or not len(p_N):
        raise MetricError(f"expected two of (N,) with N > 0, got {p_N.shape} and {hit_N.shape}", where="confidence")
    _refuse(~((p_N >= 0) & (p_N <= 1)), p_N, "is no probability", "confidence", "between 0 and 1")
    _refuse((hit_N != 0) & (hit_N != 1), hit_N, "is neither hit nor miss", "hits", "1 or 0")
    if bins < 1:
        raise MetricError(f"{bins} bins", where="bins", fix="at least 1")
    if scheme not in ("width", "mass"):
        raise MetricError(f"there is no scheme {scheme!r}", where="scheme", fix="width or mass")
    inner = np.linspace(0, 1, bins + 1)
    edges = inner if scheme == "width" else np.quantile(p_N, inner)
    bin_N = np.searchsorted(edges[1:-1], p_N, side="left")
    held, at_N, count = np.unique(bin_N, return_inverse=True, return_counts=True)
    said = np.bincount(at_N, weights=p_N) / count
    right = np.bincount(at_N, weights=hit_N) / count
    gaps = np.abs(right - said)
    return Calibration(
        float((gaps * count).sum() / len(p_N)),
        float(gaps.max()),
        float(p_N.mean() - hit_N.mean()),
        ReliabilityBins(edges[held], edges[held + 1], count.astype(np.int64), said, right),
    )


def brier(probabilities: NDArray[np.float64], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Per item `(N,)`: the squared distance in [0, 2] of its probabilities from its label (Brier, 1950); 0 is best.

    The sum over all C classes, as Brier has it: with two classes twice what some libraries give. Its mean is a proper
    score, which the calibration error is not. Arguments and errors as for `top_label`.
    """
    p_NC, y_N = _probabilities(probabilities, labels)
    away_NC = p_NC.copy()
    away_NC[np.arange(len(y_N)), y_N] -= 1
    return np.asarray((away_NC**2).sum(axis=1))


def _probabilities(
    probabilities: NDArray[np.float64], labels: NDArray[np.int64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    p_NC = np.asarray(probabilities, np.float64)
    if p_NC.ndim != 2 or not len(p_NC):
        raise MetricError(f"expected floats (N, C) with N > 0, got {p_NC.shape}", where="probabilities")
    if p_NC.shape[1] < 2:
        raise MetricError("one class is always right", where="probabilities", fix="bring two classes or more")
    y_N = as_integers(labels, len(p_NC), "labels")
    _refuse((y_N < 0) | (y_N >= p_NC.shape[1]), y_N, "is no class", "labels", f"0 to {p_NC.shape[1] - 1}")
    bad_NC = ~((p_NC >= 0) & (p_NC <= 1))
    first_N = p_NC[np.arange(len(p_NC)), bad_NC.argmax(axis=1)]
    _refuse(np.asarray(bad_NC.any(axis=1)), first_N, "is no probability", "probabilities", "between 0 and 1")
    sums_N = p_NC.sum(axis=1)
    _refuse(np.abs(sums_N - 1) > SUM, sums_N, "is the sum", "probabilities", "rows add up to 1: give a softmax")
    return p_NC, y_N


def _refuse(bad_N: NDArray[np.bool_], value_N: NDArray[np.generic], what: str, where: str, fix: str) -> None:
    if bad_N.any():
        row = int(np.flatnonzero(bad_N)[0])
        count = int(bad_N.sum())
        more = f" (and in {count - 1:,} more)" if count > 1 else ""
        raise MetricError(f"{value_N[row]} in row {row} {what}{more}", where=where, fix=fix)
