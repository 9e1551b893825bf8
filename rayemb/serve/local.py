"""The engine that holds model and index in this very process."""

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

from rayemb.index import (
    Effort,
    Filter,
    Hits,
    Index,
    IndexMap,
    LiveConfig,
    Manifest,
    Query,
    UpdateError,
    load_manifest,
    load_map,
)
from rayemb.models import Model
from rayemb.serve.config import ServeConfig
from rayemb.serve.encoder import Encoder, use_threads
from rayemb.serve.engine import Description, Found, FoundIds, Vectors, describe, reading_table
from rayemb.serve.errors import ServeError
from rayemb.serve.following import Following
from rayemb.serve.gathered import GatheredSearch
from rayemb.serve.versions.query_map import QueryMap

logger = logging.getLogger(__name__)

T = TypeVar("T")
_POOL_THREADS = 8


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
        self._uri, self._map = index_uri, query_map
        self._digest, self._dim = str(model.digest), model.dim
        self._live = LiveConfig(max_rows=config.max_updates) if config.live else False
        self._mapped = config.mapped
        self._index = self._opened()
        self._description = self._described(self._index)
        # The number of OpenMP threads belongs to each thread: set it in every one that computes.
        self._pool = ThreadPoolExecutor(_POOL_THREADS, "rayemb-engine", use_threads, (config.threads,))
        self._gathered = GatheredSearch(config.threads)
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
        return await self._searched(vectors, k, filter, effort, recall, self._found)

    async def query(self, vector: Vectors | None, query: Query) -> Found:
        """A search of any other kind."""
        index = self._index

        def found() -> Found:
            with reading_table():
                return self._found(index, index.query(None if vector is None else self.mapped(vector), query))

        return await self.run(found)

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

        def ids(index: Index, hits: Hits) -> FoundIds:
            return FoundIds(hits.scores, index.ids(hits.keys), [], hits.strategies, hits.updates, index.version)

        return await self._searched(vectors, k, filter, effort, recall, ids)

    async def _searched(
        self,
        vectors: Vectors,
        k: int,
        filter: Filter | None,
        effort: Effort | None,
        recall: float | None,
        then: Callable[[Index, Hits], T],
    ) -> T:
        """What `then` makes of the hits, in the thread that found them."""
        index = self._index
        if not filter:
            x_ND = vectors if self._map is None else await self.run(self._map, vectors)
            found: T = await self._gathered(index, x_ND, k, effort, recall, then)
            return found
        # Not in those threads: what passes a filter may have to be read from storage.
        return await self.run(
            lambda: then(index, index.search(self.mapped(vectors), k, filter, effort=effort, recall=recall))
        )

    async def image(self, item: str) -> bytes | None:
        """The encoded picture of an item; None if there is none."""

        def picture() -> bytes | None:
            with reading_table():
                return self._index.image(item)

        return await self.run(picture)

    async def map(self) -> IndexMap | None:
        """The map of the index that is searched now."""
        return await self.run(load_map, self._uri, self._index.manifest)

    async def missing(self) -> list[str]:
        """Nothing is missing in a process that lives."""
        return []

    async def embed_documents(self, texts: Sequence[str]) -> tuple[Vectors, int]:
        """Unit vectors `(n, D)` of texts that are to be found, and the number of tokens read."""
        return await self._encoder.documents(texts)

    async def refresh(self, at_least: int | None = None) -> int:
        """Takes in what others wrote."""
        return await self.run(self._index.refresh, at_least)

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
            self._index, self._description = index, self._described(index)
        logger.info("serving index %s from now on", index.version)

    async def upsert(
        self,
        ids: Sequence[str],
        vectors: Vectors,
        payload: Sequence[Mapping[str, Any]],
        images: Sequence[bytes | None] | None,
    ) -> int:
        """Durable, and found from now on."""
        if self._map is not None:
            raise UpdateError(
                "the index is of another model than this one, whose queries are mapped: the map is not for items",
                where="items",
                fix="write to a version whose index is of its own model",
            )

        def written() -> int:
            with self._writing:
                return self._index.upsert(ids, vectors, payload, images)

        return await self.run(written)

    async def delete(self, ids: Sequence[str]) -> tuple[int, int]:
        """How many there were, and the version without them."""

        def deleted() -> tuple[int, int]:
            with self._writing:
                view = self._index.view()
                there = sum(view.key(each) is not None for each in dict.fromkeys(ids))
                return there, self._index.delete(ids)

        return await self.run(deleted)

    async def items(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        """Id and payload of the items that there are."""

        def rows() -> list[dict[str, Any]]:
            view = self._index.view()
            keys = [key for key in map(view.key, dict.fromkeys(ids)) if key is not None]
            return view.payload(keys)

        return await self.run(rows)

    async def count(self) -> int:
        """How many items can be found."""
        return await self.run(lambda: self._index.view().rows)

    def updates(self) -> tuple[int, int]:
        """The version that searches see, and how many wait."""
        return self._index.live.version, self._index.live.updates

    def close(self) -> None:
        """Ends the threads once they have done what they were given; waits for it."""
        self._gathered.close()
        self._pool.shutdown(wait=True)
        self._index.close()
        del self._encoder, self._gathered, self._index  # they lie in cycles: the memory would wait for the collector

    @property
    def index(self) -> Index:
        """The index that is searched."""
        return self._index

    @property
    def manifest(self) -> Manifest:
        """What the index is."""
        return self._index.manifest

    def hedged(self) -> Mapping[str, int]:
        """Nothing is called."""
        return {}

    def mapped(self, vectors: Vectors) -> Vectors:
        """Vectors of the model as the index is asked for them: the same, unless there is a map between models."""
        return vectors if self._map is None else self._map(vectors)

    def _opened(self) -> Index:
        digest = self._map.target if self._map else self._digest
        return Index.open(self._uri, model_digest=digest, live=self._live, mapped=self._mapped)

    def _described(self, index: Index) -> Description:
        return replace(describe(index.manifest, index.embeddings), model_digest=self._digest, dim=self._dim)

    async def run(self, work: Callable[..., T], *args: Any) -> T:
        """What `work` gives, from a thread of the engine."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, partial(work, *args))
