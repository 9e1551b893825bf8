"""What the gateway asks of its engine, and the engine that holds model and index in this very process."""

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
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
from rayemb.index import Effort, Filter, Hits, Index, IndexArtefactError, LiveConfig, Manifest, Query, load_manifest
from rayemb.index.columns import kind_of
from rayemb.models import PADDING, Model
from rayemb.serve.coalesce import Coalescer
from rayemb.serve.config import ServeConfig
from rayemb.serve.errors import EngineUnavailable
from rayemb.serve.following import Following
from rayemb.storage import StorageError

logger = logging.getLogger(__name__)

Vectors = NDArray[np.float32]
T = TypeVar("T")
_POOL_THREADS = 8
# Characters whose tokens are counted on the event loop: in less time than a thread takes to begin.
_COUNTED_HERE = 2_000


@dataclass(frozen=True)
class Found:
    """What a search gave: `scores` `(n, k)` float32 and `keys` `(n, k)` int64, padded with -inf and -1.

    `rows` has id and payload of every key in `keys` (-1 apart); `strategies` and `updates` are those of
    `rayemb.index.Hits`; `index_version`: of the index that answered, where it is not the only one of its engine.
    """

    scores: Vectors
    keys: NDArray[np.int64]
    rows: Mapping[int, dict[str, Any]]
    missing_shards: list[str] = field(default_factory=list)
    strategies: Sequence[str] = ()
    updates: int | None = None
    index_version: str = ""


@dataclass(frozen=True)
class FoundIds:
    """What a search gave, without payloads: `scores` `(n, k)` float32, padded with -inf, and as many `ids`.

    `ids` is an arrow array of `n * k` texts, row by row, null in empty places.
    """

    scores: Vectors
    ids: pa.Array
    missing_shards: list[str] = field(default_factory=list)
    strategies: Sequence[str] = ()
    updates: int | None = None
    index_version: str = ""


@dataclass(frozen=True)
class Description:
    """What is served."""

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

    # -- where `ServeConfig.live` is set ---------------------------------------------------------------------

    async def embed_documents(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors `(n, D)` float32 of texts that are to be found, which some models embed unlike queries."""
        ...

    async def refresh(self, at_least: int | None = None) -> int:
        """Takes in what others wrote; the version of the updates. Raises as `rayemb.index.Index.refresh`."""
        ...

    async def upsert(
        self,
        ids: Sequence[str],
        vectors: Vectors,
        payload: Sequence[Mapping[str, Any]],
        images: Sequence[bytes | None] | None,
    ) -> int:
        """Durable, and found from now on; the version of the updates. Raises as `rayemb.index.Index.upsert`."""
        ...

    async def delete(self, ids: Sequence[str]) -> tuple[int, int]:
        """How many of the items there were, and the version of the updates without them."""
        ...

    async def items(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        """Id and payload of the items that there are, in that order."""
        ...

    def updates(self) -> tuple[int, int]:
        """The version of the updates that searches see, and how many wait to be compacted; never waits."""
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
        self._model, self._limits, self._pool = model, config.image, pool

        def texts(kind: Literal["query", "text"]) -> Coalescer[tuple[str, int], Vectors]:
            work = partial(self._embed_texts, kind)
            return Coalescer(
                work, config.max_batch, pool, max_cells=config.max_batch_tokens, weigh=lambda item: item[1]
            )

        self._texts = texts("text" if searched == "image" else "query")
        self._documents = texts("query" if searched == "query" else "text")
        self._images = Coalescer(self._embed_pixels, config.max_batch, pool)

    async def texts(self, texts: Sequence[str]) -> tuple[Vectors, int]:
        """Unit vectors `(n, D)`, and the number of tokens that the model read."""
        tokens = await self._counted(texts)
        return np.stack(await self._texts(list(zip(texts, tokens, strict=True)))), sum(tokens)

    async def documents(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors `(n, D)` of texts that are to be found."""
        tokens = await self._counted(texts)
        return np.stack(await self._documents(list(zip(texts, tokens, strict=True))))

    async def images(self, images: Sequence[bytes]) -> Vectors:
        """Unit vectors `(n, D)`. Decoding fails (ImageError) for the one request, not for its batch."""
        loop = asyncio.get_running_loop()
        pixels = await asyncio.gather(
            *(loop.run_in_executor(self._pool, self._model.pixels, image, self._limits) for image in images)
        )
        return np.stack(await self._images(pixels))

    async def _counted(self, texts: Sequence[str]) -> list[int]:
        if sum(map(len, texts)) <= _COUNTED_HERE:
            return self._count(texts)
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._count, texts)

    def _count(self, texts: Sequence[str]) -> list[int]:
        counts: list[int] = (self._model.tokenizer(texts) != PADDING).sum(axis=1).tolist()
        return counts

    def _embed_texts(self, kind: Literal["query", "text"], texts: list[tuple[str, int]]) -> list[Vectors]:
        return list(self._model.embed_texts([text for text, _ in texts], kind=kind))

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


