"""The engine of the `spread` topology: an embedder and one deployment per shard, behind Serve handles."""

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException

from rayemb.data.embeddings import IMAGE
from rayemb.index import Effort, Filter, Hits, Manifest, Query, QueryError, merge, queries
from rayemb.index.placement import Router
from rayemb.index.shard import open_embeddings, take_vectors
from rayemb.models import ImageError
from rayemb.serve.engine import Description, Found, FoundIds, Vectors, describe, shard_names
from rayemb.serve.errors import EngineUnavailable
from rayemb.serve.limits import remaining

logger = logging.getLogger(__name__)

T = TypeVar("T")
# Ids whose row is known from an answer: their pictures are asked for next.
_KNOWN_IDS = 50_000
# Of a client's own deadline, the rest being for the merge and the answer.
_SHARE_OF_CLIENT = 0.9


class Breaker:
    """Keeps requests from waiting, one after another, for a part that is known to be dead.

    After a failure it is open for `rest_s`; then one call may try while the others still go without.
    """

    def __init__(self, rest_s: float) -> None:
        self._rest_s = rest_s
        self._open_until = 0.0
        self._failed = False

    def allows(self) -> bool:
        """Whether to call now."""
        if not self._failed:
            return True
        now = time.monotonic()
        if now < self._open_until:
            return False
        self._open_until = now + self._rest_s
        return True

    def report(self, well: bool) -> None:
        """What became of a call."""
        self._failed = not well
        if self._failed:
            self._open_until = time.monotonic() + self._rest_s


