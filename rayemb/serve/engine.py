"""What the gateway asks of its engine, and the engine that holds model and index in this very process."""

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol, TypeVar

import faiss
import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from rayemb.data.config import EmbedWhat
from rayemb.data.embeddings import EmbeddingsTable
from rayemb.index import Effort, Filter, Hits, Index, IndexArtefactError, Manifest, Query, load_manifest
from rayemb.index.columns import kind_of
from rayemb.models import PADDING, Model
from rayemb.serve.coalesce import Coalescer
from rayemb.serve.config import ServeConfig
from rayemb.serve.errors import ServeError
from rayemb.serve.versions.query_map import QueryMap

logger = logging.getLogger(__name__)

Vectors = NDArray[np.float32]
T = TypeVar("T")
# From keys to their places in a shard, -1 where it has them not.
_POOL_THREADS = 8


@dataclass(frozen=True)
class Found:
    """What a search gave: `scores` `(n, k)` float32 and `keys` `(n, k)` int64, padded with -inf and -1.

    `rows` has id and payload of every key in `keys` (-1 apart); `strategies` are those of `rayemb.index.Hits`.
    """

    scores: Vectors
    keys: NDArray[np.int64]
    rows: Mapping[int, dict[str, Any]]
    missing_shards: list[str] = field(default_factory=list)
    strategies: Sequence[str] = ()


@dataclass(frozen=True)
class FoundIds:
    """What a search gave, without payloads: `scores` `(n, k)` float32, padded with -inf, and as many `ids`.

    `ids` is an arrow array of `n * k` texts, row by row, null in empty places.
    """

    scores: Vectors
    ids: pa.Array
    missing_shards: list[str] = field(default_factory=list)
    strategies: Sequence[str] = ()


@dataclass(frozen=True)
class Description:
    """What is served; constant for the life of an engine."""

    index_version: str
    model_digest: str
    rows: int
    dim: int
    metric: str
    factory: str
    recall: dict[str, Any]
    effort: dict[str, int]
    curve: list[dict[str, Any]]
    words: str | None
    shards: list[dict[str, Any]]
    payload_columns: list[str]
    payload_types: dict[str, str]
    has_images: bool


class Engine(Protocol):
    """Everything the gateway needs to answer. Implementations never block the event loop.

    Raises ImageError for a bad image, QueryError for a bad filter, EngineUnavailable if nothing answers now.
    """

    def describe(self) -> Description:
        """What is served."""
        ...

    async def embed_texts(self, texts: Sequence[str]) -> tuple[Vectors, int]:
        """Unit vectors `(n, D)` float32, and the number of tokens that the model read."""
        ...

    async def embed_images(self, images: Sequence[bytes]) -> Vectors:
        """Unit vectors `(n, D)` float32 of encoded images."""
        ...

    async def search(
        self,
        vectors: Vectors,
        k: int,
        filter: Filter | None = None,
        *,
        effort: Effort | None = None,
        recall: float | None = None,
    ) -> Found:
        """The k best for each vector, payloads included: in `spread`, a further trip costs time.

        `effort`, `recall`: how wide to search, as in `rayemb.index.Index.search`.
        """
        ...

    async def query(self, vector: Vectors | None, query: Query) -> Found:
        """A search of any other kind, of one vector `(D,)` or of examples: `n` is 1, nothing is padded."""
        ...

    async def search_ids(
        self,
        vectors: Vectors,
        k: int,
        filter: Filter | None = None,
        *,
        effort: Effort | None = None,
        recall: float | None = None,
    ) -> FoundIds:
        """As `search`, ids and scores alone: no object is made for a hit."""
        ...

    async def image(self, item: str) -> bytes | None:
        """The encoded picture of the item with this id; None if there is none."""
        ...

    async def missing(self) -> list[str]:
        """The parts that do not answer now; empty: all well."""
        ...

    def mapped(self, vectors: Vectors) -> Vectors:
        """Vectors of the model as the index is asked for them: the same, unless there is a map between models."""
        ...

    @property
    def manifest(self) -> Manifest:
        """What the index is."""
        ...

    def close(self) -> None:
        """Lets go of threads and memory, once nothing is asked any more; may wait for what still runs."""
        ...


