"""The k-th largest score of a corpus, exactly, from histograms that add up over shards. Knows no Ray.

A float32 score, made an order-preserving 32-bit integer, and the row's ordinal, which breaks ties, are read 16 bits at
a time: the first histogram says in which bin the k-th largest lies, the next looks into that bin, and so on until a
bin is wanted whole. Two passes find a threshold among distinct scores, each with a state of 65,536 counts at most; the
result is the same for any sharding, which quantiles of shards are not.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BITS = 16
SCORE_DIGITS, DIGITS = 2, 6  # of 16 bits: 32 bits of score, 64 bits of the ordinal
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Cut:
    """A place in the order of scores, the first of equals before the others: leading digits of the last row kept."""

    digits: tuple[int, ...]

    def keeps(self, scores_N: NDArray[np.float32], rows_N: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which rows `(N,)` lie at the cut or above it."""
        keep = np.ones(len(scores_N), bool)
        undecided = keep.copy()
        for depth, digit in enumerate(self.digits):
            found = _digit(scores_N, rows_N, depth)
            keep &= ~undecided | (found >= digit)
            undecided &= found == digit
        return keep

    @property
    def score(self) -> float:
        """The lowest score that is kept; -inf if all are."""
        if not self.digits:
            return -np.inf
        high, low = self.digits[:SCORE_DIGITS]
        return float(_score(np.array([high << BITS | low], np.uint32))[0])


def histogram(scores_N: NDArray[np.float32], rows_N: NDArray[np.int64], prefix: tuple[int, ...]) -> Counts:
    """How many rows that begin with the digits of `prefix` have each next digit: `(65536,)`. Adds up over shards.

    Raises ValueError for a score that is not a number: it has no place in the order.
    """
    if np.isnan(scores_N).any():
        raise ValueError("a score is NaN")
    chosen = np.ones(len(scores_N), bool)
    for depth, digit in enumerate(prefix):
        chosen &= _digit(scores_N, rows_N, depth) == digit
    counts: Counts = np.bincount(_digit(scores_N, rows_N, len(prefix))[chosen], minlength=1 << BITS)
    return counts


def cut_at(rows: int, keep: int, count: Callable[[tuple[int, ...]], Counts]) -> Cut | None:
    """The cut that keeps exactly the `keep` best of `rows`; None if none is to be kept.

    `count(prefix)` is `histogram` over the whole corpus. Of rows with equal scores those with lower ordinals stay.
    """
    if keep <= 0:
        return None
    digits: tuple[int, ...] = ()
    wanted, inside = min(keep, rows), rows
    # Two digits at least, once there is a cut: they are the lowest score that is kept.
    while (inside > wanted and len(digits) < DIGITS) or 0 < len(digits) < SCORE_DIGITS:
        counts = count(digits)
        above = np.cumsum(counts[::-1])[::-1]  # rows with this digit or a higher one
        digit = int(np.flatnonzero(above >= wanted)[-1])
        wanted -= int(above[digit] - counts[digit])
        inside = int(counts[digit])
        digits = (*digits, digit)
    return Cut(digits)


def _digit(scores_N: NDArray[np.float32], rows_N: NDArray[np.int64], depth: int) -> NDArray[np.int64]:
    if depth < SCORE_DIGITS:
        # + 0.0: minus zero and zero are one score.
        raw = (np.asarray(scores_N, np.float32) + np.float32(0)).view(np.uint32)
        ordered = np.where(raw >> 31, ~raw, raw | np.uint32(1 << 31))
        return (ordered >> np.uint32(BITS * (1 - depth)) & np.uint32(0xFFFF)).astype(np.int64)
    shift = np.uint64(BITS * (DIGITS - 1 - depth))
    reversed_N = ~np.asarray(rows_N, np.int64).astype(np.uint64)  # so that a lower ordinal is more
    return (reversed_N >> shift & np.uint64(0xFFFF)).astype(np.int64)


def _score(ordered: NDArray[np.uint32]) -> NDArray[np.float32]:
    return np.where(ordered >> 31, ordered & np.uint32(0x7FFFFFFF), ~ordered).astype(np.uint32).view(np.float32)
