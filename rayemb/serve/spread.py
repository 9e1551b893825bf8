"""The engine of the `spread` topology: an embedder and one deployment per shard, behind Serve handles."""

import asyncio
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException

from rayemb.data.embeddings import IMAGE
from rayemb.index import Effort, Filter, Hits, LiveConfig, Manifest, Query, QueryError, Shard, merge, queries
from rayemb.index.live.follower import Follower, State
from rayemb.index.placement import Router
from rayemb.index.shard import Answer, open_embeddings, open_terms, take_vectors
from rayemb.models import ImageError
from rayemb.serve.config import ServeConfig
from rayemb.serve.engine import Description, Found, FoundIds, Vectors, describe, shard_names
from rayemb.serve.errors import EngineUnavailable
from rayemb.serve.following import Following
from rayemb.serve.limits import remaining

logger = logging.getLogger(__name__)

T = TypeVar("T")
# Ids whose row is known from an answer: their pictures are asked for next.
_KNOWN_IDS = 50_000
# Of a client's own deadline, the rest being for the merge and the answer.
_SHARE_OF_CLIENT = 0.9


# Scores and keys `(n, k)`, the rows or ids of those keys, the strategy.
ShardAnswer = tuple[Vectors, Any, Any, str]


def with_rows(shard: Shard, found: Answer) -> ShardAnswer:
    """An answer with id and payload of each of its keys."""
    return found.scores, found.keys, rows_of(shard, np.unique(found.keys[found.keys >= 0])), found.strategy


def with_ids(shard: Shard, found: Answer) -> ShardAnswer:
    """An answer with the ids of its keys: `n * k` arrow texts."""
    return found.scores, found.keys, shard.ids(found.keys), found.strategy


