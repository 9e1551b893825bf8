"""The rows of a shard that pass a filter, in the forms that searching needs, kept for filters that come again."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from functools import cached_property
from typing import Any

import faiss as _faiss
import numpy as np
from numpy.typing import NDArray

from rayemb.index.filters import Filter, canonical
from rayemb.index.payload import Payload

faiss: Any = _faiss

# What the selections of a shard may keep in memory, and how many there are.
_KEPT_BYTES = 64 << 20
_KEPT = 256


class Selection:
    """The rows that pass.

    Args:
        mask_R: bool `(R,)`, True for the rows that pass.
    """

    def __init__(self, mask_R: NDArray[np.bool_]) -> None:
        self._set(np.packbits(mask_R, bitorder="little"), len(mask_R))

    def _set(self, bits: NDArray[np.uint8], rows: int) -> "Selection":
        self.rows, self.count = rows, int(np.bitwise_count(bits).sum())
        self._bits = bits
        self.scarce = False  # whether queries found too little of it among what is near to them
        self.per_list: NDArray[np.int64] | None = None  # rows that pass in each IVF list, once they were counted
        return self

    def without(self, positions: NDArray[np.int64]) -> "Selection":
        """Those of its rows that are not at `positions`."""
        bits = self._bits.copy()
        np.bitwise_and.at(bits, positions >> 3, ~(np.uint8(1) << (positions & 7).astype(np.uint8)))
        return Selection.__new__(Selection)._set(bits, self.rows)

    def both(self, other: "Selection") -> "Selection":
        """Those of its rows that `other` has too."""
        return Selection.__new__(Selection)._set(self._bits & other._bits, self.rows)

    @property
    def share(self) -> float:
        """The selectivity: the share of the rows that passes."""
        return self.count / self.rows if self.rows else 0.0

    @property
    def bytes(self) -> int:
        """About what this object takes in memory when all of its forms have been used."""
        return len(self._bits) + 8 * self.count

    def mask(self) -> NDArray[np.bool_]:
        """Bool `(R,)`."""
        return np.unpackbits(self._bits, count=self.rows, bitorder="little").view(np.bool_)

    def has(self, positions: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Whether the rows at `positions` pass, any shape, without a look at the others."""
        found: NDArray[np.bool_] = (self._bits[positions >> 3] >> (positions & 7).astype(np.uint8)) & 1 == 1
        return found

    @cached_property
    def positions(self) -> NDArray[np.int64]:
        """Positions of the rows that pass, ascending."""
        return np.flatnonzero(self.mask()).astype(np.int64)

    @cached_property
    def selector(self) -> Any:
        """FAISS's selector of their positions."""
        return faiss.IDSelectorBitmap(self._bits)


class Selections:
    """The selections of one shard; the latest used are kept, in bounded memory. Threads may share it."""

    def __init__(self, payload: Payload) -> None:
        self._payload = payload
        self._kept: OrderedDict[str, Selection] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def __call__(self, filter: Filter, alive: Selection | None = None) -> Selection:
        """The rows that pass `filter`; of those that are `alive`, if some are not. Raises FilterError."""
        name = canonical(filter)
        if alive is None:
            return self._named(name, lambda: Selection(self._payload.mask(filter)))
        # A shard's rows only ever go: how many there are says which.
        return self._named(f"{alive.count} {name}", lambda: self(filter).both(alive))

    def _named(self, name: str, make: Callable[[], Selection]) -> Selection:
        with self._lock:
            if name in self._kept:
                self._kept.move_to_end(name)
                return self._kept[name]
        found = make()
        with self._lock:
            if name not in self._kept:
                self._kept[name] = found
                self._bytes += found.bytes
            while self._kept and (self._bytes > _KEPT_BYTES or len(self._kept) > _KEPT):
                _, dropped = self._kept.popitem(last=False)
                self._bytes -= dropped.bytes
        return found
