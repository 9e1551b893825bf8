"""A folder of images with captions: from a table beside them, or from their file names."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.json
from pydantic import Field

from rayemb import storage
from rayemb.data.sources.base import RawRow, Source, SourceError
from rayemb.data.sources.images import IMAGE_SUFFIXES, with_images


class FolderSource(Source):
    """Images below a folder. Captions: the columns `file` and `text` of a CSV or JSONL, else the file names."""

    name: Literal["folder"] = "folder"
    uri: str = Field(description="the folder; images are found below it at any depth")
    captions: str | None = Field(None, description="CSV or JSONL with a row per image; default: the file names")
    file_column: str = Field("file", description="column with the image's path, relative to the folder")
    text_column: str = Field("text", description="column with the caption")
    rows_per_unit: int = Field(1024, ge=1, description="images per shard")

    def units(self, seed: int) -> list[Any]:
        """Lists of `(relative path, caption)`, shuffled by `seed`."""
        if not storage.exists(self.uri):
            raise SourceError("there is no such folder", where=f"corpus.source.uri={self.uri}")
        pairs = self._from_table() if self.captions else self._from_names()
        if not pairs:
            raise SourceError(
                "there are no images below this folder",
                where=f"corpus.source.uri={self.uri}",
                fix=f"images end in {', '.join(IMAGE_SUFFIXES)}",
            )
        order = np.random.default_rng(seed).permutation(len(pairs))
        pairs = [pairs[i] for i in order]
        return [pairs[i : i + self.rows_per_unit] for i in range(0, len(pairs), self.rows_per_unit)]

    def read(self, unit: Any) -> Iterator[RawRow]:
        """The pairs of one unit; an image that is not there is a problem of its row."""
        rows = ((RawRow(id=path, image=None, text=caption, source=path), path or None) for path, caption in unit)
        # Who lays links into his own folder means what they lead to.
        return with_images(rows, self.uri, links=True)

    def _from_names(self) -> list[tuple[str, str | None]]:
        root = storage.normalise(self.uri)
        files = [file for file in storage.list_files(self.uri) if file.lower().endswith(IMAGE_SUFFIXES)]
        return [(file.removeprefix(root).lstrip("/"), _caption(file)) for file in files]

    def _from_table(self) -> list[tuple[str, str | None]]:
        columns = [self.file_column, self.text_column]
        table = read_table(str(self.captions), where="corpus.source.captions", text_columns=columns)
        for key, column in (("file_column", self.file_column), ("text_column", self.text_column)):
            if column not in table.column_names:
                raise SourceError(
                    f"the captions have no column {column!r}",
                    where=f"corpus.source.{key}",
                    fix=f"columns there: {', '.join(table.column_names)}",
                )
        files = table.column(self.file_column).to_pylist()
        texts = table.column(self.text_column).to_pylist()
        # A row without a file has the empty id, which the builder sets aside.
        return [
            ("" if file is None else str(file), None if text is None else str(text))
            for file, text in zip(files, texts, strict=True)
        ]


def read_table(uri: str, *, where: str, text_columns: Sequence[str] = ()) -> pa.Table:
    """A CSV or JSON-lines file as a table; a CSV's `text_columns` are taken as they are ("007" is no number).

    Raises SourceError naming `where` if it cannot be read.
    """
    fs, path = storage.filesystem(uri)
    try:
        with fs.open_input_stream(path) as stream:
            if re.search(r"\.(jsonl|json|ndjson)(\.\w+)?$", path):
                return pa.json.read_json(stream)
            return pa.csv.read_csv(
                stream,
                parse_options=pa.csv.ParseOptions(newlines_in_values=True),
                convert_options=pa.csv.ConvertOptions(column_types=dict.fromkeys(text_columns, pa.string())),
            )
    except (OSError, pa.ArrowInvalid) as error:
        raise SourceError(f"cannot read it ({' '.join(str(error).split())[:200]})", where=f"{where}={uri}") from error


def _caption(file: str) -> str:
    stem = file.rsplit("/", 1)[-1].rsplit(".", 1)[0]
    return re.sub(r"[\s_\-.]+", " ", stem).strip()