class SpreadEngine:
    """Searches shard deployments in parallel, each under a deadline, and says which did not answer.

    `embedder` has `texts` and `images`, each of `shards` has `search`, `locate` and `ping`: Serve handles, or
    anything whose methods' `.remote(...)` can be awaited.
    """

    def __init__(
        self, index_uri: str, manifest: Manifest, embedder: Any, shards: Sequence[Any], deadline_s: float
    ) -> None:
        if len(shards) != len(manifest.shards):
            raise QueryError(f"the index has {len(manifest.shards)} shards and {len(shards)} were deployed")
        self._manifest, self._router = manifest, Router(index_uri, manifest)
        self._table = open_embeddings(manifest)
        self._description = describe(manifest, self._table)
        self._names = shard_names(manifest)
        self._embedder, self._shards, self._deadline_s = embedder, list(shards), deadline_s
        self._breakers = [Breaker(deadline_s) for _ in shards]
        self._known: OrderedDict[str, int] = OrderedDict()
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="rayemb-pictures")
        # Threads that wait for shards, apart from those that read the table.
        self._composers = ThreadPoolExecutor(8, thread_name_prefix="rayemb-queries")

    def describe(self) -> Description:
        """What is served."""
        return self._description

    async def embed_texts(self, texts: Sequence[str]) -> tuple[Vectors, int]:
        """Unit vectors `(n, D)` and the number of tokens read."""
        vectors, tokens = await self._embed(self._embedder.texts.remote(list(texts)))
        return vectors, tokens

    async def embed_images(self, images: Sequence[bytes]) -> Vectors:
        """Unit vectors `(n, D)`. Raises ImageError for a bad one."""
        result = await self._embed(self._embedder.images.remote(list(images)))
        if isinstance(result, ImageError):
            raise result
        return np.asarray(result, np.float32)

    async def search(
        self,
        vectors: Vectors,
        k: int,
        filter: Filter | None = None,
        *,
        effort: Effort | None = None,
        recall: float | None = None,
    ) -> Found:
        """The k best of the shards that answered in time; the others are named."""
        chosen = self._manifest.chosen_effort(effort, recall)
        wanted = await self._holders(vectors, filter, chosen)
        return self._best(k, *await self._ask_all(wanted, "search", vectors, k, filter, chosen))

    async def search_ids(
        self,
        vectors: Vectors,
        k: int,
        filter: Filter | None = None,
        *,
        effort: Effort | None = None,
        recall: float | None = None,
    ) -> FoundIds:
        """The k best of the shards that answered in time, ids and scores alone; the others are named."""
        chosen = self._manifest.chosen_effort(effort, recall)
        wanted = await self._holders(vectors, filter, chosen)
        found, missing = await self._ask_all(wanted, "search_ids", vectors, k, filter, chosen)
        scores, keys = merge([answer[0] for answer in found], [answer[1] for answer in found], k)
        all_keys = np.concatenate([answer[1].reshape(-1) for answer in found])
        order = np.argsort(all_keys, kind="stable")
        at = np.searchsorted(all_keys[order], keys.reshape(-1)).clip(max=max(len(order) - 1, 0))
        ids = pa.concat_arrays([answer[2] for answer in found])
        ids = ids.take(pa.array(order[at], mask=keys.reshape(-1) < 0))
        return FoundIds(scores, ids, missing, tuple(answer[3] for answer in found))

    async def words(self, text: str, k: int, filter: Filter | None = None) -> Found:
        """The k best by BM25 of the shards that answered in time; the others are named."""
        return self._best(k, *await self._ask_all(self._router.all, "words", text, k, filter))

    async def query(self, vector: Vectors | None, query: Query) -> Found:
        """A search of any other kind: composed here, in a thread, of searches of the shards."""
        loop = asyncio.get_running_loop()
        source = _Shards(self, loop)
        # In this request's context, which has its deadline.
        answer = partial(copy_context().run, queries.answer, source, vector, query)
        hits = await loop.run_in_executor(self._composers, answer)
        kept = {int(key): source.rows[int(key)] for key in hits.keys.flat}
        return Found(hits.scores, hits.keys, kept, sorted(source.missing), hits.strategies)

    async def image(self, item: str) -> bytes | None:
        """The encoded picture of an item; None if there is none. EngineUnavailable if that cannot be told."""
        if not self._table.has_images:
            return None
        key = await self.key_of(item)
        if key is None:
            return None
        loop = asyncio.get_running_loop()
        rows = await loop.run_in_executor(self._pool, self._table.take, [key], [IMAGE])
        picture: bytes | None = rows[0][IMAGE]
        return picture

    async def missing(self) -> list[str]:
        """The deployments that do not answer a ping within the deadline."""
        parts = [("embedder", self._embedder), *zip(self._names, self._shards, strict=True)]
        answers = await asyncio.gather(*(self._within(part.ping.remote()) for _, part in parts), return_exceptions=True)
        return [name for (name, _), answer in zip(parts, answers, strict=True) if isinstance(answer, BaseException)]

    def mapped(self, vectors: Vectors) -> Vectors:
        """The same: there is no map between models here."""
        return vectors

    @property
    def manifest(self) -> Manifest:
        """What the index is."""
        return self._manifest

    def close(self) -> None:
        """Ends the threads; the deployments are whoever's that started them."""
        self._pool.shutdown(wait=True)
        self._composers.shutdown(wait=True)

    # -- calls ---------------------------------------------------------------------------------------------

    async def _within(self, call: Awaitable[T]) -> T:
        # A call to a deployment without a live replica waits for ever; it does not raise.
        return await asyncio.wait_for(call, remaining(self._deadline_s))

    async def _embed(self, call: Awaitable[T]) -> T:
        try:
            return await self._within(call)
        except (TimeoutError, RayError, RayServeException, BackPressureError) as error:
            logger.warning("the embedder did not answer (%s)", type(error).__name__)
            raise EngineUnavailable("the embedder does not answer", fix="try again in some seconds") from error

    async def _holders(self, vectors: Vectors, filter: Filter | None, effort: Effort) -> Sequence[int]:
        """The shards that have what a search looks into; under a filter that may lie anywhere."""
        if filter or not self._router.routes:
            return self._router.all
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, self._router.shards, vectors, effort.nprobe)

    async def _ask_all(self, wanted: Sequence[int], method: str, *args: Any) -> tuple[list[Any], list[str]]:
        """What the `wanted` shards answered, and the names of those that did not.

        Raises QueryError, or EngineUnavailable if none did.
        """
        asked = [number for number in wanted if self._breakers[number].allows()]
        answers = await asyncio.gather(*(self._ask(number, method, *args) for number in asked))
        found = [answer for answer in answers if answer is not None]
        for answer in found:
            if isinstance(answer, QueryError):
                raise answer
        if not found:
            raise EngineUnavailable("no shard of the index answers", fix="try again in some seconds")
        answered = {number for number, answer in zip(asked, answers, strict=True) if answer is not None}
        return found, [self._names[number] for number in wanted if number not in answered]

    def _best(self, k: int, found: list[Any], missing: list[str]) -> Found:
        scores, keys = merge([answer[0] for answer in found], [answer[1] for answer in found], k)
        rows = {key: row for answer in found for key, row in answer[2].items()}
        kept = {int(key) for key in keys.flat if key >= 0}
        self._remember({key: rows[key] for key in kept})
        return Found(scores, keys, rows, missing, tuple(answer[3] for answer in found))

    async def _ask(self, number: int, method: str, *args: Any) -> Any:
        # A client with less time left than that gets what there is by then: a part rather than nothing.
        left = remaining(math.inf) * _SHARE_OF_CLIENT
        try:
            call = getattr(self._shards[number], method).remote(*args)
            answer = await asyncio.wait_for(call, min(self._deadline_s, left))
        except (TimeoutError, RayError, RayServeException, BackPressureError) as error:
            logger.warning("%s did not answer (%s)", self._names[number], type(error).__name__)
            if not isinstance(error, TimeoutError) or left >= self._deadline_s:  # else it had no time to
                self._breakers[number].report(False)
            return None
        self._breakers[number].report(True)
        return answer

    async def key_of(self, item: str) -> int | None:
        """The key of the row with this id, or None. EngineUnavailable if that cannot be told."""
        key = self._known.get(item)
        return key if key is not None else await self._locate(item)

    def vectors_of(self, keys: Sequence[int]) -> Vectors:
        """Vectors of rows, from the table; blocks."""
        return take_vectors(self._table, np.asarray(keys, np.int64))

    async def _locate(self, item: str) -> int | None:
        calls = (self._within(shard.locate.remote(item)) for shard in self._shards)
        answers = await asyncio.gather(*calls, return_exceptions=True)
        keys = [answer for answer in answers if isinstance(answer, int)]
        if keys:
            return keys[0]
        if any(isinstance(answer, BaseException) for answer in answers):
            # Not a 404: the shard that does not answer may hold it.
            raise EngineUnavailable("a shard of the index does not answer", fix="try again in some seconds")
        return None

    def _remember(self, rows: Mapping[int, dict[str, Any]]) -> None:
        for key, row in rows.items():
            self._known[str(row["id"])] = key
        while len(self._known) > _KNOWN_IDS:
            self._known.popitem(last=False)


