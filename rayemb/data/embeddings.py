"""The embeddings artefact: a Lance table of `id`, `vector`, payload, under the digest of the model that made it."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayemb import storage
from rayemb.data.config import EmbedWhat
from rayemb.errors import RayembError

MODEL_KEY, DIM_KEY, WHAT_KEY = "rayemb.model_digest", "rayemb.dim", "rayemb.what"
SET_ASIDE_KEY = "rayemb.set_aside"
ID, VECTOR, IMAGE = "id", "vector", "image"


class EmbeddingsError(RayembError):
    """An embeddings table that is missing, or that rayemb did not write."""


class NoTableError(EmbeddingsError):
    """There is no such embeddings table."""


def embeddings_schema(payload: Sequence[pa.Field], dim: int, model_digest: str, *, images: bool) -> pa.Schema:
    """The schema of an embeddings table: id, vector `(dim,)` float32, the image bytes if kept, payload columns."""
    fields = [pa.field(ID, pa.string(), nullable=False), pa.field(VECTOR, pa.list_(pa.float32(), dim), nullable=False)]
    if images:
        fields.append(pa.field(IMAGE, pa.binary()))
    metadata = {MODEL_KEY: model_digest, DIM_KEY: str(dim)}
    return pa.schema([*fields, *payload], metadata=metadata)


@dataclass(frozen=True)
class EmbeddingsTable:
    """One version of an embeddings table. Row *offsets* `0 .. rows-1` are stable within a version."""

    uri: str
    version: int
    model_digest: str
    dim: int
    rows: int
    dataset: Any = field(repr=False)

    @classmethod
    def open(cls, uri: str, version: int | None = None) -> "EmbeddingsTable":
        """The table at `uri`, at `version` or at its newest. Raises NoTableError if there is none, EmbeddingsError
        if it cannot be read or names no model.
        """
        import lance  # a third of a second, with pandas: not for processes that read no table

        uri = storage.normalise(uri)
        try:
            dataset = lance.dataset(uri, version=version, storage_options=storage.lance_options(uri))
        except (ValueError, OSError) as error:
            if "not found" not in str(error).lower():
                reason = " ".join(str(error).split())[:200]
                raise EmbeddingsError(f"the embeddings table cannot be opened ({reason})", where=uri) from error
            what = "no such embeddings table" if version is None else f"no version {version} of this embeddings table"
            raise NoTableError(what, where=uri, fix="run `rayemb embed` first") from error
        metadata = _metadata(dataset)
        if MODEL_KEY not in metadata or DIM_KEY not in metadata:
            raise EmbeddingsError("the table does not name its model", where=uri, fix="write it with `rayemb embed`")
        return cls(uri, dataset.version, metadata[MODEL_KEY], int(metadata[DIM_KEY]), dataset.count_rows(), dataset)

    @property
    def metadata(self) -> dict[str, str]:
        """What the table says of itself: its model, what was embedded of which corpus."""
        return _metadata(self.dataset)

    @property
    def what(self) -> EmbedWhat:
        """What of each row is embedded: its image, text or query."""
        return cast(EmbedWhat, self.metadata.get(WHAT_KEY, IMAGE))

    @property
    def set_aside(self) -> dict[str, int]:
        """Rows of the corpus that the table lacks, by reason: they could not be read, decoded or encoded."""
        counts: dict[str, int] = json.loads(self.metadata.get(SET_ASIDE_KEY, "{}"))
        return counts

    @property
    def payload_columns(self) -> list[str]:
        """The columns that can be shown and filtered by: all but id, vector and image."""
        return [name for name in self.dataset.schema.names if name not in (ID, VECTOR, IMAGE)]

    @property
    def has_images(self) -> bool:
        """Whether the table keeps the encoded images."""
        return IMAGE in self.dataset.schema.names

    def vectors(self, start: int, stop: int) -> NDArray[np.float32]:
        """Vectors `(stop - start, dim)` float32 of rows `start .. stop-1`."""
        column = self.columns(start, stop, [VECTOR]).column(VECTOR).combine_chunks()
        vectors: NDArray[np.float32] = column.flatten().to_numpy().reshape(-1, self.dim)
        return vectors

    def columns(self, start: int, stop: int, names: Sequence[str]) -> pa.Table:
        """The named columns of rows `start .. stop-1`; reads that range only."""
        return self.dataset.to_table(columns=list(names), offset=start, limit=stop - start)

    def take(self, offsets: Sequence[int], names: Sequence[str]) -> list[dict[str, Any]]:
        """Rows at `offsets`, in that order, repeats included, as dictionaries. Batch the offsets: ~0.1 s a call."""
        if not len(offsets):
            return []
        rows: list[dict[str, Any]] = self.dataset.take(list(offsets), columns=list(names)).to_pylist()
        return rows


def _metadata(dataset: Any) -> dict[str, str]:
    return {key.decode(): value.decode() for key, value in (dataset.schema.metadata or {}).items()}