def check_match(model_digest: str, index_uri: str) -> Manifest:
    """The manifest of an index that was built with that model. Raises IndexArtefactError if it was not."""
    manifest = load_manifest(index_uri)
    if manifest.model_digest != model_digest:
        raise IndexArtefactError(
            f"the index was built with model {manifest.model_digest[:12]}, and the model to serve is "
            f"{model_digest[:12]}: their vectors do not compare",
            where=index_uri,
            fix="serve the model that the index was built with, or embed and index again",
        )
    return manifest


def check_map(query_map: QueryMap, model: Model, index_uri: str) -> None:
    """Raises ServeError if the map is not from `model` to the index's, or of other dimensions."""
    manifest = load_manifest(index_uri)
    if (query_map.source, query_map.target) != (model.digest, manifest.model_digest):
        raise ServeError(
            f"the query map is from model {query_map.source[:12]} to {query_map.target[:12]}; the model to serve is "
            f"{str(model.digest)[:12]} and the index is of {manifest.model_digest[:12]}",
            where=index_uri,
            fix="make a map for these two models",
        )
    if query_map.dims != (model.dim, manifest.dim):
        took, gave = query_map.dims
        raise ServeError(
            f"the query map takes {took} dimensions and gives {gave}; the model has {model.dim} and the index "
            f"{manifest.dim}",
            where=index_uri,
            fix="make a map for these two models",
        )


def use_threads(count: int) -> None:
    """Sets how many threads torch, FAISS and numpy use for work started in this thread: replicas share a machine."""
    torch.set_num_threads(count)
    faiss.omp_set_num_threads(count)
    threadpool_limits(count, user_api="blas")  # of the whole process: numpy scores the rows that pass a filter


class Encoder:
    """A model whose concurrent queries share passes through it; in the local engine and in the embedder.

    Not `serve.batch`: that waits for a timeout where this batches what came during the last pass, so that a
    lone query is not delayed; and it works outside a replica too.
    """

    def __init__(self, model: Model, config: ServeConfig, pool: ThreadPoolExecutor, *, searched: EmbedWhat) -> None:
        """`searched`: what the index is of; images are searched with the texts that describe them."""
        self._kind: Literal["query", "text"] = "text" if searched == "image" else "query"
        self._model, self._limits, self._pool = model, config.image, pool
        self._texts = Coalescer(self._embed_texts, config.max_batch, pool)
        self._images = Coalescer(self._embed_pixels, config.max_batch, pool)

    async def texts(self, texts: Sequence[str]) -> tuple[Vectors, int]:
        """Unit vectors `(n, D)`, and the number of tokens that the model read."""
        results = await self._texts(texts)
        return np.stack([vector for vector, _ in results]), sum(tokens for _, tokens in results)

    async def images(self, images: Sequence[bytes]) -> Vectors:
        """Unit vectors `(n, D)`. Decoding fails (ImageError) for the one request, not for its batch."""
        loop = asyncio.get_running_loop()
        pixels = await asyncio.gather(
            *(loop.run_in_executor(self._pool, self._model.pixels, image, self._limits) for image in images)
        )
        return np.stack(await self._images(pixels))

    def _embed_texts(self, texts: list[str]) -> list[tuple[Vectors, int]]:
        tokens = (self._model.tokenizer(texts) != PADDING).sum(axis=1)
        return list(zip(self._model.embed_texts(texts, kind=self._kind), tokens.tolist(), strict=True))

    def _embed_pixels(self, pixels: list[NDArray[np.uint8]]) -> list[Vectors]:
        return list(self._model.embed_pixels(np.stack(pixels)))


def describe(manifest: Manifest, embeddings: EmbeddingsTable) -> Description:
    """What a gateway says about the index of `manifest`."""
    fields = embeddings.dataset.schema
    return Description(
        index_version=manifest.version,
        model_digest=manifest.model_digest,
        rows=manifest.embeddings.rows,
        dim=manifest.dim,
        metric=manifest.metric,
        factory=manifest.factory,
        recall=manifest.recall.model_dump() if manifest.recall else {},
        effort=asdict(manifest.effort),
        curve=[point.model_dump(mode="json") for point in manifest.curve],
        words=manifest.words.column if manifest.words else None,
        shards=[
            {"name": name, "rows": shard.rows}
            for name, shard in zip(shard_names(manifest), manifest.shards, strict=True)
        ],
        payload_columns=embeddings.payload_columns,
        payload_types={name: kind_of(fields.field(name).type) for name in embeddings.payload_columns},
        has_images=embeddings.has_images,
    )


