"""Joining the answers of shards, exactly and always in the same order."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

_LAST = np.iinfo(np.int64).max


def merge(
    scores: Sequence[NDArray[np.float32]], keys: Sequence[NDArray[np.int64]], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The `k` best of several answers: highest score first, lowest key first among equal scores.

    Exact: the result is the one of a single search over all rows if each answer holds the `k` best of its
    part.

    Args:
        scores: one `(N, K_i)` float32 per answer, higher is better; any order within a row.
        keys: one `(N, K_i)` int64 per answer; -1 marks an empty place, whatever its score.
        k: places in the result, >= 1.

    Returns:
        Scores `(N, k)` float32 and keys `(N, k)` int64, padded with -inf and -1.
    """
    all_scores = np.concatenate([np.asarray(part, np.float32) for part in scores], axis=1)
    all_keys = np.concatenate([np.asarray(part, np.int64) for part in keys], axis=1)
    empty = all_keys < 0
    all_scores = np.where(empty, np.float32(-np.inf), all_scores)
    # Empty places last, also behind a real -inf.
    order = np.lexsort((np.where(empty, _LAST, all_keys), -all_scores), axis=1)[:, :k]
    best_scores, best_keys = np.take_along_axis(all_scores, order, 1), np.take_along_axis(all_keys, order, 1)
    best_keys = np.where(best_keys < 0, -1, best_keys)
    missing = k - best_scores.shape[1]
    if missing > 0:
        pad = ((0, 0), (0, missing))
        best_scores = np.pad(best_scores, pad, constant_values=-np.inf)
        best_keys = np.pad(best_keys, pad, constant_values=-1)
    return best_scores, best_keys
