"""What the routes of the service do."""

import asyncio
import base64
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from urllib.parse import quote

import numpy as np
from fastapi import Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from rayemb.index import IndexArtefactError, Query, QueryError, Rerank, Reranker
from rayemb.models import ImageError
from rayemb.serve import api
from rayemb.serve.batch import batch_query, names_model, with_payload, without_payload
from rayemb.serve.config import ServeConfig
from rayemb.serve.engine import Description, Engine, Found, FoundIds, Vectors
from rayemb.serve.envelope import JsonResponse, dumps, request_id
from rayemb.serve.errors import ApiError, ModelMismatchError
from rayemb.serve.limits import is_call
from rayemb.serve.metrics import Metrics
from rayemb.serve.page import sniff
from rayemb.serve.parse import Search, embeddings_request, search_query
from rayemb.serve.rpc import messages
from rayemb.serve.tracing import Tracer, open_tracer
from rayemb.serve.versions.follow import CatalogFollower
from rayemb.serve.versions.shadow import Shadows
from rayemb.serve.versions.table import Served, Versions
from rayemb.serve.watch.watch import Watch
from rayemb.storage import StorageError, sha256_bytes

logger = logging.getLogger(__name__)

# Header that names who asks, so that a canary's answers do not come and go.
CLIENT = "x-rayemb-client"


