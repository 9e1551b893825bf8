"""The map of an index: a sample of its rows as points in the plane, beside the index, for people to look at."""

import posixpath
from datetime import UTC, datetime
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rayemb import storage
from rayemb.data.embeddings import ID, VECTOR
from rayemb.data.projection import KEPT_OF, layout_by
from rayemb.index.columns import kind_of
from rayemb.index.config import MapConfig
from rayemb.index.errors import IndexArtefactError
from rayemb.index.manifest import Manifest, load_manifest
from rayemb.index.shard import open_embeddings

_TEXT_CHARS = 80
_SHOWN = ("string", "integer", "number", "boolean", "timestamp")


class IndexMap(BaseModel):
    """Points of a sample of an index's rows, all lists in one order."""

    model_config = ConfigDict(frozen=True)

    format: Literal[1] = 1
    index_version: str = Field(description="version of the index that it is of", examples=["3f2a9c01d4e5"])
    created: str = Field(description="UTC, ISO 8601", examples=["2026-01-31T12:00:00+00:00"])
    method: Literal["umap", "pca"] = Field(description="how the vectors were projected", examples=["umap"])
    rows: int = Field(ge=1, description="rows of the index, of which these are a sample", examples=[100_000])
    neighbours_kept: float | None = Field(
        None,
        ge=0,
        le=1,
        description=f"share of a point's {KEPT_OF} nearest points on the map that are nearest by their vectors too",
        examples=[0.41],
    )
    ids: list[str] = Field(min_length=1, description="the items' ids", examples=[["cat", "dog"]])
    x: list[float] = Field(description="0 to 1, to the right", examples=[[0.12, 0.9]])
    y: list[float] = Field(description="0 to 1, upwards, of the same unit as x", examples=[[0.5, 0.48]])
    columns: dict[str, list[bool | int | float | str | None]] = Field(
        description=f"payload columns of plain values; texts up to {_TEXT_CHARS} characters",
        examples=[{"style": ["filled", None]}],
    )

    @model_validator(mode="after")
    def _same_rows(self) -> Self:
        if {len(self.x), len(self.y), *map(len, self.columns.values())} != {len(self.ids)}:
            raise ValueError("its lists differ in length")
        return self


def map_uri(index_uri: str, manifest: Manifest) -> str:
    """Where the map of that version of an index lies: in the folder of its files, and removed with them."""
    folder = posixpath.dirname(manifest.trained.file)
    return storage.join(index_uri, *([folder] if folder else []), f"map-{manifest.version}.json")


def build_map(index_uri: str, config: MapConfig | None = None) -> IndexMap:
    """Makes the map of the published index, in this process, and writes it beside the index in one atomic step.

    Of the rows that the index was built from: live updates are on it after a compaction, when it is made again. The
    same seed gives the same sample. Memory: the sample's vectors. The methods are those of `rayemb.data.projection`.

    Raises IndexArtefactError if there is no index, ProjectionError if `umap` is asked for and not installed.
    """
    config = config or MapConfig()
    # First: what is not installed need not be found out after the reading.
    lay_out = layout_by(config.method, neighbours=config.neighbours, seed=config.seed, where="index.map.method")
    manifest = load_manifest(index_uri)
    embeddings = open_embeddings(manifest)
    fields = embeddings.dataset.schema
    shown = [name for name in embeddings.payload_columns if kind_of(fields.field(name).type) in _SHOWN]
    count = manifest.embeddings.rows
    sample = np.random.default_rng(config.seed).choice(count, min(config.rows, count), replace=False)
    table = embeddings.dataset.take(np.sort(sample).tolist(), columns=[ID, VECTOR, *shown])
    x_ND = table.column(VECTOR).combine_chunks().flatten().to_numpy().reshape(-1, embeddings.dim)
    method, points, kept = lay_out(x_ND)
    made = IndexMap(
        index_version=manifest.version,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        method=method,
        rows=count,
        neighbours_kept=kept,
        ids=table.column(ID).to_pylist(),
        x=points[:, 0].round(5).tolist(),
        y=points[:, 1].round(5).tolist(),
        columns={name: _values(table.column(name).combine_chunks()) for name in shown},
    )
    storage.write_bytes(map_uri(index_uri, manifest), made.model_dump_json().encode())
    return made


def load_map(index_uri: str, manifest: Manifest) -> IndexMap | None:
    """The map of that version of the index; None if none was made.

    Raises IndexArtefactError if it is damaged or of another version, StorageError if the store fails.
    """
    uri = map_uri(index_uri, manifest)
    try:
        found = IndexMap.model_validate_json(storage.read_bytes(uri))
    except storage.MissingError:
        return None
    except ValidationError as error:
        told = error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")
        raise IndexArtefactError(f"it is no map ({told})", where=uri, fix="run `rayemb index map` again") from error
    if found.index_version != manifest.version:
        raise IndexArtefactError(
            f"it is of index version {found.index_version}, not {manifest.version}",
            where=uri,
            fix="run `rayemb index map` again",
        )
    return found


def _values(column: pa.Array) -> list[Any]:
    """A payload column as JSON has it."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    kind = kind_of(column.type)
    if kind == "string":
        return list(pc.utf8_slice_codeunits(column, 0, _TEXT_CHARS).to_pylist())
    if kind == "number":
        # As many digits as a float32 means; JSON has no NaN.
        return [None if each is None or not np.isfinite(each) else float(f"{each:.7g}") for each in column.to_pylist()]
    if kind == "timestamp":
        if pa.types.is_timestamp(column.type):
            column = column.cast(pa.timestamp("us", column.type.tz), safe=False)
        return [None if each is None else each.isoformat() for each in column.to_pylist()]
    return list(column.to_pylist())
