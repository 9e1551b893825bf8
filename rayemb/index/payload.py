"""The payload of a shard, held in memory: rows to show, masks to filter by, ids to look up."""

import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayemb.data.embeddings import ID
from rayemb.index.columns import Column, encoded
from rayemb.index.filters import Filter, Tree, evaluate, parse_filter

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
        self._arrays = {name: encoded(_whole(table.column(name))) for name in self.columns}
        self._filtered = {name: Column(array) for name, array in self._arrays.items()}
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

    def mask(self, filter: Filter | Tree) -> NDArray[np.bool_]:
        """The rows that pass `filter`, bool `(R,)`: a JSON document as `rayemb.index.filters` describes, or parsed.

        Raises FilterError naming the path inside the filter: of a field that does not exist, of a value of
        another type than its column, of what is no filter at all.
        """
        tree = filter if isinstance(filter, Tree) else parse_filter(filter)
        return evaluate(tree, self._filtered, self.rows)

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
    if pa.types.is_string(column.type):
        column = column.cast(pa.large_string())  # one string array ends at 2 GiB
    combined = column.combine_chunks()
    return combined.combine_chunks() if isinstance(combined, pa.ChunkedArray) else combined