class Gateway:
    """What the routes do; one for each app."""

    def __init__(
        self,
        versions: Versions,
        config: ServeConfig,
        replica: str,
        tracer: Tracer | None,
        follower: CatalogFollower | None,
    ) -> None:
        self.versions, self.config, self.follower = versions, config, follower
        self.metrics = Metrics(replica, live=config.live)
        if follower:
            follower.start(self.metrics)
        else:
            self.metrics.serves(versions)
        self.tracer = tracer or open_tracer(config.tracing)
        self.watch = Watch(config.watch, self.metrics)
        self.shadows = Shadows(versions, self.metrics, lambda: self._waiting > 0 or self._places.locked())
        self._places = asyncio.Semaphore(config.max_ongoing_requests)
        self._waiting = 0
        self._reranker: Reranker | None = None
        if config.reranker:
            from rayemb.mining import CrossEncoder  # with Ray Data: not for gateways without one

            self._reranker = CrossEncoder(config.reranker)

    async def search(self, request: Request) -> Response:
        """The items closest to a text, an image, the mean of both, or examples."""
        started = time.perf_counter()
        with self.taken(request) as served:
            query = await search_query(request, self.config, served.about)
            async with self.place():
                await self._see(served.engine, query.at_least)
                async with self.stage("embed", 1) as embed:
                    vector = await self._vector(served.engine, query)
                async with self.stage("search", 1) as search:
                    found = await self._found(served.engine, vector, self._reranked(query))
            async with self.stage("encode", 1):
                hits = self._hits(served.about, found, request.scope.get("root_path", ""))
                self.metrics.found(1, len(hits), found.missing_shards)
                total = time.perf_counter() - started
                about = self._about(request, served, found, embed, search, total)
                answer = _written(request, {"hits": hits, **about})
            self._beside(served, query, vector, found, embed.seconds + search.seconds)
            return answer

    async def search_batch(self, request: Request) -> Response:
        """The items closest to each of many queries, as arrays."""
        try:
            return await self._search_batch(request)
        except ModelMismatchError as error:
            # While two versions answer, vectors go to the one that they are of.
            return await self._search_batch(request, partial(_is_of, error.model))

    async def _search_batch(self, request: Request, wanted: Callable[[Description], bool] | None = None) -> Response:
        started = time.perf_counter()
        with self.taken(request, wanted=wanted) as served:
            batch = await batch_query(request, self.config, served.about)
            async with self.place():
                await self._see(served.engine, batch.at_least)
                vectors = batch.vectors
                async with self.stage("embed", batch.count) as embed:
                    if vectors is None:
                        vectors, _ = await served.engine.embed_texts(batch.texts)
                async with self.stage("search", batch.count) as search:
                    ask = served.engine.search if batch.payload else served.engine.search_ids
                    found = await ask(vectors, batch.k, batch.filter, effort=batch.effort, recall=batch.recall)
            async with self.stage("encode", batch.count):
                answer = with_payload(found) if isinstance(found, Found) else without_payload(found)
                self.metrics.found(batch.count, int(answer.counts.sum()), found.missing_shards)
                total = time.perf_counter() - started
                return answer.response(self._about(request, served, found, embed, search, total), batch.form)

    async def embeddings(self, request: Request) -> Response:
        """Texts as unit vectors of the served model."""
        body, texts = await embeddings_request(request, self.config)
        with self.taken(request, timed=False, wanted=partial(_is_of, body.model)) as served:
            return await self._embedded(request, served, body, texts)

    async def _embedded(
        self, request: Request, served: Served, body: api.EmbeddingsRequest, texts: list[str]
    ) -> Response:
        digest, dim = served.about.model_digest, served.about.dim
        if body.model != "rayemb" and not names_model(body.model, digest):
            raise ApiError(
                404,
                "model_not_found",
                f'model {body.model!r} is not served here; "rayemb" or {digest} is',
                "model",
            )
        if body.dimensions is not None and body.dimensions != dim:
            raise ApiError(
                400,
                "invalid_request",
                f"this model's vectors have {dim} dimensions, not {body.dimensions}",
                "dimensions",
            )
        async with self.place(), self.stage("embed", len(texts)):
            embed = served.engine.embed_documents if body.input_type == "document" else served.engine.embed_texts
            vectors, tokens = await embed(texts)
        if is_call(request.scope):
            return messages.written(
                messages.EmbedResponse(vectors=messages.floats(vectors), dim=dim, model_digest=digest, tokens=tokens)
            )
        as_text = body.encoding_format == "base64"
        data = [
            {"object": "embedding", "index": index, "embedding": _base64(vector) if as_text else vector}
            for index, vector in enumerate(np.ascontiguousarray(vectors, np.float32))
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JsonResponse({"object": "list", "data": data, "model": digest, "usage": usage})

    async def index(self, request: Request) -> Response:
        """What is served, and the limits that hold."""
        config = self.config
        with self.taken(request, timed=False) as served:
            about = vars(served.about) | {"collection": served.collection, "version": served.version}
            if config.live:
                about["rows"] = await served.engine.count()
                _, about["updates_waiting"] = served.engine.updates()
        info = api.IndexInfo(
            **about,
            topology=config.topology,
            max_k=config.max_k,
            max_text_chars=config.max_text_chars,
            max_image_bytes=config.image.max_bytes,
            max_batch=config.max_batch,
            max_queries=config.max_queries,
            live=config.live,
        )
        return JsonResponse(info.model_dump(mode="json"))

    async def image(self, item: str, request: Request) -> Response:
        """The picture that an item was embedded from."""
        # Of the version that found it, while that is open: another may have the id for something else.
        found_by = request.query_params.get("v")
        with self.taken(request, timed=False, wanted=lambda about: about.index_version == found_by) as served:
            async with self.place():
                data = await served.engine.image(item)
        if data is None:
            raise ApiError(404, "not_found", "no item with this id has a picture", "id")
        # Pictures change with the index version, which is in the URL that hits carry, and with live updates.
        tag = f'"{sha256_bytes(data)[:16]}"'
        headers = {"Cache-Control": f"private, {'no-cache' if self.config.live else 'max-age=3600'}", "ETag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        # Pictures come from a corpus that nobody vetted: never anything a browser would run.
        headers["Content-Security-Policy"] = "default-src 'none'; sandbox"
        return Response(data, media_type=sniff(data), headers=headers)

    async def ready(self) -> Response:
        """Whether there is anybody to answer: 503 if not."""
        with self.versions.take() as served:
            missing = await served.engine.missing()
            parts = {"embedder", *(shard["name"] for shard in served.about.shards)}
        # Without an embedder, or without any shard, nothing can be answered: send no traffic here.
        dead = "embedder" in missing or len(missing) >= len(parts) - 1
        body = {"status": "degraded" if missing else "ok", "missing_shards": missing}
        return JsonResponse(body, 503 if dead and missing else 200)

    def close(self) -> None:
        """Ends what the gateway does beside answering; the versions are their opener's."""
        self.watch.close()

    async def health(self) -> Response:
        """Whether the process lives."""
        return JsonResponse({"status": "ok", "missing_shards": []})

    async def prometheus(self) -> Response:
        """Metrics in Prometheus' text format."""
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _see(self, engine: Engine, at_least: int | None) -> None:
        """Waits until searches here see that version of the updates. Raises ApiError."""
        if at_least is None:
            return
        if not self.config.live:
            raise ApiError(422, "invalid_request", "no updates are served here", "at_least")
        try:
            await engine.refresh(at_least)
        except QueryError as error:
            raise ApiError(422, "invalid_request", error.what, "at_least") from error
        except (StorageError, IndexArtefactError) as error:
            raise ApiError(
                503, "storage_unavailable", "the updates cannot be read now", headers={"Retry-After": "1"}
            ) from error

    # -- parts -----------------------------------------------------------------------------------------------

    @contextmanager
    def taken(
        self,
        request: Request,
        *,
        timed: bool = True,
        wanted: Callable[[Description], bool] | None = None,
        live: bool = False,
    ) -> Iterator[Served]:
        """The version that answers a request, to its end; `timed`: its time and failures count for the version."""
        state, started = request.scope.get("state", {}), time.perf_counter()
        client = request.headers.get(CLIENT) or state.get("key", "")
        with self.versions.take(state.get("collection"), client, wanted, live=live) as served:
            try:
                yield served
            except (ApiError, HTTPException, QueryError, ImageError):
                raise  # the request's fault
            except Exception:
                self.metrics.failures.labels(served.collection, served.version).inc()
                raise
            if timed:
                self.metrics.versions.labels(served.collection, served.version).observe(time.perf_counter() - started)

    def _beside(self, served: Served, query: Search, vector: Vectors | None, found: Found, seconds: float) -> None:
        """What is done beside an answer that is ready: the shadow is asked, the watch may take a sample."""

        async def ask(other: Served) -> Found:
            return await self._found(other.engine, await self._vector(other.engine, query), self._reranked(query))

        self.shadows.offer(served, found, seconds, ask)
        self.watch.offer(served, vector, query.wanted, found)

    async def _found(self, engine: Engine, vector: Vectors | None, wanted: Query) -> Found:
        if vector is None or not wanted.plain:
            return await engine.query(None if vector is None else vector[0], wanted)
        return await engine.search(vector, wanted.k, wanted.filter, effort=wanted.effort, recall=wanted.recall)

    def _reranked(self, query: Search) -> Query:
        if query.rerank is None or self._reranker is None:
            return query.wanted
        rerank = Rerank(query.text or "", self.config.rerank_column, query.rerank, self._reranker)
        return replace(query.wanted, rerank=rerank)

    async def _vector(self, engine: Engine, query: Search) -> Vectors | None:
        """The query as one unit vector `(1, D)`: of its text, its image, or the normalised mean of both; None if it
        has neither.
        """
        parts: list[Vectors] = []
        calls: list[Any] = []
        if query.text is not None:
            calls.append(engine.embed_texts([query.text]))
        if query.image is not None:
            calls.append(engine.embed_images([query.image]))
        for result in await asyncio.gather(*calls):
            parts.append(result[0] if isinstance(result, tuple) else result)
        if len(parts) < 2:
            return parts[0] if parts else None
        mean = (parts[0] + parts[1]) / 2
        norm = float(np.linalg.norm(mean))
        if norm < 1e-6:
            raise ApiError(422, "invalid_request", "text and image cancel each other out", "text, image")
        return np.asarray(mean / norm, np.float32)

    def _hits(self, about: Description, found: Found, root: str) -> list[dict[str, Any]]:
        hits = []
        version = about.index_version
        for score, key in zip(found.scores[0].tolist(), found.keys[0].tolist(), strict=True):
            if key < 0:
                continue
            payload = dict(found.rows[key])
            item = str(payload.pop("id"))
            url = f"{root}/v1/items/{quote(item, safe='')}/image?v={version}" if about.has_images else None
            hits.append({"id": item, "score": score, "payload": payload, "image_url": url})
        return hits

    def _about(
        self,
        request: Request,
        served: Served,
        found: Found | FoundIds,
        embed: "_Stage",
        search: "_Stage",
        total_s: float,
    ) -> dict[str, Any]:
        """What every answer to a search says beside its hits."""
        timings = {"embed": embed.seconds, "search": search.seconds, "total": total_s}
        return {
            "collection": served.collection,
            "version": served.version,
            "index_version": found.index_version or served.about.index_version,
            "model_digest": served.about.model_digest,
            "partial": bool(found.missing_shards),
            "missing_shards": found.missing_shards,
            "strategies": sorted(set(found.strategies)),
            **({} if found.updates is None else {"updates": found.updates}),
            "timings_ms": {stage: round(seconds * 1000, 3) for stage, seconds in timings.items()},
            "request_id": request_id(request.scope),
        }

    def stage(self, name: str, queries: int) -> "_Stage":
        """Times what is done in it."""
        return _Stage(self, name, queries)

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """A place among the requests worked on; refused at once if too many wait already.

        Here and not only in Serve's queue: the refusal has our JSON, and health checks still get through.
        """
        if self._places.locked() and self._waiting >= self.config.max_queued_requests:
            self.metrics.refused.labels("overloaded").inc()
            raise ApiError(
                self.config.overload_status,
                "overloaded",
                "too many requests wait already: try again",
                headers={"Retry-After": str(self.config.retry_after_s)},
            )
        self._waiting += 1
        self.metrics.waiting.inc()
        try:
            async with self.stage("wait", 1):
                await self._places.acquire()
        finally:
            self._waiting -= 1
            self.metrics.waiting.dec()
        self.metrics.in_progress.inc()
        try:
            yield
        finally:
            self.metrics.in_progress.dec()
            self._places.release()


class _Stage:
    """Times a stage, for the metrics and in a span; `seconds` afterwards."""

    def __init__(self, gateway: Gateway, name: str, queries: int) -> None:
        self._timer = gateway.metrics.stages[name]
        self._span = gateway.tracer.span(name, {"rayemb.queries": queries})
        self.seconds = 0.0

    async def __aenter__(self) -> "_Stage":
        self._span.__enter__()
        self._begin = time.perf_counter()
        return self

    async def __aexit__(self, *problem: Any) -> None:
        self.seconds = time.perf_counter() - self._begin
        self._timer.observe(self.seconds)
        self._span.__exit__(*problem)


def _written(request: Request, document: dict[str, Any]) -> Response:
    """The answer to a search of one query, as it was asked: JSON, or a message."""
    if not is_call(request.scope):
        return JsonResponse(document)
    hits = [{**hit, "payload": dumps(hit["payload"]).decode()} for hit in document["hits"]]
    return messages.written(messages.SearchResponse(**{**document, "hits": hits}))


def _is_of(model: str, about: Description) -> bool:
    return names_model(model, about.model_digest)


def _base64(vector: Vectors) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
