"""Tables of local data: JSON lines, Parquet, CSV and TSV, with every complaint naming the file and the row."""

import csv
import hashlib
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rayemb import storage
from rayemb.evaluate.errors import EvaluateError

FORMATS = (".jsonl", ".parquet", ".csv", ".tsv")


@dataclass(frozen=True)
class Records:
    """The columns of a file under the names that a task has for them."""

    uri: str
    columns: Mapping[str, list[Any]]
    places: Sequence[int]  # the line of a text file, the row of a table; both count from 1
    digest: str  # SHA-256 (hex) of the file

    def __len__(self) -> int:
        return len(self.places)

    def where(self, row: int) -> str:
        """What a message calls it."""
        word = "row" if self.uri.endswith(".parquet") else "line"
        return f"{self.uri}, {word} {self.places[row]}"

    def has(self, name: str) -> bool:
        """Whether the file has the column."""
        return name in self.columns

    def texts(self, name: str) -> list[str]:
        """A column of texts. Raises EvaluateError for one that is empty or no text."""
        for row, value in enumerate(self.columns[name]):
            if not isinstance(value, str):
                raise EvaluateError(f"{name} is no text but {_kind(value)}", where=self.where(row))
            if not value.strip():
                raise EvaluateError(f"{name} is empty", where=self.where(row), fix="leave the row out")
        return self.columns[name]

    def ids(self, name: str) -> list[str]:
        """A column of ids, as texts. Raises EvaluateError for one that is missing or stands twice."""
        found = self.names(name)
        first: dict[str, int] = {}
        for row, value in enumerate(found):
            if value in first:
                raise EvaluateError(
                    f"{name} {value!r} stands twice", where=self.where(row), fix=f"first in {self.where(first[value])}"
                )
            first[value] = row
        return found

    def names(self, name: str) -> list[str]:
        """A column of ids or labels that may repeat, as texts. Raises EvaluateError for one that is missing."""
        found = []
        for row, value in enumerate(self.columns[name]):
            if (
                value is None
                or isinstance(value, list | dict)
                or (isinstance(value, float) and not math.isfinite(value))
            ):
                raise EvaluateError(f"{name} is {_kind(value)}", where=self.where(row))
            text = str(value)
            if not text.strip():
                raise EvaluateError(f"{name} is empty", where=self.where(row))
            found.append(text)
        return found

    def numbers(self, name: str) -> NDArray[np.float64]:
        """A column of numbers. Raises EvaluateError for one that is none, or not finite."""
        found = np.empty(len(self))
        for row, value in enumerate(self.columns[name]):
            try:
                found[row] = float(value)
            except (TypeError, ValueError) as error:
                raise EvaluateError(f"{name} {value!r} is no number", where=self.where(row)) from error
            if not math.isfinite(found[row]):
                raise EvaluateError(f"{name} is {value}, not a finite number", where=self.where(row))
        return found

    def integers(self, name: str) -> NDArray[np.int64]:
        """A column of whole numbers. Raises EvaluateError for one that is none."""
        found = self.numbers(name)
        wrong = np.flatnonzero(found != np.round(found))
        if len(wrong):
            raise EvaluateError(f"{name} {found[wrong[0]]} is no whole number", where=self.where(int(wrong[0])))
        return found.astype(np.int64)

    def lists(self, name: str) -> list[list[str]]:
        """A column of lists of texts. Raises EvaluateError for one that is none, or holds an empty text."""
        for row, value in enumerate(self.columns[name]):
            if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
                raise EvaluateError(f"{name} is no list of texts", where=self.where(row))
            if any(not text.strip() for text in value):
                raise EvaluateError(f"{name} holds an empty text", where=self.where(row))
        return self.columns[name]


def read(
    uri: str,
    needed: Iterable[str],
    optional: Iterable[str] = (),
    columns: Mapping[str, str | Sequence[str]] | None = None,
) -> Records:
    """The columns of a file; `columns`: what the file calls them, or may call them, where not by their names.

    Raises EvaluateError for a file that is missing, unreadable, empty, or lacks a column; StorageError where the
    store does not answer.
    """
    uri = storage.normalise(uri)
    if not uri.endswith(FORMATS):
        raise EvaluateError("a file of data is one of " + ", ".join(FORMATS), where=uri)
    try:
        data = storage.read_bytes(uri)
    except storage.MissingError as error:
        raise EvaluateError("there is no such file", where=uri) from error
    rows, places = _parse(uri, data)
    if not places:
        raise EvaluateError("holds no rows", where=uri)
    found: dict[str, list[Any]] = {}
    for name in [*needed, *optional]:
        theirs = (columns or {}).get(name, name)
        options = [theirs] if isinstance(theirs, str) else list(theirs)
        known = next((option for option in options if option in rows), None)
        if known is not None:
            found[name] = rows[known]
        elif name not in set(optional):
            raise EvaluateError(
                f"there is no column {' or '.join(map(repr, options))}",
                where=uri,
                fix=f"columns there: {', '.join(rows)}; map them under `columns`",
            )
    return Records(uri, found, places, hashlib.sha256(data).hexdigest())


def joined_digest(*parts: str) -> str:
    """One digest of several."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _parse(uri: str, data: bytes) -> tuple[dict[str, list[Any]], list[int]]:
    if uri.endswith(".parquet"):
        try:
            table = pq.read_table(io.BytesIO(data), page_checksum_verification=True)
        except (OSError, pa.ArrowInvalid) as error:
            raise EvaluateError(f"not a readable Parquet file ({error})", where=uri) from error
        return table.to_pydict(), list(range(1, len(table) + 1))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise EvaluateError(f"not UTF-8 ({error.reason} at byte {error.start})", where=uri) from error
    return _jsonl(uri, text) if uri.endswith(".jsonl") else _delimited(uri, text)


def _jsonl(uri: str, text: str) -> tuple[dict[str, list[Any]], list[int]]:
    rows, places = [], []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise EvaluateError(f"no JSON ({error})", where=f"{uri}, line {number}") from error
        if not isinstance(row, dict):
            raise EvaluateError("no JSON object", where=f"{uri}, line {number}")
        rows.append(row)
        places.append(number)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return {name: [row.get(name) for row in rows] for name in names}, places


def _delimited(uri: str, text: str) -> tuple[dict[str, list[Any]], list[int]]:
    # Quotes mean nothing in a TSV of BEIR: a text may hold one.
    reader = (
        csv.reader(io.StringIO(text), delimiter="\t", quoting=csv.QUOTE_NONE)
        if uri.endswith(".tsv")
        else csv.reader(io.StringIO(text))
    )
    names = next(reader, [])
    rows, places = [], []
    for row in reader:
        if not row:
            continue
        if len(row) != len(names):
            raise EvaluateError(
                f"has {len(row)} columns, the first line {len(names)}", where=f"{uri}, line {reader.line_num}"
            )
        rows.append(row)
        places.append(reader.line_num)
    return {name: [row[at] for row in rows] for at, name in enumerate(names)}, places


def _kind(value: Any) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"