class _Shards:
    """The shards as a `Source` for one query, in a thread beside the event loop; it remembers what it was told."""

    def __init__(self, engine: SpreadEngine, loop: asyncio.AbstractEventLoop) -> None:
        self._engine, self._loop = engine, loop
        self.rows: dict[int, dict[str, Any]] = {}
        self.missing: set[str] = set()

    def search(
        self,
        vectors: ArrayLike,
        k: int,
        filter: Filter | None = None,
        *,
        effort: Effort | None = None,
        recall: float | None = None,
    ) -> Hits:
        x_ND = np.asarray(vectors, np.float32)
        return self._hits(self._engine.search(x_ND, k, filter, effort=effort, recall=recall))

    def words(self, text: str, k: int, filter: Filter | None = None) -> Hits:
        return self._hits(self._engine.words(text, k, filter))

    def key(self, row_id: str) -> int | None:
        return self._wait(self._engine.key_of(row_id))

    def vectors(self, keys: Sequence[int]) -> Vectors:
        return self._engine.vectors_of(keys)

    def payload(self, keys: Sequence[int]) -> list[dict[str, Any]]:
        return [self.rows[key] for key in keys]

    def _hits(self, call: Coroutine[Any, Any, Found]) -> Hits:
        found = self._wait(call)
        self.rows |= found.rows
        self.missing |= set(found.missing_shards)
        return Hits(found.scores, found.keys, tuple(found.strategies))

    def _wait(self, call: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result()