def shard_names(manifest: Manifest) -> list[str]:
    """How the shards are called in answers and on the dashboard, in order."""
    return [f"shard-{number}" for number in range(len(manifest.shards))]


class LocalEngine:
    """Model and all shards in this process, work in threads: no hop at all between query and answer.

    Refuses an index that was built with another model. FAISS and torch release the GIL while they compute.
    """

    def __init__(
        self,
        model_uri: str,
        index_uri: str,
        config: ServeConfig | None = None,
        *,
        model: Model | None = None,
        query_map: QueryMap | None = None,
    ) -> None:
        """`model`: the one at `model_uri`, where it is in memory already. `query_map`: where the index is of another
        model, from the one to the other.
        """
        config = config or ServeConfig()
        use_threads(config.threads)
        model = model or Model.load(model_uri)
        if query_map is not None:
            check_map(query_map, model, index_uri)
        self._map = query_map
        self._index = Index.open(index_uri, model_digest=query_map.target if query_map else model.digest)
        self._description = replace(
            describe(self._index.manifest, self._index.embeddings), model_digest=str(model.digest), dim=model.dim
        )
        # The number of OpenMP threads belongs to each thread: set it in every one that computes.
        self._pool = ThreadPoolExecutor(_POOL_THREADS, "rayemb-engine", use_threads, (config.threads,))
        self._encoder = Encoder(model, config, self._pool, searched=self._index.embeddings.what)

    def describe(self) -> Description:
        """What is served."""
        return self._description

    async def embed_texts(self, texts: Sequence[str]) -> tuple[Vectors, int]:
        """Unit vectors `(n, D)` and the number of tokens read."""
        return await self._encoder.texts(texts)

    async def embed_images(self, images: Sequence[bytes]) -> Vectors:
        """Unit vectors `(n, D)`."""
        return await self._encoder.images(images)

    async def search(
        self,
        vectors: Vectors,
        k: int,
        filter: Filter | None = None,
        *,
        effort: Effort | None = None,
        recall: float | None = None,
    ) -> Found:
        """The k best of all shards, with their payloads."""
        return await self.run(
            lambda: self._found(self._index.search(self.mapped(vectors), k, filter, effort=effort, recall=recall))
        )

    async def query(self, vector: Vectors | None, query: Query) -> Found:
        """A search of any other kind."""
        return await self.run(
            lambda: self._found(self._index.query(None if vector is None else self.mapped(vector), query))
        )

    def _found(self, hits: Hits) -> Found:
        keys = sorted({int(key) for key in hits.keys.flat if key >= 0})
        rows = dict(zip(keys, self._index.payload(keys), strict=True))
        return Found(hits.scores, hits.keys, rows, strategies=hits.strategies)

    async def search_ids(
        self,
        vectors: Vectors,
        k: int,
        filter: Filter | None = None,
        *,
        effort: Effort | None = None,
        recall: float | None = None,
    ) -> FoundIds:
        """The k best of all shards: ids and scores."""

        def found() -> FoundIds:
            hits = self._index.search(self.mapped(vectors), k, filter, effort=effort, recall=recall)
            return FoundIds(hits.scores, self._index.ids(hits.keys), strategies=hits.strategies)

        return await self.run(found)

    async def image(self, item: str) -> bytes | None:
        """The encoded picture of an item; None if there is none."""
        return await self.run(self._index.image, item)

    async def missing(self) -> list[str]:
        """Nothing is missing in a process that lives."""
        return []

    def close(self) -> None:
        """Ends the threads once they have done what they were given; waits for it."""
        self._pool.shutdown(wait=True)
        self._index.close()
        del self._encoder, self._index  # they lie in cycles: the memory would wait for the collector

    @property
    def index(self) -> Index:
        """The index that is searched."""
        return self._index

    @property
    def manifest(self) -> Manifest:
        """What the index is."""
        return self._index.manifest

    def mapped(self, vectors: Vectors) -> Vectors:
        """Vectors of the model as the index is asked for them: the same, unless there is a map between models."""
        return vectors if self._map is None else self._map(vectors)

    async def run(self, work: Callable[..., T], *args: Any) -> T:
        """What `work` gives, from a thread of the engine."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, partial(work, *args))
