"""The column mapping that all table-like sources share: which of their columns means what."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
from pydantic import Field, model_validator

from rayemb.config import Config
from rayemb.data.corpus import Kind
from rayemb.data.sources.base import RawRow, SourceError

_NAMES = ("concept", "style", "license", "split")  # a text or an integer in each


class Columns(Config):
    """Which of the source's columns means what. Without an image a row pairs `query` and `text`, or is a text alone."""

    id: str | None = Field("id", description="unique name of the row; null: made of file and row number")
    image: str | None = Field(
        "image",
        description="encoded image: binary, a struct with `bytes` (and `path`), or a URI below image_root; null: none",
    )
    text: str | None = Field("text", description="the text; null: the first of texts")
    query: str | None = Field(None, description="text that asks for `text`, in a corpus of text pairs")
    texts: str | None = Field(None, description="list of further captions (in a CSV: a JSON list)")
    negatives: str | None = Field(None, description="list of texts that look like answers and are none")
    concept: str | None = Field(None, description="label: pairs of one label are positives of each other")
    score: str | None = Field(None, description="number: how well the pair fits")
    style: str | None = None
    license: str | None = None
    split: str | None = None

    @model_validator(mode="after")
    def _paired(self) -> "Columns":
        if self.text is None and self.texts is None:
            raise ValueError("text or texts must be a column")
        if self.image and self.query:
            raise ValueError("a row has an image or a query, not both: set image to null for text pairs")
        return self

    @property
    def kind(self) -> Kind:
        """What a row pairs."""
        return "image_text" if self.image else "text_pair" if self.query else "text"

    @property
    def mapped(self) -> dict[str, str]:
        """Column by key, for the keys that have one."""
        return {key: column for key, column in self.model_dump().items() if column}

    @property
    def names(self) -> list[str]:
        """The columns to read, each once."""
        return list(dict.fromkeys(self.mapped.values()))


@dataclass(frozen=True)
class Bad:
    """Stands for a value that is there and cannot be used."""

    reason: str
    what: str


class _BadValueError(Exception):
    def __init__(self, reason: str, what: str) -> None:
        super().__init__(what)
        self.bad = (reason, what)


def to_row(
    values: Mapping[str, Any], columns: Columns, *, source: str, key: str, split: str = ""
) -> tuple[RawRow, str | None]:
    """The row that `values` (by column) mean, and the URI of its image where it has one instead of bytes.

    `key` is its id where no column is. A value of a wrong type makes it a row with a problem.
    """
    id_ = key if columns.id is None else ""
    try:
        if columns.id:
            id_ = _name(values, "id", columns.id)
        image, uri = _image(values.get(columns.image), columns.image) if columns.image else (None, None)
        texts = _texts(values, "texts", columns.texts)
        text = _text(values, "text", columns.text)
        row = RawRow(
            id=id_,
            image=image,
            text=text or (texts[0] if texts and columns.text is None else text),
            source=source,
            query=_text(values, "query", columns.query),
            texts=texts,
            negatives=_texts(values, "negatives", columns.negatives),
            score=_score(values, columns.score),
            concept=_name(values, "concept", columns.concept),
            style=_name(values, "style", columns.style),
            license=_name(values, "license", columns.license),
            split=_name(values, "split", columns.split) or split,
        )
    except _BadValueError as error:
        return RawRow(id=id_, image=None, text=None, source=source, problem=error.bad), None
    return row, uri


def _value(values: Mapping[str, Any], column: str | None) -> Any:
    value = values.get(column) if column else None
    if isinstance(value, Bad):
        raise _BadValueError(value.reason, f"{column}: {value.what}")
    return value


def _wrong(key: str, column: str | None, value: object, wanted: str) -> _BadValueError:
    return _BadValueError("bad_type", f"the {key} (column {column!r}) is {type(value).__name__}, expected {wanted}")


def _name(values: Mapping[str, Any], key: str, column: str | None) -> str:
    value = _value(values, column)
    if value is None or _is_nan(value):
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise _wrong(key, column, value, "text or an integer")


def _text(values: Mapping[str, Any], key: str, column: str | None) -> str | None:
    value = _value(values, column)
    if value is None or _is_nan(value):
        return None
    if not isinstance(value, str):
        raise _wrong(key, column, value, "text")
    return value


