"""What is asked of an update before it is written: nothing that is wrong gets into the log.

Shape suffixes: N items, D dimensions.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike, NDArray

from rayemb.data.embeddings import ID, IMAGE, VECTOR
from rayemb.index.columns import kind_of
from rayemb.index.errors import UpdateError
from rayemb.index.live.log import DELETED

MAX_ID_BYTES = 512
# A vector of this length or less has no direction in float32.
_ZERO = 1e-12
# A length that differs from one by less is what float32 makes of it: the vector is taken as it is.
_UNIT = 1e-4


def upserts(
    schema: pa.Schema,
    ids: Sequence[str],
    vectors: ArrayLike,
    payload: Sequence[Mapping[str, Any]] | None,
    images: Sequence[bytes | None] | None,
    required: Collection[str] = (),
) -> pa.Table:
    """The rows of a log that put these N items in the place of whatever had their ids.

    Vectors `(N, D)` are scaled to unit length. Fields that a payload leaves out are null, or an empty text where the
    column is `required`; timestamps may be texts of ISO 8601. Of items with the same id the last one counts. Raises
    UpdateError naming the first item that is wrong.
    """
    _check_ids(ids)
    dim = schema.field(VECTOR).type.list_size
    x_ND = _unit(vectors, len(ids), dim)
    payload = payload if payload is not None else [{}] * len(ids)
    for name, given in (("payload", payload), ("images", images)):
        if given is not None and len(given) != len(ids):
            raise UpdateError(f"{len(given)} for {len(ids)} ids", where=name)
    fixed = (ID, DELETED, VECTOR, IMAGE)
    names = [name for name in schema.names if name not in fixed]
    for i, row in enumerate(payload):
        for name in row:
            if name not in names:
                fix = f"fields: {', '.join(names) or 'none'}"
                raise UpdateError("there is no such field", where=f"items[{i}].payload.{name}", fix=fix)
    columns: dict[str, pa.Array] = {
        ID: pa.array(ids, pa.string()),
        DELETED: pa.array(np.zeros(len(ids), np.bool_)),
        VECTOR: pa.FixedSizeListArray.from_arrays(pa.array(x_ND.reshape(-1)), dim),
    }
    if IMAGE in schema.names:
        columns[IMAGE] = pa.array(images if images is not None else [None] * len(ids), pa.binary())
    elif images is not None and any(image is not None for image in images):
        raise UpdateError("the embeddings keep no images", where="images", fix="embed with embed.images: true")
    for name in names:
        column = _column([row.get(name) for row in payload], name, schema.field(name).type)
        if name in required and column.null_count:
            if kind_of(column.type) != "string":
                missing = int(np.argmax(column.is_null().to_numpy(zero_copy_only=False)))
                raise UpdateError("a value is required", where=f"items[{missing}].payload.{name}")
            column = column.fill_null("")
        columns[name] = column
    last = {row_id: i for i, row_id in enumerate(ids)}
    rows = pa.table({name: columns[name] for name in schema.names}, schema=schema)
    return rows if len(last) == len(ids) else rows.take(sorted(last.values()))


def deletes(schema: pa.Schema, ids: Sequence[str]) -> pa.Table:
    """The rows of a log that remove the items with these ids, whether they are there or not. Raises UpdateError."""
    _check_ids(ids)
    unique = list(dict.fromkeys(ids))
    columns = {field.name: pa.nulls(len(unique), field.type) for field in schema}
    columns |= {ID: pa.array(unique, pa.string()), DELETED: pa.array(np.ones(len(unique), np.bool_))}
    return pa.table(columns, schema=schema)


def _check_ids(ids: Sequence[str]) -> None:
    if not len(ids):
        raise UpdateError("expected at least one item", where="items")
    for i, row_id in enumerate(ids):
        where = f"items[{i}].id"
        if not isinstance(row_id, str) or not row_id:
            raise UpdateError("an id is a text of at least one character", where=where)
        try:
            size = len(row_id.encode())
        except UnicodeEncodeError as error:
            raise UpdateError("the id is no valid Unicode", where=where) from error
        if size > MAX_ID_BYTES:
            raise UpdateError(f"the id has {size} bytes; at most {MAX_ID_BYTES} are taken", where=where)


def _unit(vectors: ArrayLike, count: int, dim: int) -> NDArray[np.float32]:
    try:
        # As float64 first: what is too large for float32 would become infinite without a word.
        x_ND = np.asarray(vectors, np.float64)
    except (ValueError, TypeError, OverflowError) as error:
        raise UpdateError("expected rows of numbers, all of one length", where="items") from error
    if x_ND.shape != (count, dim):
        raise UpdateError(f"expected vectors of shape ({count}, {dim}), got {x_ND.shape}", where="items")
    with np.errstate(over="ignore", invalid="ignore"):
        length_N = np.linalg.norm(x_ND, axis=1)
    for bad, what in (
        (~np.isfinite(x_ND).all(axis=1), "the vector holds NaN or infinity"),
        (~np.isfinite(length_N), "the vector is too long to be scaled"),
        (length_N <= _ZERO, "the vector is zero: it has no direction to compare"),
    ):
        if bad.any():
            raise UpdateError(what, where=f"items[{int(np.argmax(bad))}].vector")
    scale_N = np.where(np.abs(length_N - 1) < _UNIT, 1.0, length_N)
    return np.ascontiguousarray(x_ND / scale_N[:, None], np.float32)


def _column(values: list[Any], name: str, kind: pa.DataType) -> pa.Array:
    what = kind_of(kind)
    checked: list[Any] = []
    for i, value in enumerate(values):
        where = f"items[{i}].payload.{name}"
        checked.append(None if value is None else _value(value, what, where))
    try:
        column = pa.array(checked, kind)
        if pa.types.is_floating(kind):
            infinite = pc.is_inf(column.cast(pa.float64())).fill_null(False).to_numpy(zero_copy_only=False)
            if infinite.any():
                bad = int(np.argmax(infinite))
                raise UpdateError(f"{_short(values[bad])} is beyond {kind}", where=f"items[{bad}].payload.{name}")
        return column
    except UpdateError:
        raise
    except (pa.ArrowException, ValueError, TypeError, OverflowError):
        for i, value in enumerate(checked):
            try:
                pa.array([value], kind)
            except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
                raise UpdateError(
                    f"expected {kind}, got {_short(values[i])}", where=f"items[{i}].payload.{name}"
                ) from error
        raise


def _value(value: Any, kind: str, where: str) -> Any:
    """`value` for a column of this kind. Raises UpdateError if it is of another."""
    if kind.startswith("list of "):
        if not isinstance(value, list | tuple):
            raise UpdateError(f"expected a list, got {_short(value)}", where=where)
        inner = kind.removeprefix("list of ")
        return [None if each is None else _value(each, inner, f"{where}[{i}]") for i, each in enumerate(value)]
    if kind == "timestamp" and isinstance(value, str):
        try:
            moment = datetime.fromisoformat(value)
        except ValueError as error:
            fix = "write 2026-01-31 or 2026-01-31T12:00:00Z"
            raise UpdateError(f"{_short(value)} is no timestamp of ISO 8601", where=where, fix=fix) from error
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    fits = {
        "string": isinstance(value, str),
        "boolean": isinstance(value, bool),
        "integer": is_number and (isinstance(value, int) or value.is_integer()),
        "number": is_number and _is_finite(value),
        "timestamp": isinstance(value, date),
        "point": isinstance(value, Mapping) and set(value) == {"lat", "lon"},
    }
    if not fits.get(kind, True):
        raise UpdateError(f"expected {_EXPECTED[kind]}, got {_short(value)}", where=where)
    if kind == "integer":
        return int(value)
    if kind == "point":
        return {name: _value(each, "number", f"{where}.{name}") for name, each in value.items()}
    return value


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number of hundreds of digits
        return False


def _short(value: object) -> str:
    text = ascii(value)
    return text if len(text) <= 80 else text[:77] + "..."


_EXPECTED = {
    "string": "a text",
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a finite number",
    "timestamp": "a timestamp as text",
    "point": "a point with lat and lon",
}
