"""Parquet files of somebody else's making, under a column mapping."""

from collections.abc import Iterator
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from rayemb import storage
from rayemb.config import Config
from rayemb.data.sources.base import RawRow, Source, SourceError


class Columns(Config):
    """Which of the source's columns means what."""

    id: str = "id"
    image: str = Field("image", description="encoded image: binary, or a struct with a binary field `bytes`")
    text: str = "text"
    concept: str | None = Field(None, description="label: pairs of one label are positives of each other")
    style: str | None = None
    license: str | None = None
    split: str | None = None


class ParquetSource(Source):
    """Parquet files in a folder (or one file). A unit is a row group."""

    name: Literal["parquet"] = "parquet"
    uri: str = Field(description="a Parquet file, or a folder of them")
    columns: Columns = Columns()

    def units(self, seed: int) -> list[Any]:
        """`(file, row group)` pairs, after the schema of every file was checked."""
        fs, _ = storage.filesystem(self.uri)
        files = self._files()
        if not files:
            raise SourceError("there are no Parquet files", where=f"corpus.source.uri={self.uri}")
        units = []
        for file in files:
            try:
                parquet = pq.ParquetFile(storage.filesystem(file)[1], filesystem=fs)
            except (OSError, pa.ArrowInvalid) as error:
                raise SourceError(f"not a readable Parquet file ({error})", where=file) from error
            self._check(parquet.schema_arrow, file)
            units += [(file, group) for group in range(parquet.num_row_groups)]
        return units

    def read(self, unit: Any) -> Iterator[RawRow]:
        """The rows of one row group."""
        file, group = unit
        fs, path = storage.filesystem(file)
        parquet = pq.ParquetFile(path, filesystem=fs, page_checksum_verification=True)
        names = [name for name in self.columns.model_dump().values() if name]
        first = sum(parquet.metadata.row_group(g).num_rows for g in range(group))
        try:
            rows = parquet.read_row_group(group, columns=names).to_pylist()
        except (OSError, pa.ArrowInvalid) as error:
            raise SourceError(f"row group {group} is corrupt ({error})", where=file) from error
        for offset, row in enumerate(rows):
            image = row[self.columns.image]
            concept, style, license_, split = (
                "" if column is None or row[column] is None else str(row[column])
                for column in (self.columns.concept, self.columns.style, self.columns.license, self.columns.split)
            )
            yield RawRow(
                id="" if row[self.columns.id] is None else str(row[self.columns.id]),
                image=image["bytes"] if isinstance(image, dict) else image,
                text=row[self.columns.text],
                source=f"{file} row {first + offset}",
                concept=concept,
                style=style,
                license=license_,
                split=split,
            )

    def _files(self) -> list[str]:
        root = storage.normalise(self.uri)
        fs, path = storage.filesystem(root)
        if fs.get_file_info(path).is_file:
            return [root]
        # As all readers of Parquet folders do: names with a leading underscore or dot are not data.
        files = [(file, file.removeprefix(root).split("/")) for file in storage.list_files(root, ".parquet")]
        return [file for file, parts in files if not any(part.startswith(("_", ".")) for part in parts)]

    def _check(self, schema: pa.Schema, file: str) -> None:
        for key, column in self.columns.model_dump().items():
            if column is None:
                continue
            where = f"corpus.source.columns.{key}"
            if column not in schema.names:
                raise SourceError(
                    f"{file} has no column {column!r}", where=where, fix=f"columns there: {', '.join(schema.names)}"
                )
            kind = schema.field(column).type
            if key == "image" and pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
                kind = kind.field("bytes").type
            wanted, ok = ("binary", _is_binary(kind)) if key == "image" else ("text or integer", _is_name(kind))
            if key == "text":
                wanted, ok = "text", _is_text(kind)
            if not ok:
                raise SourceError(f"column {column!r} of {file} is {kind}, expected {wanted}", where=where)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_name(kind: pa.DataType) -> bool:
    return _is_text(kind) or bool(pa.types.is_integer(kind))
