"""Comma- and tab-separated files."""

import csv
import io
from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from rayemb.data.sources.base import SourceError
from rayemb.data.sources.columns import Bad, check_columns, check_root
from rayemb.data.sources.files import PACKED, DamageError, FileSource, Piece, Record, open_stream, reading

MAX_LINE = 1 << 24


class CsvSource(FileSource):
    """CSV with a header, plain or packed (.gz, .zst, .bz2); a unit is a file. All values are text, empty ones missing.

    Quotes as in RFC 4180: a quoted value may hold commas, newlines and doubled quotes. A byte order mark is dropped.
    """

    name: Literal["csv"] = "csv"
    delimiter: str | None = Field(
        None, min_length=1, max_length=1, description="between values; default: a tab in .tsv files, else a comma"
    )
    suffixes: ClassVar[tuple[str, ...]] = tuple(f"{plain}{packed}" for plain in (".csv", ".tsv") for packed in PACKED)

    def _plan(self, file: str) -> list[Piece]:
        if self.columns.image:
            check_root(self.image_root, "a CSV holds the URI of an image")
        with reading(file), open_stream(file) as stream:
            header = next(self._rows(stream, file), None)
        if header is None:
            raise DamageError("the file is empty: it has no header")
        if isinstance(header, Bad):
            raise DamageError(header.what)
        check_columns(self.columns, header, file)
        twice = [name for name in self.columns.names if header.count(name) > 1]
        if twice:
            raise SourceError(f"{file} has the column {twice[0]!r} twice", where="corpus.source.columns")
        return [Piece(file)]

    def _records(self, piece: Piece) -> Iterator[Record]:
        with reading(piece.file), open_stream(piece.file) as stream:
            rows = self._rows(stream, piece.file)
            header = next(rows)
            assert not isinstance(header, Bad)  # planning has read it
            for number, row in enumerate(rows):
                values: dict[str, str | Bad | None] | Bad
                if isinstance(row, Bad):
                    values = row
                elif len(row) != len(header):
                    values = Bad("bad_csv", f"the row has {len(row)} values, the header {len(header)}")
                else:
                    values = {name: _value(text) for name, text in zip(header, row, strict=True)}
                yield Record(values, f"row {number}", str(number))

    def _rows(self, stream: io.BufferedReader, file: str) -> Iterator[list[str] | Bad]:
        text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
        tabs = file.lower().rsplit("/", 1)[-1].partition(".tsv")[1]
        rows = csv.reader(_lines(text), delimiter=self.delimiter or ("\t" if tabs else ","))
        while True:
            try:
                row = next(rows, None)
            except csv.Error as error:  # a value beyond 128 KiB: mostly a quote that is never closed
                yield Bad("bad_csv", f"{error} (a quote that is not closed?)")
                continue
            if row is None:
                return
            if row:  # not a blank line
                yield row


def _lines(text: io.TextIOWrapper) -> Iterator[str]:
    while line := text.readline(MAX_LINE):
        if len(line) == MAX_LINE and not line.endswith("\n"):
            raise DamageError(f"a line has over {MAX_LINE:,} characters")
        yield line


def _value(text: str) -> str | Bad | None:
    if not text:
        return None
    # What is not UTF-8 was read as lone surrogates.
    return text if text.isascii() or not any("\udc80" <= c <= "\udcff" for c in text) else Bad("bad_utf8", "not UTF-8")
