"""What every metric asks of its arrays before it counts: shape, dtype, finite, of length 1."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.metrics.errors import MetricError

Floats = NDArray[np.floating[Any]]
"""Floats of any precision; what is summed is made float64 first."""
UNIT = 1e-3
"""How far a squared length may be from 1: half-precision vectors still count as unit vectors."""


def as_vectors(array: NDArray[Any], name: str, *, least: int = 0, why: str = "") -> NDArray[np.float64]:
    """`finite_vectors` as float64, of which a copy is made."""
    return finite_vectors(array, name, least=least, why=why).astype(np.float64)


def finite_vectors(array: NDArray[Any], name: str, *, least: int = 0, why: str = "") -> NDArray[np.floating]:
    """`array` as it is, `(N, D)`; MetricError, naming `name`, if it is no table of finite floats.

    Args:
        least: the fewest rows that have a figure; `why` says what for ("a neighbour needs").
    """
    array = np.asarray(array)
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating):
        raise MetricError(f"expected floats (N, D), got {array.dtype} {array.shape}", where=name)
    if len(array) < least or (least and not array.shape[1]):
        raise MetricError(f"{why or 'a figure'} needs {least:,} vectors, got {array.shape}", where=name)
    bad = np.flatnonzero(~np.isfinite(array).all(axis=1))
    if len(bad):
        raise MetricError(
            f"{len(bad):,} of {len(array):,} vectors hold NaN or infinity, the first in row {bad[0]}", where=name
        )
    return array


def as_units(array: NDArray[Any], name: str) -> NDArray[np.float64]:
    """`as_vectors`, and each of length 1 (within half precision)."""
    x_ND = as_vectors(array, name)
    wrong = int((abs((x_ND**2).sum(axis=1) - 1) > UNIT).sum())
    if wrong:
        raise MetricError(f"{wrong:,} of {len(x_ND):,} vectors are not of length 1", where=name, fix="normalise them")
    return x_ND


def normalised(array: NDArray[Any], name: str) -> NDArray[np.float64]:
    """The vectors `(N, D)` at length 1, float64; MetricError if one is zero and so has no direction."""
    x_ND = as_vectors(array, name)
    length_N = np.linalg.norm(x_ND, axis=1, keepdims=True)
    zero = np.flatnonzero(length_N[:, 0] == 0)
    if len(zero):
        raise MetricError(f"{len(zero):,} of {len(x_ND):,} vectors are zero (first: row {zero[0]})", where=name)
    x_ND /= length_N
    return x_ND


def as_integers(array: NDArray[Any], length: int | None, name: str) -> NDArray[np.int64]:
    """`array` as int64 `(N,)`; MetricError if it is not integers or not `length` of them."""
    array = np.asarray(array)
    if array.ndim != 1 or (array.size and not np.issubdtype(array.dtype, np.integer)):
        raise MetricError(f"expected integers (N,), got {array.dtype} {array.shape}", where=name)
    if length is not None and len(array) != length:
        raise MetricError(f"expected {length:,} entries, one a row, got {len(array):,}", where=name)
    return array.astype(np.int64)
