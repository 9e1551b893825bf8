"""Texts or pictures with a label each: from a file, or from a split of a corpus."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field, model_validator

from rayemb.config import Config
from rayemb.data import Corpus
from rayemb.data.corpus import read_row_group
from rayemb.evaluate.encoders import Encoder, Side
from rayemb.evaluate.errors import EvaluateError
from rayemb.evaluate.tasks.records import read
from rayemb.evaluate.tasks.vectors import image_vectors, numbered, text_vectors

L = TypeVar("L", bound="Labelled")


class LabelledData(Config):
    """Where they are."""

    file: str | None = Field(None, description="text or image, and label; a .parquet where there are images")
    columns: dict[str, str] = Field({}, description="what the file calls text, image and label")
    corpus: str | None = Field(None, description="a corpus of rayemb instead of a file")
    split: str = Field("zero_shot", description="of the corpus")
    label: Literal["concept", "style", "license"] = Field("concept", description="of the corpus: what is the label")
    input: Literal["text", "image"] = Field("text", description="what is encoded")
    max_rows: int = Field(
        5000, ge=2, description="rows that are used: of a larger split the first, of a file by seed 0"
    )

    @model_validator(mode="after")
    def _one_place(self) -> "LabelledData":
        if (self.file is None) == (self.corpus is None):
            raise ValueError("give file or corpus")
        return self

    def load(self, where: str) -> "Labelled":
        """The items. Raises EvaluateError naming file and row, and where all labels are one."""
        found = self._of_file() if self.file is not None else self._of_corpus(str(self.corpus))
        if len(set(found.labels)) < 2:
            raise EvaluateError(f"all {len(found):,} labels are {found.labels[0]!r}", where=f"{where}: {found.uri}")
        return found

    def _of_file(self) -> "Labelled":
        rows = read(str(self.file), (self.input, "label"), columns=self.columns)
        inputs: list[Any] = rows.texts("text") if self.input == "text" else rows.columns["image"]
        for row, value in enumerate(inputs if self.input == "image" else ()):
            if not isinstance(value, bytes) or not value:
                raise EvaluateError("image is not the bytes of a picture", where=rows.where(row))
        labels, names = rows.names("label"), [rows.where(row) for row in range(len(rows))]
        found = Labelled(rows.uri, rows.digest, self.input, inputs, labels, names)
        chosen = np.sort(np.random.default_rng(0).permutation(len(rows))[: self.max_rows])
        return found if len(chosen) == len(rows) else found.take(chosen)

    def _of_corpus(self, uri: str) -> "Labelled":
        corpus = Corpus.open(uri)
        rows = first_rows(corpus, self.split, ["id", self.input, self.label], self.max_rows)
        kept = [row for row in rows if row[self.input] and row[self.label]]
        if not kept:
            raise EvaluateError(f"no row of {self.split} has {self.input} and {self.label}", where=corpus.uri)
        return Labelled(
            f"{corpus.uri} ({self.split})",
            corpus.digest,
            self.input,
            [row[self.input] for row in kept],
            [row[self.label] for row in kept],
            [f"row {row['id']}" for row in kept],
        )


@dataclass(frozen=True)
class Labelled:
    """Inputs and their labels, N of each."""

    uri: str
    digest: str
    input: Literal["text", "image"]
    inputs: list[Any]
    labels: list[str]
    names: list[str]  # what messages call them

    def __len__(self) -> int:
        return len(self.inputs)

    def take(self, rows: Sequence[int] | NDArray[np.int64]) -> "Labelled":
        """Those rows alone."""
        inputs, labels, names = ([part[row] for row in rows] for part in (self.inputs, self.labels, self.names))
        return Labelled(self.uri, self.digest, self.input, inputs, labels, names)

    def vectors(self, encoder: Encoder, where: str, side: Side = "text") -> NDArray[np.float32]:
        """`(N, D)`."""
        if self.input == "image":
            return image_vectors(encoder, self.inputs, where, self.names)
        return text_vectors(encoder, self.inputs, where, kind=side, names=self.names)

    @property
    def numbers(self) -> tuple[list[str], NDArray[np.int64]]:
        """The names of the classes, and each item's class `(N,)`."""
        return numbered(self.labels)

    @property
    def look(self) -> dict[str, list[Any]]:
        """What the map shows of each item."""
        return (
            {"images": self.inputs, "labels": self.labels}
            if self.input == "image"
            else {
                "texts": self.inputs,
                "labels": self.labels,
            }
        )


def first_rows(corpus: Corpus, split: str, columns: Sequence[str], rows: int) -> list[dict[str, Any]]:
    """The first rows of a split: whole row groups until there are so many, and no more than that."""
    parts: list[pa.Table] = []
    total = 0
    for group in corpus.row_groups(split):
        if total >= rows:
            break
        parts.append(read_row_group(group, list(columns)))
        total += group.rows
    found: list[dict[str, Any]] = pa.concat_tables(parts)[:rows].to_pylist() if parts else []
    return found