@contextmanager
def reading_table() -> Iterator[None]:
    """Storage that does not answer is a state that passes: the rest of the service needs it not."""
    try:
        yield
    except (OSError, StorageError) as error:
        logger.warning("the embeddings table cannot be read (%s)", " ".join(str(error).split())[:300])
        raise EngineUnavailable("the storage of the embeddings does not answer", fix="try again later") from error


def shard_names(manifest: Manifest) -> list[str]:
    """How the shards are called in answers and on the dashboard, in order."""
    return [f"shard-{number}" for number in range(len(manifest.shards))]


class LocalEngine:
    """Model and all shards in this process, work in threads: no hop at all between query and answer.

    Refuses an index that was built with another model. FAISS and torch release the GIL while they compute.
    """

    def __init__(self, model_uri: str, index_uri: str, config: ServeConfig | None = None) -> None:
        config = config or ServeConfig()
        use_threads(config.threads)
        model = Model.load(model_uri)
        self._uri, self._digest = index_uri, model.digest
        self._live = LiveConfig(max_rows=config.max_updates) if config.live else False
        self._mapped = config.mapped
        self._index = self._opened()
        self._description = describe(self._index.manifest, self._index.embeddings)
        # The number of OpenMP threads belongs to each thread: set it in every one that computes.
        self._pool = ThreadPoolExecutor(_POOL_THREADS, "rayemb-engine", use_threads, (config.threads,))
        self._encoder = Encoder(model, config, self._pool, searched=self._index.embeddings.what)
        # Of writes and of the change to another index: what one acknowledged, the other has.
        self._writing = threading.Lock()
        if config.live:
            Following(self, config.follow_s)

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
        index = self._index
        return await self._run(
            lambda: self._found(index, index.search(vectors, k, filter, effort=effort, recall=recall))
        )

    async def query(self, vector: Vectors | None, query: Query) -> Found:
        """A search of any other kind."""
        index = self._index

        def found() -> Found:
            with reading_table():
                return self._found(index, index.query(vector, query))

        return await self._run(found)

    def _found(self, index: Index, hits: Hits) -> Found:
        keys = sorted({int(key) for key in hits.keys.flat if key >= 0})
        rows = dict(zip(keys, index.payload(keys), strict=True))
        return Found(hits.scores, hits.keys, rows, [], hits.strategies, hits.updates, index.version)

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
            index = self._index
            hits = index.search(vectors, k, filter, effort=effort, recall=recall)
            return FoundIds(hits.scores, index.ids(hits.keys), [], hits.strategies, hits.updates, index.version)

        return await self._run(found)

    async def image(self, item: str) -> bytes | None:
        """The encoded picture of an item; None if there is none."""

        def picture() -> bytes | None:
            with reading_table():
                return self._index.image(item)

        return await self._run(picture)

    async def missing(self) -> list[str]:
        """Nothing is missing in a process that lives."""
        return []

    async def embed_documents(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors `(n, D)` of texts that are to be found."""
        return await self._encoder.documents(texts)

    async def refresh(self, at_least: int | None = None) -> int:
        """Takes in what others wrote."""
        return await self._run(self._index.refresh, at_least)

    def catch_up(self) -> None:
        """Takes in what others wrote, and opens the index that was published instead of this one, if there is one.

        A compaction publishes one. What is asked now is answered by the old one to its end. Raises RayembError.
        """
        if load_manifest(self._uri).version == self._index.version:
            self._index.refresh()
            return
        index = self._opened()
        with self._writing:
            index.refresh()
            self._index, self._description = index, describe(index.manifest, index.embeddings)
        logger.info("serving index %s from now on", index.version)

    async def upsert(
        self,
        ids: Sequence[str],
        vectors: Vectors,
        payload: Sequence[Mapping[str, Any]],
        images: Sequence[bytes | None] | None,
    ) -> int:
        """Durable, and found from now on."""

        def written() -> int:
            with self._writing:
                return self._index.upsert(ids, vectors, payload, images)

        return await self._run(written)

    async def delete(self, ids: Sequence[str]) -> tuple[int, int]:
        """How many there were, and the version without them."""

        def deleted() -> tuple[int, int]:
            with self._writing:
                view = self._index.view()
                there = sum(view.key(each) is not None for each in dict.fromkeys(ids))
                return there, self._index.delete(ids)

        return await self._run(deleted)

    async def items(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        """Id and payload of the items that there are."""

        def rows() -> list[dict[str, Any]]:
            view = self._index.view()
            keys = [key for key in map(view.key, dict.fromkeys(ids)) if key is not None]
            return view.payload(keys)

        return await self._run(rows)

    def updates(self) -> tuple[int, int]:
        """The version that searches see, and how many wait."""
        return self._index.live.version, self._index.live.updates

    def _opened(self) -> Index:
        return Index.open(self._uri, model_digest=self._digest, live=self._live, mapped=self._mapped)

    async def _run(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, partial(work, *args))
