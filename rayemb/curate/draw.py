"""Chance that depends on a row's ordinal and a seed alone: the same on any number of workers. Knows no Ray."""

import numpy as np
from numpy.typing import NDArray


def uniform_of(rows_N: NDArray[np.int64], seed: int) -> NDArray[np.float64]:
    """A number `(N,)` in [0, 1) for each ordinal (two rounds of SplitMix64, Steele et al., 2014)."""
    state = np.asarray(rows_N, np.int64).astype(np.uint64) ^ _mixed(np.array([seed + 1], np.uint64))
    return (_mixed(_mixed(state)) >> np.uint64(11)).astype(np.float64) / 2**53


def _mixed(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    with np.errstate(over="ignore"):
        state = state + np.uint64(0x9E3779B97F4A7C15)
        state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))