def _texts(values: Mapping[str, Any], key: str, column: str | None) -> list[str]:
    value = _value(values, column)
    if isinstance(value, str) and value.strip():  # a table of texts alone has no other way to write a list
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            raise _wrong(key, column, value, "a list of texts") from None
    if value is None or value == "" or _is_nan(value):
        return []
    if not isinstance(value, list):
        raise _wrong(key, column, value, "a list of texts")
    for item in value:
        if isinstance(item, Bad):
            raise _BadValueError(item.reason, f"{column}: {item.what}")
        if item is not None and not isinstance(item, str):
            raise _wrong(key, column, item, "text in the list")
    return [item for item in value if item]


def _score(values: Mapping[str, Any], column: str | None) -> float | None:
    value = _value(values, column)
    if isinstance(value, str):
        if not value.strip():
            return None
        try:
            value = float(value)
        except ValueError:
            raise _wrong("score", column, value, "a number") from None
    if value is None or _is_nan(value):
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 3.4e38:
        raise _wrong("score", column, value, "a finite number")
    return float(value)


def _image(value: Any, column: str | None) -> tuple[bytes | None, str | None]:
    if isinstance(value, Bad):
        raise _BadValueError(value.reason, f"{column}: {value.what}")
    if isinstance(value, dict):  # as `datasets` writes it: either may be missing
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if value is None or value == "" or _is_nan(value):
        return None, None
    if isinstance(value, bytes):
        return value, None
    if isinstance(value, str):
        return None, value
    raise _wrong("image", column, value, "bytes or a URI")


def _is_nan(value: object) -> bool:
    # A missing value, as pandas writes it.
    return isinstance(value, float) and math.isnan(value)


def check_columns(columns: Columns, names: Sequence[str], file: str, *, optional: bool = False) -> None:
    """Raises SourceError naming the config key whose column is not among `names`.

    `optional`: columns that a row may lack (JSON leaves out what is null) are not asked for.
    """
    needed = ("id", "image", "text", "query") if columns.text else ("id", "image", "texts", "query")
    for key, column in columns.mapped.items():
        if column not in names and not (optional and key not in needed):
            there = ", ".join(map(str, list(names)[:40]))
            raise SourceError(
                f"{file} has no column {column!r}",
                where=f"corpus.source.columns.{key}",
                fix=f"columns there: {there}; set the key to another, or to null where there is none",
            )


def check_schema(columns: Columns, schema: pa.Schema, file: str, image_root: str | None) -> None:
    """Raises SourceError naming the config key whose column is missing or of the wrong type."""
    check_columns(columns, schema.names, file)
    for key, column in columns.mapped.items():
        kind = schema.field(column).type
        where = f"corpus.source.columns.{key}"
        if key == "image" and (_is_text(kind) or (_has(kind, "path", _is_text) and not _is_image(kind))):
            check_root(image_root, f"column {column!r} of {file} holds URIs")
            continue
        wanted, accepts = _ACCEPTED[key]
        if not (accepts(kind) or pa.types.is_null(kind)):
            raise SourceError(f"column {column!r} of {file} is {kind}, expected {wanted}", where=where)


def check_root(image_root: str | None, what: str) -> None:
    """Raises SourceError if images come by URI and nobody has said where they may lie."""
    if image_root is None:
        raise SourceError(
            f"{what}, and no image_root is set",
            where="corpus.source.image_root",
            fix="set it to the folder or s3:// prefix below which the images lie",
        )


def _has(kind: pa.DataType, field: str, accepts: Any) -> bool:
    return pa.types.is_struct(kind) and kind.get_field_index(field) >= 0 and bool(accepts(kind.field(field).type))


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _is_image(kind: pa.DataType) -> bool:
    return _is_binary(kind) or _has(kind, "bytes", _is_binary)


def _is_texts(kind: pa.DataType) -> bool:
    of_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return bool(of_list and (_is_text(kind.value_type) or pa.types.is_null(kind.value_type)))


def _is_name(kind: pa.DataType) -> bool:
    return _is_text(kind) or bool(pa.types.is_integer(kind))


_NAMED = ("text or integer", _is_name)
_ACCEPTED: dict[str, tuple[str, Any]] = {
    **dict.fromkeys(("id", *_NAMES), _NAMED),
    "image": ("binary, a struct with `bytes`, or text", _is_image),
    **dict.fromkeys(("text", "query"), ("text", _is_text)),
    **dict.fromkeys(("texts", "negatives"), ("a list of texts", _is_texts)),
    "score": ("a number", lambda kind: pa.types.is_integer(kind) or pa.types.is_floating(kind)),
}