def rows_of(shard: Shard, keys: NDArray[np.int64]) -> dict[int, dict[str, Any]]:
    """Id and payload of those of the keys that are of the shard."""
    positions = shard.keys.at(keys)
    there = positions >= 0
    return dict(zip(keys[there].tolist(), shard.payload.take(positions[there].tolist()), strict=True))


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
        self, index_uri: str, manifest: Manifest, embedder: Any, shards: Sequence[Any], config: ServeConfig
    ) -> None:
        if len(shards) != len(manifest.shards):
            raise QueryError(f"the index has {len(manifest.shards)} shards and {len(shards)} were deployed")
        self._manifest, self._router = manifest, Router(index_uri, manifest)
        self._table = open_embeddings(manifest)
        self._description = describe(manifest, self._table)
        self._names = shard_names(manifest)
        self._embedder, self._shards, self._deadline_s = embedder, list(shards), config.deadline_s
        self._breakers = [Breaker(config.deadline_s) for _ in shards]
        # What is new is searched here: it is little, and a hop to a deployment of its own would cost more.
        self._follower: Follower | None = None
        if config.live:
            limits = LiveConfig(max_rows=config.max_updates)
            self._follower = Follower(manifest, self._table, [], limits, lexical=open_terms(index_uri, manifest))
            Following(self, config.follow_s)
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
        return await self.search_at(self.state(), vectors, k, filter, effort, recall)

    async def search_at(
        self,
        state: State | None,
        vectors: Vectors,
        k: int,
        filter: Filter | None,
        effort: Effort | None,
        recall: float | None,
    ) -> Found:
        """As `search`, with the updates of `state`."""
        chosen = self._manifest.chosen_effort(effort, recall)
        wanted = await self._holders(vectors, filter, chosen)
        return self._best(k, *await self._ask_all(wanted, state, "search", vectors, k, filter, chosen), state)

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
        state = self.state()
        chosen = self._manifest.chosen_effort(effort, recall)
        wanted = await self._holders(vectors, filter, chosen)
        found, missing = await self._ask_all(wanted, state, "search_ids", vectors, k, filter, chosen)
        scores, keys = merge([answer[0] for answer in found], [answer[1] for answer in found], k)
        all_keys = np.concatenate([answer[1].reshape(-1) for answer in found])
        order = np.argsort(all_keys, kind="stable")
        at = np.searchsorted(all_keys[order], keys.reshape(-1)).clip(max=max(len(order) - 1, 0))
        ids = pa.concat_arrays([answer[2] for answer in found])
        ids = ids.take(pa.array(order[at], mask=keys.reshape(-1) < 0))
        return FoundIds(scores, ids, missing, tuple(answer[3] for answer in found), state.version if state else None)

    async def words_at(self, state: State | None, text: str, k: int, filter: Filter | None = None) -> Found:
        """The k best by BM25 of the shards that answered in time, with the updates of `state`; the others are named."""
        return self._best(k, *await self._ask_all(self._router.all, state, "words", text, k, filter), state)

    def state(self) -> State | None:
        """The updates that searches see now, if they are followed."""
        return self._follower.state() if self._follower else None

    async def query(self, vector: Vectors | None, query: Query) -> Found:
        """A search of any other kind: composed here, in a thread, of searches of the shards."""
        loop = asyncio.get_running_loop()
        source = _Shards(self, loop, self.state())
        # In this request's context, which has its deadline.
        answer = partial(copy_context().run, queries.answer, source, vector, query)
        hits = await loop.run_in_executor(self._composers, answer)
        kept = {int(key): source.rows[int(key)] for key in hits.keys.flat}
        version = source.state.version if source.state else None
        return Found(hits.scores, hits.keys, kept, sorted(source.missing), hits.strategies, version)

    async def image(self, item: str) -> bytes | None:
        """The encoded picture of an item; None if there is none. EngineUnavailable if that cannot be told."""
        if not self._table.has_images:
            return None
        key = await self.key_of(self.state(), item)
        if key is None:
            return None
        loop = asyncio.get_running_loop()
        if self._follower and key >= self._manifest.embeddings.rows:
            return await loop.run_in_executor(self._pool, self._follower.image, key)
        rows = await loop.run_in_executor(self._pool, self._table.take, [key], [IMAGE])
        picture: bytes | None = rows[0][IMAGE]
        return picture

    async def missing(self) -> list[str]:
        """The deployments that do not answer a ping within the deadline."""
        parts = [("embedder", self._embedder), *zip(self._names, self._shards, strict=True)]
        answers = await asyncio.gather(*(self._within(part.ping.remote()) for _, part in parts), return_exceptions=True)
        return [name for (name, _), answer in zip(parts, answers, strict=True) if isinstance(answer, BaseException)]

    # -- updates ---------------------------------------------------------------------------------------------

    async def embed_documents(self, texts: Sequence[str]) -> Vectors:
        """Unit vectors `(n, D)` of texts that are to be found."""
        return np.asarray(await self._embed(self._embedder.documents.remote(list(texts))), np.float32)

    async def refresh(self, at_least: int | None = None) -> int:
        """Takes in what others wrote."""
        return await self._in_thread(self._live.refresh, at_least)

    def catch_up(self) -> None:
        """Takes in what others wrote. Raises RayembError."""
        self._live.refresh()

    async def upsert(
        self,
        ids: Sequence[str],
        vectors: Vectors,
        payload: Sequence[Mapping[str, Any]],
        images: Sequence[bytes | None] | None,
    ) -> int:
        """Durable, and found from now on."""
        return await self._in_thread(self._live.upsert, ids, vectors, payload, images)

    async def delete(self, ids: Sequence[str]) -> tuple[int, int]:
        """How many there were, and the version without them."""
        state = self.state()
        keys = await asyncio.gather(*(self.key_of(state, each) for each in dict.fromkeys(ids)))
        return sum(key is not None for key in keys), await self._in_thread(self._live.delete, ids)

    async def items(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        """Id and payload of the items that there are. EngineUnavailable if that cannot be told."""
        state = self.state()
        found = await asyncio.gather(*(self.key_of(state, each) for each in dict.fromkeys(ids)))
        keys = [key for key in found if key is not None]
        rows: dict[int, dict[str, Any]] = {}
        for part, _ in state.parts if state else []:
            rows |= rows_of(part, np.array(keys, np.int64))
        if base := [key for key in keys if key < self._manifest.embeddings.rows]:
            try:
                calls = (self._within(shard.rows.remote(base)) for shard in self._shards)
                for part_rows in await asyncio.gather(*calls):
                    rows |= part_rows
            except (TimeoutError, RayError, RayServeException, BackPressureError) as error:
                raise _no_shard() from error
        return [rows[key] for key in keys]

    def updates(self) -> tuple[int, int]:
        """The version that searches see, and how many wait."""
        return self._live.version, self._live.updates

    @property
    def _live(self) -> Follower:
        assert self._follower is not None  # the gateway has no routes for it otherwise
        return self._follower

    async def _in_thread(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, partial(work, *args))

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

    async def _ask_all(
        self, wanted: Sequence[int], state: State | None, method: str, *args: Any
    ) -> tuple[list[Any], list[str]]:
        """What the `wanted` shards answered, and what is new; the names of the shards that did not.

        Raises QueryError, or EngineUnavailable if none did.
        """
        asked = [number for number in wanted if self._breakers[number].allows()]
        version = (state.version,) if state else ()
        new = self._in_thread(_asked_of, state, method, *args) if state and state.parts else None
        answers = await asyncio.gather(*(self._ask(number, method, *args, *version) for number in asked))
        found = [answer for answer in answers if answer is not None]
        for answer in found:
            if isinstance(answer, QueryError):
                raise answer
        if not found:
            raise EngineUnavailable("no shard of the index answers", fix="try again in some seconds")
        if new is not None:
            found += await new
        answered = {number for number, answer in zip(asked, answers, strict=True) if answer is not None}
        return found, [self._names[number] for number in wanted if number not in answered]

    def _best(self, k: int, found: list[Any], missing: list[str], state: State | None) -> Found:
        scores, keys = merge([answer[0] for answer in found], [answer[1] for answer in found], k)
        rows = {key: row for answer in found for key, row in answer[2].items()}
        kept = {int(key) for key in keys.flat if key >= 0}
        self._remember({key: rows[key] for key in kept if key < self._manifest.embeddings.rows})
        version = state.version if state else None
        return Found(scores, keys, rows, missing, tuple(answer[3] for answer in found), version)

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

    async def key_of(self, state: State | None, item: str) -> int | None:
        """The key of the row with this id, or None. EngineUnavailable if that cannot be told."""
        if state is not None and state.touched(item):
            return state.key(item)
        key = self._known.get(item)
        return key if key is not None else await self._locate(item)

    def vectors_of(self, state: State | None, keys: Sequence[int]) -> Vectors:
        """Vectors of rows, from the table or the updates; blocks."""
        wanted = np.asarray(keys, np.int64)
        found = np.empty((len(wanted), self._manifest.dim), np.float32)
        old = wanted < self._manifest.embeddings.rows
        if old.any():
            found[old] = take_vectors(self._table, wanted[old])
        for shard, _ in state.parts if state else []:
            positions = shard.keys.at(wanted)
            found[positions >= 0] = shard.vectors(positions[positions >= 0])
        return found

    async def _locate(self, item: str) -> int | None:
        calls = (self._within(shard.locate.remote(item)) for shard in self._shards)
        answers = await asyncio.gather(*calls, return_exceptions=True)
        keys = [answer for answer in answers if isinstance(answer, int)]
        if keys:
            return keys[0]
        if any(isinstance(answer, BaseException) for answer in answers):
            # Not a 404: the shard that does not answer may hold it.
            raise _no_shard()
        return None

    def _remember(self, rows: Mapping[int, dict[str, Any]]) -> None:
        for key, row in rows.items():
            self._known[str(row["id"])] = key
        while len(self._known) > _KNOWN_IDS:
            self._known.popitem(last=False)


def _asked_of(state: State, method: str, *args: Any) -> list[ShardAnswer]:
    """What the new rows answer to a method of `ShardServer`."""
    give = with_ids if method == "search_ids" else with_rows
    name = "words" if method == "words" else "answer"
    return [give(shard, getattr(shard, name)(*args, alive)) for shard, alive in state.parts]


def _no_shard() -> EngineUnavailable:
    return EngineUnavailable("a shard of the index does not answer", fix="try again in some seconds")


class _Shards:
    """The shards as a `Source` for one query, in a thread beside the event loop; it remembers what it was told."""

    def __init__(self, engine: SpreadEngine, loop: asyncio.AbstractEventLoop, state: State | None) -> None:
        self._engine, self._loop, self.state = engine, loop, state
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
        return self._hits(self._engine.search_at(self.state, x_ND, k, filter, effort, recall))

    def words(self, text: str, k: int, filter: Filter | None = None) -> Hits:
        return self._hits(self._engine.words_at(self.state, text, k, filter))

    def key(self, row_id: str) -> int | None:
        return self._wait(self._engine.key_of(self.state, row_id))

    def vectors(self, keys: Sequence[int]) -> Vectors:
        return self._engine.vectors_of(self.state, keys)

    def payload(self, keys: Sequence[int]) -> list[dict[str, Any]]:
        return [self.rows[key] for key in keys]

    def _hits(self, call: Coroutine[Any, Any, Found]) -> Hits:
        found = self._wait(call)
        self.rows |= found.rows
        self.missing |= set(found.missing_shards)
        return Hits(found.scores, found.keys, tuple(found.strategies))

    def _wait(self, call: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result()
