"""Arrow batches as rows: what every columnar format shares."""

from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from rayemb.data.sources.columns import Bad, Columns
from rayemb.data.sources.files import DamageError, Record

_BAD_TEXT = Bad("bad_utf8", "not valid UTF-8")


def batch_rows(columns: Columns) -> int:
    """Rows to hold at once: images are large, texts are not."""
    return 32 if columns.image else 1024


def batch_records(batch: pa.RecordBatch, columns: Columns, first: int) -> Iterator[Record]:
    """The rows of a batch, numbered from `first`. Raises DamageError for a batch whose buffers make no sense."""
    values = []
    for name in columns.names:
        column = batch.column(name)
        try:
            column.validate()  # offsets out of range would be read all the same, and crash
            values.append(_values(column))
        except (pa.ArrowException, OSError) as error:
            raise DamageError(f"column {name!r}: {error}") from error
    for offset, row in enumerate(zip(*values, strict=True)):
        number = first + offset
        yield Record(dict(zip(columns.names, row, strict=True)), f"row {number}", str(number))


def _values(column: pa.Array) -> list[Any]:
    """The values as Python objects; a text that is not UTF-8 as a Bad (Parquet and Arrow do not check it)."""
    try:
        column.validate(full=True)
        return list(column.to_pylist())
    except (UnicodeDecodeError, pa.ArrowInvalid):
        as_bytes = _as_bytes(column)
        if as_bytes is None:
            raise
        as_bytes.validate(full=True)
        return [_decoded(value) for value in as_bytes.to_pylist()]


def _as_bytes(column: pa.Array) -> pa.Array | None:
    """The same column with bytes for texts; None if it has no texts."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        values = _as_bytes(column.dictionary)
        return None if values is None else pa.DictionaryArray.from_arrays(column.indices, values).dictionary_decode()
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return column.cast(pa.large_binary() if pa.types.is_large_string(kind) else pa.binary())
    if (pa.types.is_list(kind) or pa.types.is_large_list(kind)) and pa.types.is_string(kind.value_type):
        return column.cast(pa.list_(pa.binary()))
    return None


def _decoded(value: Any) -> Any:
    if isinstance(value, list):
        return [_decoded(item) for item in value]
    try:
        return value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError:
        return _BAD_TEXT
