"""The payload of a shard, held in memory: rows to show, masks to filter by, ids to look up."""

import math
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rayemb.data.embeddings import ID
from rayemb.index.errors import FilterError

Filter = Mapping[str, str | int | float | bool]
_BATCH = 65_536


class Payload:
    """The ids and payload columns of R rows; texts are dictionary-encoded: a repeated value costs 4 bytes.

    Args:
        table: the column `id` and any payload columns, R rows.
    """

    def __init__(self, table: pa.Table) -> None:
        self.rows = table.num_rows
        self.columns = [name for name in table.schema.names if name != ID]
        self._ids = _whole(table.column(ID))
        self._arrays = {name: _encoded(_whole(table.column(name))) for name in self.columns}
        self._lookup: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
        self._lock = threading.Lock()

    def take(self, positions: Sequence[int] | NDArray[np.int64]) -> list[dict[str, Any]]:
        """Id and payload of the rows at `positions`, in that order."""
        # Scalar access: for the ten rows of an answer it is faster than an arrow take of each column.
        found = []
        for position in positions:
            row = {ID: self._ids[position].as_py()}
            for name, array in self._arrays.items():
                row[name] = array[position].as_py()
            found.append(row)
        return found

    def ids(self, positions: pa.Array) -> pa.Array:
        """The ids of the rows at `positions`, in that order, as arrow texts; null where the position is null."""
        return self._ids.take(positions)

    def position(self, row_id: str) -> int | None:
        """The position of the row with this id, or None. The first call sorts the ids' hashes."""
        if self._lookup is None:
            with self._lock:
                if self._lookup is None:
                    hashes = id_hashes(self._batches())
                    order = np.argsort(hashes, kind="stable")
                    self._lookup = hashes[order], order
        hashes, order = self._lookup
        wanted = hash(row_id)
        at = int(np.searchsorted(hashes, wanted))
        while at < len(hashes) and hashes[at] == wanted:
            if self._ids[int(order[at])].as_py() == row_id:
                return int(order[at])
            at += 1
        return None

    def mask(self, conditions: Filter) -> NDArray[np.bool_]:
        """Which rows equal every value of `conditions`, bool `(R,)`; a null equals nothing.

        Raises FilterError for a field that does not exist, or a value of another type than its column.
        """
        passing = np.ones(self.rows, np.bool_)
        for name, value in conditions.items():
            if name not in self._arrays:
                there = ", ".join(self.columns) or "none"
                raise FilterError("there is no such field", where=f"filter.{name}", fix=f"fields: {there}")
            passing &= _equal(self._arrays[name], name, value)
        return passing

    def _batches(self) -> Iterator[pa.Array]:
        for start in range(0, self.rows, _BATCH):
            yield self._ids.slice(start, _BATCH)


def id_hashes(batches: Iterator[pa.Array]) -> NDArray[np.int64]:
    """64-bit hashes of the ids in `batches`, comparable within this process only."""
    parts = [np.fromiter((hash(each) for each in batch.to_pylist()), np.int64, len(batch)) for batch in batches]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _whole(column: pa.ChunkedArray) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_float16(column.type):
        column = column.cast(pa.float32())  # arrow compares no halves
    if pa.types.is_string(column.type):
        column = column.cast(pa.large_string())  # one string array ends at 2 GiB
    combined = column.combine_chunks()
    return combined.combine_chunks() if isinstance(combined, pa.ChunkedArray) else combined


def _encoded(array: pa.Array) -> pa.Array:
    return array.dictionary_encode() if pa.types.is_large_string(array.type) else array


def _equal(array: pa.Array, name: str, value: object) -> NDArray[np.bool_]:
    kind = array.type
    nothing = np.zeros(len(array), np.bool_)
    if pa.types.is_dictionary(kind) and pa.types.is_large_string(kind.value_type):
        if not isinstance(value, str):
            raise _wrong_type(name, "a text", value)
        code = pc.index(array.dictionary, pa.scalar(value, kind.value_type)).as_py()
        return _as_mask(pc.equal(array.indices, pa.scalar(code, array.indices.type))) if code >= 0 else nothing
    if pa.types.is_boolean(kind):
        if not isinstance(value, bool):
            raise _wrong_type(name, "true or false", value)
    elif pa.types.is_integer(kind):
        if not isinstance(value, int) or isinstance(value, bool):
            raise _wrong_type(name, "a whole number", value)
    elif pa.types.is_floating(kind):
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise _wrong_type(name, "a finite number", value)
        value = float(value)
    else:
        raise FilterError(
            f"a column of type {kind} cannot be filtered by",
            where=f"filter.{name}",
            fix="filter by a column of texts, whole numbers, numbers or booleans",
        )
    try:
        # In the column's type: 0.1 as float32 is not 0.1 as float64, and nobody means that difference.
        wanted = pa.scalar(value, kind)
    except (pa.ArrowInvalid, OverflowError):
        return nothing  # beyond the column's range: no row can hold it
    return _as_mask(pc.equal(array, wanted))


def _as_mask(equal: pa.Array) -> NDArray[np.bool_]:
    mask: NDArray[np.bool_] = equal.fill_null(False).to_numpy(zero_copy_only=False)
    return mask


def _wrong_type(name: str, expected: str, value: object) -> FilterError:
    return FilterError(f"expected {expected}, got {value!r}", where=f"filter.{name}")
