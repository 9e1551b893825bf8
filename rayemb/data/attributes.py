"""Columns beside a corpus: one value per row, in the corpus's order, such as a cluster or a list of neighbours."""

import itertools
import uuid
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rayemb import storage
from rayemb.data.corpus import Corpus, CorpusError, RowGroup, read_row_group

DIGEST_KEY = b"rayemb.corpus"
ROWS_PER_GROUP = 1 << 16


class Attributes:
    """An attribute table of one split: `<name>.parquet`, row n of it about row n of the split."""

    def __init__(self, uri: str, corpus: Corpus, split: str) -> None:
        """Opens the table's footer. Raises CorpusError if it was made for another corpus or has other rows."""
        self.uri = storage.normalise(uri)
        fs, path = storage.filesystem(self.uri)
        try:
            self._file = pq.ParquetFile(path, filesystem=fs, page_checksum_verification=True)
        except (OSError, pa.ArrowInvalid) as error:
            raise CorpusError(f"no readable attribute table ({error})", where=self.uri) from error
        found = (self._file.schema_arrow.metadata or {}).get(DIGEST_KEY, b"").decode()
        if found != f"{corpus.digest}/{split}":
            raise CorpusError(
                f"the attribute table is not about split {split!r} of this corpus",
                where=self.uri,
                fix="make it again with `rayemb index clusters` or `rayemb index neighbours`",
            )
        self.columns = tuple(self._file.schema_arrow.names)
        rows = [self._file.metadata.row_group(g).num_rows for g in range(self._file.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(rows)]).astype(np.int64)
        if self._starts[-1] != corpus.rows(split):
            raise CorpusError(f"has {self._starts[-1]} rows, the split {corpus.rows(split)}", where=self.uri)
        self._last: tuple[tuple[int, str], NDArray[np.generic]] | None = None

    def read(self, group: RowGroup, column: str) -> NDArray[np.generic]:
        """The values of a row group's rows: `(rows,)`, or `(rows, k)` for lists of k."""
        parts, at, stop = [], group.first, group.first + group.rows
        while at < stop:
            own = int(np.searchsorted(self._starts, at, side="right") - 1)
            start, end = int(self._starts[own]), int(self._starts[own + 1])
            parts.append(self._values(own, column)[at - start : min(stop, end) - start])
            at = min(stop, end)
        return np.concatenate(parts)

    def _values(self, own: int, column: str) -> NDArray[np.generic]:
        if self._last is None or self._last[0] != (own, column):
            values = self._file.read_row_group(own, columns=[column]).column(0).combine_chunks()
            if pa.types.is_fixed_size_list(values.type):
                array = values.flatten().to_numpy().reshape(-1, values.type.list_size)
            else:
                array = values.to_numpy(zero_copy_only=False)
            self._last = (own, column), array
        return self._last[1]


def write_attributes(
    uri: str, corpus: Corpus, split: str, chunks: Iterable[tuple[Sequence[str] | None, dict[str, NDArray[np.generic]]]]
) -> str:
    """Writes columns `(n,)` or `(n, k)` chunk by chunk, about the rows of a split in their order; gives the URI.

    A chunk comes with the ids that its values are for, checked against the corpus's, or with None. One chunk is held
    at a time. Raises CorpusError, and leaves nothing behind, if ids or numbers differ.
    """
    uri = storage.normalise(uri)
    fs, path = storage.filesystem(uri)
    # An S3 object appears when it is complete; a local file gets its name then.
    target = path if uri.startswith("s3://") else f"{path}.{uuid.uuid4().hex}.tmp"
    groups = corpus.row_groups(split)
    ids = (value for group in groups for value in read_row_group(group, ["id"]).column(0).to_pylist())
    rows, writer = 0, None
    try:
        for expected, columns in chunks:
            arrays = {name: _array(values) for name, values in columns.items()}
            table = pa.table(arrays).replace_schema_metadata({DIGEST_KEY: f"{corpus.digest}/{split}".encode()})
            if expected is not None and list(itertools.islice(ids, len(table))) != list(expected):
                raise CorpusError(
                    f"the values are not for the rows of split {split!r}, in their order", where=corpus.uri
                )
            if writer is None:
                if target != path:
                    fs.create_dir(path.rsplit("/", 1)[0], recursive=True)
                writer = pq.ParquetWriter(
                    target, table.schema, filesystem=fs, compression="zstd", write_page_checksum=True
                )
            writer.write_table(table, row_group_size=ROWS_PER_GROUP)
            rows += len(table)
        if rows != corpus.rows(split):
            raise CorpusError(f"there are {rows} values for {corpus.rows(split)} rows", where=corpus.uri)
    except BaseException:
        if writer is not None:
            writer.close()
            fs.delete_file(target)
        raise
    if writer is not None:
        writer.close()
        if target != path:
            fs.move(target, path)
    return uri


def _array(values: NDArray[np.generic]) -> pa.Array:
    flat = pa.array(np.ascontiguousarray(values).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1]) if values.ndim == 2 else flat
