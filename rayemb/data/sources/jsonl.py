"""Files with one JSON object a line."""

import io
import json
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from rayemb import storage
from rayemb.data.sources.base import SourceError
from rayemb.data.sources.columns import Bad, check_columns, check_root, to_row
from rayemb.data.sources.files import PACKED, FileSource, Piece, Record, open_stream, peek, reading
from rayemb.data.sources.images import MAX_BYTES

_PLAIN = (".jsonl", ".ndjson", ".json")
PEEK, MISTAKE = 20, 3
"""Rows that are looked at before any work. A column that none of them has, or that is of another type in all of at
least `MISTAKE`, is a mistake in the mapping; else it is rows that are bad."""


class JsonlSource(FileSource):
    """JSON lines, plain or packed (.gz, .zst, .bz2). A unit is a file; of a long plain file, `unit_mb` of it.

    A row without an id column is named by its file and the byte at which its line begins (of the unpacked file): that
    is known wherever reading starts.
    """

    name: Literal["jsonl"] = "jsonl"
    unit_mb: float = Field(64, gt=0, description="MiB of a plain file that one task reads")
    suffixes: ClassVar[tuple[str, ...]] = tuple(f"{plain}{packed}" for plain in _PLAIN for packed in PACKED)

    def _plan(self, file: str) -> list[Piece]:
        if self.columns.image:
            check_root(self.image_root, "a JSON line holds the URI of its image")
        check_rows(self, peek(self._records(Piece(file)), PEEK), file)
        if not file.lower().endswith(_PLAIN):
            return [Piece(file)]
        fs, path = storage.filesystem(file)
        with reading(file):
            size = fs.get_file_info(path).size or 0
        step = max(1, int(self.unit_mb * 2**20))
        return [Piece(file, start=at, stop=min(at + step, size)) for at in range(0, size, step)]

    def _records(self, piece: Piece) -> Iterator[Record]:
        """The lines that begin in [start, stop)."""
        with reading(piece.file), open_stream(piece.file, max(0, piece.start - 1)) as stream:
            at, number = piece.start, 0
            if piece.start:  # the rest of the line that the piece before has read, and at least the end of it
                at += _skip_line(stream, b"") - 1
            while piece.stop is None or at < piece.stop:
                line = stream.readline(MAX_BYTES)
                if not line:
                    return
                begin, number = at, number + 1
                at += len(line)
                if not line.endswith(b"\n") and len(line) == MAX_BYTES:
                    at += _skip_line(stream, line)
                    values: Any = Bad("bad_json", f"the line has over {MAX_BYTES:,} bytes")
                elif begin == 0:
                    values = _parse(line.removeprefix(b"\xef\xbb\xbf"))
                else:
                    values = _parse(line)
                if values is not None:
                    where = f"line {number}" if not piece.start else f"byte {begin}"
                    yield Record(values, where, str(begin))


def check_rows(source: FileSource, rows: list[Mapping[str, Any]], file: str) -> None:
    """Raises SourceError if the first rows of a file all lack a column that every row needs, or have another type."""
    if not rows:
        return
    check_columns(source.columns, list(dict.fromkeys(name for row in rows for name in row)), file, optional=True)
    for key, column in source.columns.mapped.items():
        present = [row for row in rows if row.get(column) is not None]
        problems = [to_row({column: row[column]}, _only(source, key), source="", key="")[0].problem for row in present]
        wrong = [problem for problem in problems if problem and problem[0] == "bad_type"]
        if len(present) == len(wrong) >= MISTAKE:
            raise SourceError(f"{file}: {wrong[0][1]}", where=f"corpus.source.columns.{key}")


def _only(source: FileSource, key: str) -> Any:
    """The mapping with no other key than `key` (and an id that is never missing)."""
    nothing = dict.fromkeys(type(source.columns).model_fields)
    return type(source.columns).model_construct(**{**nothing, key: getattr(source.columns, key)})


def parse_object(data: bytes) -> dict[str, Any] | Bad:
    """A JSON object; a Bad for anything else. NaN and Infinity are null: Python and pandas write missing values so."""
    try:
        values = json.loads(data.decode(), parse_constant=lambda _: None)
    except UnicodeDecodeError as error:
        return Bad("bad_utf8", f"not valid UTF-8 ({error.reason} at byte {error.start})")
    except (ValueError, RecursionError) as error:  # RecursionError: brackets that are nested without end
        return Bad("bad_json", f"not JSON ({' '.join(str(error).split())[:200]})")
    if not isinstance(values, dict):
        return Bad("bad_json", f"a JSON {type(values).__name__}, expected an object")
    return values


def _parse(line: bytes) -> dict[str, Any] | Bad | None:
    return parse_object(line) if line.strip() else None


def _skip_line(stream: io.BufferedReader, line: bytes) -> int:
    """Reads to the end of the line; gives the number of bytes."""
    skipped = 0
    while not line.endswith(b"\n") and (line := stream.readline(1 << 20)):
        skipped += len(line)
    return skipped
