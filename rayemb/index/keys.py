"""Which row of the embeddings table each position of a shard is: a range, or an ascending list."""

import os

import numpy as np
from numpy.typing import NDArray

_STORED = np.dtype("<i8")


def write_keys(path: str, listed: NDArray[np.int64]) -> None:
    """Writes keys `(R,)` to the local file `path`: 64-bit numbers, little-endian, nothing else."""
    # Not in NumPy's format: it parses its header as Python, which CPython 3.11 cannot do in several threads at once
    # (SystemError: AST constructor recursion depth mismatch).
    listed.astype(_STORED).tofile(path)


def read_keys(path: str) -> NDArray[np.int64]:
    """The keys `(R,)` in the local file `path`, its pages shared and read on first use."""
    if not os.path.getsize(path):
        return np.zeros(0, np.int64)  # nothing cannot be mapped
    keys: NDArray[np.int64] = np.asarray(np.memmap(path, _STORED, "r"))
    return keys


class Keys:
    """The keys (row offsets of the table) of a shard's rows, ascending by position.

    Ascending, so that the lowest position among equal scores is the lowest key too.

    Args:
        start: key of the first row, where the others follow without a gap.
        rows: number of rows R.
        listed: the keys themselves `(R,)` int64, ascending, where there are gaps.
    """

    def __init__(self, start: int, rows: int, listed: NDArray[np.int64] | None = None) -> None:
        self.start, self.rows, self.listed = start, rows, listed

    def of(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """The keys at `positions`, any shape; -1 stays -1."""
        if self.listed is None:
            return np.where(positions >= 0, positions + self.start, -1)
        if not self.rows:
            return np.full(positions.shape, -1, np.int64)
        return np.where(positions >= 0, self.listed[np.maximum(positions, 0)], -1)

    def at(self, keys: NDArray[np.int64]) -> NDArray[np.int64]:
        """The positions of `keys`, any shape; -1 for a key that is not of this shard."""
        if self.listed is None:
            positions = keys - self.start
            return np.where((positions >= 0) & (positions < self.rows), positions, -1)
        if not self.rows:
            return np.full(keys.shape, -1, np.int64)
        positions = np.minimum(np.searchsorted(self.listed, keys), self.rows - 1)
        return np.where(self.listed[positions] == keys, positions, -1)
