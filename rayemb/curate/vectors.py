"""Vectors for the steps that compare them: a model's, of both sides of a pair, or those of an embeddings table."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import lance
import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray
from pydantic import Field, model_validator
from ray.data import ActorPoolStrategy

from rayemb import storage
from rayemb.cluster import require_cpus
from rayemb.curate.base import CurationError, Rows, Step, shards_of
from rayemb.curate.draw import uniform_of
from rayemb.data import EmbeddingsTable
from rayemb.data.embeddings import ID, VECTOR
from rayemb.models import Model, decode_image, image_tensor, model_digest

Side = Literal["query", "text"]
QUERY_VECTOR, TEXT_VECTOR = "query_vector", "text_vector"
VECTORS: dict[Side, str] = {"query": QUERY_VECTOR, "text": TEXT_VECTOR}
_PIXELS = "pixels"
Floats = NDArray[np.float32]


class EncoderStep(Step):
    """Base of the steps that look at rows through a model."""

    model: str = Field(description="URI of the model directory whose vectors are compared")
    batch_size: int = Field(256, ge=1, description="rows per call of the encoder")
    workers: int = Field(2, ge=1, description="encoders at work at once")
    cpus_per_worker: float = Field(1.0, gt=0, description="CPUs that each encoder takes")
    gpus_per_worker: float = Field(0.0, ge=0, description="GPUs that each encoder takes")

    def inputs(self) -> dict[str, str]:
        """The model's digest. Raises ModelError if there is none."""
        return {"model": model_digest(self.model)} if self.model else {}

    def vectors(
        self,
        rows: Rows,
        sides: Sequence[Side] = ("query", "text"),
        *,
        keep: Sequence[str] = (),
        share: float = 1.0,
        encoder: tuple[type[PairEncoder], Sequence[Any]] | None = None,
    ) -> ray.data.Dataset:
        """Lazily: `row`, `keep` columns and a unit vector `(D,)` float32 per side, `query_vector`, `text_vector`.

        The query side is the image, or the query of a corpus of text pairs. `share` < 1: a sample that depends on the
        ordinals and the seed alone. `encoder`: a subclass that does more with a batch, and what it takes
        beyond `PairEncoder`'s arguments; a second pool of actors might wait for CPUs that the first one holds.

        On other batches a vector differs by float32's rounding, so that a cosine within
        about 2e-6 of a threshold may fall on either side of it. Raises CurationError, ModelError or ClusterError.
        """
        query = {"image_text": "image", "text_pair": "query"}.get(rows.corpus.kind)
        if "query" in sides and query is None:
            raise CurationError(
                f"{self.name} compares two sides, and a corpus of {rows.corpus.kind!r} has one", where=rows.corpus.uri
            )
        columns = {"query": query, "text": "text"}
        model = Model.load(self.model)
        size = model.network.config.image_size
        rows.facts["model"] = model.digest
        limits, seed = rows.corpus.image_limits, rows.seed
        kept = [name for name in keep if name != "row"]
        inputs: dict[str, str] = {VECTORS[side]: str(columns[side]) for side in sides}

        def prepare(table: pa.Table) -> pa.Table:
            if share < 1:
                table = table.filter(pa.array(uniform_of(np.asarray(table["row"]), seed) < share))
            given: dict[str, Any] = {name: table[name] for name in ("row", *kept)}
            for name, column in inputs.items():
                if column == "image":
                    given[name] = _packed(
                        [image_tensor(decode_image(d, limits), size) for d in table[column].to_pylist()]
                    )
                else:
                    given[name] = table[column]
            return pa.table(given)

        source = rows.dataset(list(dict.fromkeys([*kept, *inputs.values()])))
        prepared = source.map_batches(prepare, batch_format="pyarrow", batch_size=None, num_cpus=0.5)
        return self._encoded(prepared, {name: column == "image" for name, column in inputs.items()}, size, encoder)

    def text_vectors(self, texts: Sequence[str]) -> Floats:
        """Unit vectors `(N, D)` of texts that the driver holds, in their order."""
        if len(texts) <= self.batch_size:  # one call; a pool takes seconds to start
            return Model.load(self.model).embed_texts(list(texts))
        table = pa.table({"at": pa.array(np.arange(len(texts))), TEXT_VECTOR: pa.array(list(texts), pa.string())})
        blocks = max(1, -(-len(texts) // self.batch_size))
        encoded = self._encoded(ray.data.from_arrow(table).repartition(blocks), {TEXT_VECTOR: False}, 1)
        found = collected(encoded, ["at", TEXT_VECTOR])
        return matrix(found, TEXT_VECTOR)[np.argsort(np.asarray(found["at"]))]

    def _encoded(
        self,
        prepared: ray.data.Dataset,
        images: dict[str, bool],
        size: int,
        encoder: tuple[type[PairEncoder], Sequence[Any]] | None = None,
    ) -> ray.data.Dataset:
        require_cpus(self.workers * self.cpus_per_worker + 1, f"{self.name} (encoders and their data)")
        kind, more = encoder or (PairEncoder, ())
        return prepared.map_batches(
            kind,
            fn_constructor_args=(self.model, images, size, "cuda" if self.gpus_per_worker else "cpu", *more),
            batch_size=self.batch_size,
            batch_format="pyarrow",
            num_cpus=self.cpus_per_worker,
            num_gpus=self.gpus_per_worker or None,
            compute=ActorPoolStrategy(size=self.workers),
        )


class VectorStep(EncoderStep):
    """Base of the steps that look at one vector a row, a model's or an embeddings table's."""

    model: str = Field("", description="URI of the model directory whose vectors are compared (or give embeddings)")
    embeddings: str | None = Field(None, description="URI of an embeddings table of this corpus, in place of a model")
    side: Side = Field("query", description="whose vectors: the image (or query), or the text")

    @model_validator(mode="after")
    def _one_source(self) -> VectorStep:
        if bool(self.model) == bool(self.embeddings):
            raise ValueError("give model or embeddings, one of them")
        return self

    def inputs(self) -> dict[str, str]:
        """The model's digest, or the table's version. Raises EmbeddingsError or ModelError if there is none."""
        if not self.embeddings:
            return super().inputs()
        table = EmbeddingsTable.open(self.embeddings)
        return {"embeddings": f"{table.uri}@{table.version} of {table.model_digest}"}

    def one_side(self, rows: Rows, keep: Sequence[str] = ()) -> ray.data.Dataset:
        """Lazily: `row`, `keep` columns and `vector` `(D,)` float32."""
        if self.embeddings:
            return table_vectors(rows, self.embeddings, self.side, keep)
        name = VECTORS[self.side]
        return self.vectors(rows, [self.side], keep=keep).rename_columns({name: VECTOR})


class PairEncoder:
    """One encoder of the pool: pixels and texts in, vectors out, under the same column names."""

    def __init__(self, model: str, images: dict[str, bool], size: int, device: str) -> None:
        import torch

        torch.set_num_threads(1)
        self.model, self.images, self.shape = Model.load(model), images, (3, size, size)
        self.model.network.to(device)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Replaces every input column by its vectors."""
        for name, is_image in self.images.items():
            values = batch[name].to_pylist()
            if is_image:
                raw = np.frombuffer(b"".join(values), np.uint8).reshape(-1, *self.shape)
                vectors = self.model.embed_pixels(raw.copy())
            else:
                kind: Literal["query", "text"] = "query" if name == QUERY_VECTOR else "text"
                vectors = self.model.embed_texts(values, kind=kind)
            if not np.isfinite(vectors).all():
                raise CurationError("the model gives vectors that are not finite", fix="train it again")
            batch = batch.set_column(batch.schema.get_field_index(name), name, vector_column(vectors))
        return batch


def table_vectors(rows: Rows, uri: str, side: Side, keep: Sequence[str] = ()) -> ray.data.Dataset:
    """Lazily: `row`, `keep` columns and `vector` `(D,)` of the rows, from an embeddings table made from the corpus.

    The table holds the rows of its splits in the corpus's order; each id is compared. Raises CurationError if the
    table is of another corpus or of the other side, EmbeddingsError if there is none.
    """
    table = EmbeddingsTable.open(uri)
    if (table.what == "text") != (side == "text"):
        raise CurationError(
            f"the table holds vectors of each {table.what}", where=table.uri, fix="set side, or embed.what"
        )
    if table.set_aside:
        what = f"the table lacks rows of the corpus ({table.set_aside})"
        raise CurationError(what, where=table.uri, fix="give a model in place of the table")
    rows.facts["model"] = table.model_digest
    starts: dict[str, int] = {}  # ordinal of a split's first row, less its place in the table
    place = 0
    for split in rows.corpus.splits:
        held = int(table.dataset.count_rows(filter=f"split = '{split}'"))
        if held:
            starts[split] = min(s.first for s in shards_of(rows.corpus) if s.split == split) - place
        place += held
    missing = [split for split in rows.splits if split not in starts]
    if missing or place != table.rows:
        what = f"it has no rows of {', '.join(missing)}" if missing else "it has splits that the corpus has not"
        raise CurationError(what, where=table.uri, fix="embed this corpus, with all the splits that are curated")

    where, version, dim, total = table.uri, table.version, table.dim, table.rows

    def read(batch: pa.Table) -> pa.Table:
        given = {name: batch[name] for name in ("row", *keep)}
        if not len(batch):
            return pa.table({**given, VECTOR: vector_column(np.zeros((0, dim), np.float32))})
        shift = np.array([starts[split] for split in batch["split"].to_pylist()])
        places = np.asarray(batch["row"]) - shift
        opened = lance.dataset(where, version=version, storage_options=storage.lance_options(where))
        inside = places.max(initial=0) < total
        found = opened.take(places.tolist(), columns=[ID, VECTOR]) if inside else None
        if found is None or found[ID].to_pylist() != batch[ID].to_pylist():
            raise CurationError("its rows are not the corpus's, in order", where=where, fix="embed the corpus again")
        return pa.table({**given, VECTOR: found[VECTOR]})

    return rows.dataset(list(dict.fromkeys(["split", ID, *keep]))).map_batches(
        read, batch_format="pyarrow", batch_size=None
    )


def reduced(dataset: ray.data.Dataset, part: Callable[[pa.Table], NDArray[np.float64]]) -> NDArray[np.float64]:
    """The sum of `part(block)` over a dataset's blocks, arrays of one shape."""

    def partial(table: pa.Table) -> pa.Table:
        value = part(table)
        return pa.table({"sum": [value.tobytes()], "shape": [list(value.shape)]})

    total: Any = 0.0
    for table in tables(dataset.map_batches(partial, batch_format="pyarrow", batch_size=None)):
        for raw, shape in zip(table["sum"].to_pylist(), table["shape"].to_pylist(), strict=True):
            total = total + np.frombuffer(raw, np.float64).reshape([int(n) for n in shape])
    return np.asarray(total)


def tables(dataset: ray.data.Dataset) -> Iterator[pa.Table]:
    """The blocks of a dataset as Arrow tables, the empty ones left out."""
    for batch in dataset.iter_batches(batch_size=None, batch_format="pyarrow"):
        if len(batch):
            yield batch


def collected(dataset: ray.data.Dataset, columns: Sequence[str]) -> pa.Table:
    """All of a small dataset as one table, sorted by the first of `columns`."""
    parts = [table.select(list(columns)) for table in tables(dataset)]
    if not parts:
        raise CurationError("there are no rows to learn from", fix="judge a larger split, or earlier")
    return pa.concat_tables(parts).sort_by(columns[0])


def matrix(table: pa.Table, name: str) -> Floats:
    """A column of vectors as `(N, D)` float32."""
    chunks = [getattr(chunk, "storage", chunk) for chunk in table[name].chunks]
    parts = [chunk.flatten().to_numpy().reshape(len(chunk), -1) for chunk in chunks if len(chunk)]
    return np.concatenate(parts).astype(np.float32) if parts else np.zeros((0, 1), np.float32)


def vector_column(vectors_ND: Floats) -> pa.Array:
    """`(N, D)` as an Arrow column of fixed-size lists."""
    flat = pa.array(np.ascontiguousarray(vectors_ND, np.float32).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, vectors_ND.shape[1])


def _packed(pixels: list[NDArray[np.uint8]]) -> pa.Array:
    return pa.array([picture.tobytes() for picture in pixels], pa.binary())
