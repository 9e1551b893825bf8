"""The engine of the `spread` topology: an embedder and one deployment per shard, behind Serve handles."""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from rayemb.data.embeddings import IMAGE
from rayemb.index import (
    Effort,
    Filter,
    IndexMap,
    LiveConfig,
    Manifest,
    Query,
    QueryError,
    load_map,
    merge,
    queries,
)
from rayemb.index.live.follower import Follower, State
from rayemb.index.placement import Router
from rayemb.index.shard import open_embeddings, open_terms, take_vectors
from rayemb.serve.asks import Ask, Told, rows_alive, rows_of, tell
from rayemb.serve.config import Part, ServeConfig
from rayemb.serve.engine import Description, Found, FoundIds, Vectors, describe, reading_table, shard_names
from rayemb.serve.errors import EngineUnavailable
from rayemb.serve.following import Following
from rayemb.serve.hop import Hedge, Hop, Unanswered
from rayemb.serve.limits import remaining
from rayemb.serve.source import ShardSource

A = TypeVar("A")
T = TypeVar("T")
# Ids whose row is known from an answer: their pictures are asked for next.
_KNOWN_IDS = 50_000


class SpreadEngine:
    """Searches shard deployments in parallel, each under a deadline, and says which did not answer.

    A call carries all queries that wait for a part (`rayemb.serve.hop`). `embedder` has `texts`, `documents`, `images`
    and `ping`, each of `shards` has `answer` and `ping`: Serve handles, or anything whose methods' `.remote(...)` can
    be awaited.
    """

    def __init__(
        self, index_uri: str, manifest: Manifest, embedder: Any, shards: Sequence[Any], config: ServeConfig
    ) -> None:
        if len(shards) != len(manifest.shards):
            raise QueryError(f"the index has {len(manifest.shards)} shards and {len(shards)} were deployed")
        self._uri, self._manifest, self._router = index_uri, manifest, Router(index_uri, manifest)
        self._table = open_embeddings(manifest)
        self._description = describe(manifest, self._table)
        self._names = shard_names(manifest)
        self._parts = [("embedder", embedder), *zip(self._names, shards, strict=True)]
        self._deadline_s, self._at_work = config.deadline_s, 0

        def hop(name: str, handle: Any, method: str, weigh: Callable[[Any], int], part: Part) -> Hop[Any, Any]:
            return _hop(name, handle, method, weigh, part, config, lambda: self._at_work)

        self._texts: Hop[list[str], tuple[Vectors, int]] = hop("embedder", embedder, "texts", len, "embedder")
        self._documents: Hop[list[str], tuple[Vectors, int]] = hop("embedder", embedder, "documents", len, "embedder")
        self._images: Hop[list[bytes], Vectors] = hop("embedder", embedder, "images", len, "embedder")
        self._shards: list[Hop[Ask, Any]] = [
            hop(name, shard, "answer", _weight, "shards") for name, shard in zip(self._names, shards, strict=True)
        ]
        # What is new is searched here: it is little, and a hop to a deployment of its own would cost more.
        self._follower: Follower | None = None
        if config.live:
            limits = LiveConfig(max_rows=config.max_updates)
            self._follower = Follower(manifest, self._table, [], limits, lexical=open_terms(index_uri, manifest))
            Following(self, config.follow_s)
        self._known: OrderedDict[str, int] = OrderedDict()
        self._pool = ThreadPoolExecutor(4, thread_name_prefix="rayemb-table")
        self._routers = ThreadPoolExecutor(2, thread_name_prefix="rayemb-routing")
        # Threads that wait for shards, apart from those that read the table.
        self._composers = ThreadPoolExecutor(8, thread_name_prefix="rayemb-queries")

    def describe(self) -> Description:
        """What is served."""
        return self._description

    async def embed_texts(self, texts: Sequence[str]) -> tuple[Vectors, int]:
        """Unit vectors `(n, D)` and the number of tokens read."""
        with self._working():
            return await self._embed(self._texts, list(texts))

    async def embed_images(self, images: Sequence[bytes]) -> Vectors:
        """Unit vectors `(n, D)`. Raises ImageError for a bad one."""
        with self._working():
            return await self._embed(self._images, list(images))

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
        return self._best(k, *await self._ask_all(wanted, Ask("rows", vectors, k, filter, chosen), state), state)

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
        found, missing = await self._ask_all(wanted, Ask("ids", vectors, k, filter, chosen), state)
        scores, keys = merge([told.scores for told in found], [told.keys for told in found], k)
        all_keys = np.concatenate([told.keys.reshape(-1) for told in found])
        order = np.argsort(all_keys, kind="stable")
        at = np.searchsorted(all_keys[order], keys.reshape(-1)).clip(max=max(len(order) - 1, 0))
        ids = pa.concat_arrays([told.ids for told in found])
        ids = ids.take(pa.array(order[at], mask=keys.reshape(-1) < 0))
        return FoundIds(scores, ids, missing, tuple(told.strategy for told in found), state.version if state else None)

    async def words_at(self, state: State | None, text: str, k: int, filter: Filter | None = None) -> Found:
        """The k best by BM25 of the shards that answered in time, with the updates of `state`; the others are named."""
        ask = Ask("words", k=k, filter=filter, text=text)
        return self._best(k, *await self._ask_all(self._router.all, ask, state), state)

    def state(self) -> State | None:
        """The updates that searches see now, if they are followed."""
        return self._follower.state() if self._follower else None

    async def query(self, vector: Vectors | None, query: Query) -> Found:
        """A search of any other kind: composed here, in a thread, of searches of the shards."""
        loop = asyncio.get_running_loop()
        source = ShardSource(self, loop, self.state())
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
        with reading_table():
            if self._follower and key >= self._manifest.embeddings.rows:
                return await self._within(self._in_thread(self._follower.image, key))
            rows = await self._within(self._in_thread(self._table.take, [key], [IMAGE]))
        picture: bytes | None = rows[0][IMAGE]
        return picture

    async def map(self) -> IndexMap | None:
        """The map of the index."""
        return await self._in_thread(load_map, self._uri, self._manifest)

    async def missing(self) -> list[str]:
        """The deployments that do not answer a ping within the deadline."""
        calls = (self._within(part.ping.remote()) for _, part in self._parts)
        answers = await asyncio.gather(*calls, return_exceptions=True)
        return [
            name for (name, _), answer in zip(self._parts, answers, strict=True) if isinstance(answer, BaseException)
        ]

    @contextmanager
    def _working(self) -> Iterator[None]:
        self._at_work += 1
        try:
            yield
        finally:
            self._at_work -= 1

    # -- updates ---------------------------------------------------------------------------------------------

    async def embed_documents(self, texts: Sequence[str]) -> tuple[Vectors, int]:
        """Unit vectors `(n, D)` of texts that are to be found, and the number of tokens read."""
        with self._working():
            return await self._embed(self._documents, list(texts))

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
        if base := tuple(key for key in keys if key < self._manifest.embeddings.rows):
            for part_rows in await self._ask_each(Ask("held", keys=base)):
                rows |= part_rows
        return [rows[key] for key in keys]

    async def count(self) -> int:
        """How many items can be found. EngineUnavailable if that cannot be told."""
        state = self.state()
        ask = Ask("count", updates=state.version if state else None)
        total: int = sum(await self._ask_each(ask)) + sum(rows_alive(*part) for part in (state.parts if state else []))
        return total

    def updates(self) -> tuple[int, int]:
        """The version that searches see, and how many wait."""
        return self._live.version, self._live.updates

    @property
    def _live(self) -> Follower:
        assert self._follower is not None  # the gateway has no routes for it otherwise
        return self._follower

    async def _in_thread(self, work: Callable[..., T], *args: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._pool, partial(work, *args))

    def hedged(self) -> Mapping[str, int]:
        """Calls that were made a second time because they were late, by part."""
        embedder = sum(hop.hedged for hop in (self._texts, self._documents, self._images))
        return {"embedder": embedder, **{name: hop.hedged for name, hop in zip(self._names, self._shards, strict=True)}}

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
        self._routers.shutdown(wait=True)
        self._composers.shutdown(wait=True)

    # -- calls ---------------------------------------------------------------------------------------------

    async def _within(self, call: Awaitable[T]) -> T:
        # A call to a deployment without a live replica waits for ever; it does not raise.
        return await asyncio.wait_for(call, remaining(self._deadline_s))

    async def _embed(self, hop: "Hop[A, T]", request: A) -> T:
        try:
            if hop.allows():
                return await hop(request)
        except Unanswered as error:
            raise EngineUnavailable("the embedder does not answer", fix="try again in some seconds") from error
        raise EngineUnavailable("the embedder does not answer", fix="try again in some seconds")

    async def _holders(self, vectors: Vectors, filter: Filter | None, effort: Effort) -> Sequence[int]:
        """The shards that have what a search looks into; under a filter that may lie anywhere."""
        if filter or not self._router.routes:
            return self._router.all
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._routers, self._router.shards, vectors, effort.nprobe)

    async def _ask_all(self, wanted: Sequence[int], ask: Ask, state: State | None) -> tuple[list[Any], list[str]]:
        """What the `wanted` shards told, and what is new; the names of the shards that did not answer.

        Raises QueryError, or EngineUnavailable if none did.
        """
        asked = [number for number in wanted if self._shards[number].allows()]
        versioned = replace(ask, updates=state.version) if state else ask
        calls = (self._shards[number](versioned) for number in asked)
        with self._working():
            *answers, new = await asyncio.gather(*calls, self._new(state, ask), return_exceptions=True)
        found: list[Any] = []
        answered: set[int] = set()
        for number, answer in zip(asked, answers, strict=True):
            if isinstance(answer, Unanswered):
                continue
            if isinstance(answer, BaseException):
                raise answer
            found.append(answer)
            answered.add(number)
        if not found:
            raise EngineUnavailable("no shard of the index answers", fix="try again in some seconds")
        if isinstance(new, BaseException):
            raise new
        return found + new, [self._names[number] for number in wanted if number not in answered]

    async def _ask_each(self, ask: Ask) -> list[Any]:
        """What every shard told. EngineUnavailable if one did not answer."""
        found, missing = await self._ask_all(self._router.all, ask, None)
        if missing:
            raise _no_shard()
        return found

    async def _new(self, state: State | None, ask: Ask) -> list[Told]:
        """What is new that answers a search."""
        if state is None or not state.parts:
            return []
        return await self._in_thread(lambda: [tell(shard, ask, alive) for shard, alive in state.parts])

    def _best(self, k: int, found: list[Told], missing: list[str], state: State | None) -> Found:
        scores, keys = merge([told.scores for told in found], [told.keys for told in found], k)
        rows = {key: row for told in found for key, row in (told.rows or {}).items()}
        kept = {int(key) for key in keys.flat if key >= 0}
        self._remember({key: rows[key] for key in kept if key < self._manifest.embeddings.rows})
        version = state.version if state else None
        return Found(scores, keys, rows, missing, tuple(told.strategy for told in found), version)

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
            # Not in this thread: storage that is away is tried again and again, for longer than anybody waits.
            with reading_table():
                read = self._pool.submit(take_vectors, self._table, wanted[old])
                found[old] = read.result(remaining(self._deadline_s))
        for shard, _ in state.parts if state else []:
            positions = shard.keys.at(wanted)
            found[positions >= 0] = shard.vectors(positions[positions >= 0])
        return found

    async def _locate(self, item: str) -> int | None:
        asks = (shard(Ask("key", text=item)) for shard in self._shards if shard.allows())
        answers = await asyncio.gather(*asks, return_exceptions=True)
        keys = [answer for answer in answers if isinstance(answer, int)]
        if keys:
            return keys[0]
        if len(answers) < len(self._shards) or any(isinstance(answer, BaseException) for answer in answers):
            # Not a 404: the shard that does not answer may hold it.
            raise _no_shard()
        return None

    def _remember(self, rows: Mapping[int, dict[str, Any]]) -> None:
        for key, row in rows.items():
            self._known[str(row["id"])] = key
        while len(self._known) > _KNOWN_IDS:
            self._known.popitem(last=False)


def _hop(
    name: str,
    handle: Any,
    method: str,
    weigh: Callable[[Any], int],
    part: Part,
    config: ServeConfig,
    at_work: Callable[[], int],
) -> Hop[Any, Any]:
    spread, replicas = config.spread, config.most(part)
    return Hop(
        name,
        # Not the bound method: where the router shares the event loop, that one has to run when it is made.
        lambda items, within_s: getattr(handle, method).remote(items, within_s),
        deadline_s=config.deadline_s,
        most=min(spread.call_queries, config.max_batch) if part == "embedder" else spread.call_queries,
        weigh=weigh,
        # Without batches nothing is gained by waiting.
        abreast=replicas * spread.calls if spread.call_queries > 1 else config.max_ongoing_requests,
        hedge=Hedge(spread.hedge, spread.hedge_floor_s, config.deadline_s),
        spare=replicas > 1,
        at_work=at_work if spread.call_queries > 1 else lambda: 0,
    )


def _weight(ask: Ask) -> int:
    return ask.weight


def _no_shard() -> EngineUnavailable:
    return EngineUnavailable("a shard of the index does not answer", fix="try again in some seconds")
