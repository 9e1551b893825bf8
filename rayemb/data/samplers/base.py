"""What every sampler offers: the order, or the batches, of one window of a corpus's rows."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from rayemb.config import Config

Indexes = NDArray[np.int64]
Column = Callable[[str], NDArray[np.generic]]


class Window(NamedTuple):
    """The rows that a sampler arranges together, as it sees them.

    rows:   how many there are; a sampler speaks of them as 0 .. rows - 1.
    column: values `(rows,)` of a column: `query`, `text`, `concept` or `id` (63-bit keys), `length` (tokens of the
            row's longest text, prefix included), or one of the sampler's attribute table; `(rows, k)` where each row
            has a list of k values.
    ordinals: `(rows,)` the rows within their split, which is how an attribute table names other rows.
    """

    rows: int
    column: Column
    ordinals: Indexes


class Arrangement(NamedTuple):
    """The rows of a window in the order in which they are to be used.

    order: indexes into the window, each at most once; a row that is not there is left out of this epoch.
    ends:  where each batch ends within `order`, ascending, or None: batches are cut wherever they are full.
    """

    order: Indexes
    ends: Indexes | None = None


class Sampler(Config, ABC):
    """Decides which rows of a window make up a batch. A pure function of the window and the generator."""

    window_rows: int = Field(
        16_384,
        ge=1,
        description="rows that are arranged together: whole row groups, drawn anew each epoch. Planning reads "
        "what it needs of so many rows at a time, and decoding reads them once if they fit its cache",
    )

    @property
    def whole_batches(self) -> bool:
        """Whether the sampler makes the batches itself; those cannot be mixed with other corpora's rows."""
        return True

    @property
    def attributes(self) -> str | None:
        """The URI of the table that columns come from which the corpus does not have."""
        return None

    @abstractmethod
    def arrange(self, window: Window, size: int, rng: np.random.Generator) -> Arrangement:
        """The window's rows in batches of at most `size`."""


def without_replacement(weights: NDArray[np.float64], number: int, rng: np.random.Generator) -> Indexes:
    """`number` different indexes, drawn one after the other with probability proportional to weight.

    Fewer if fewer weights are above zero. Efraimidis and Spirakis (2006): the largest of `u ** (1 / weight)`.
    """
    at = np.flatnonzero(weights > 0)
    keys = np.log(rng.random(len(at))) / weights[at]
    if number < len(at):
        at = at[np.argpartition(-keys, number - 1)[:number]]
    return at.astype(np.int64)


def members(labels: NDArray[np.generic], rng: np.random.Generator) -> list[Indexes]:
    """The rows `(n,)` of each label, shuffled; labels in ascending order."""
    shuffled = rng.permutation(len(labels)).astype(np.int64)
    order = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, sizes = np.unique(labels, return_counts=True)
    return np.split(order, np.cumsum(sizes)[:-1]) if len(labels) else []


def joined(batches: list[Indexes]) -> Arrangement:
    """The arrangement of these batches, in this order."""
    sizes = np.array([len(batch) for batch in batches], dtype=np.int64)
    order = np.concatenate(batches) if batches else np.zeros(0, dtype=np.int64)
    return Arrangement(order, np.cumsum(sizes))
