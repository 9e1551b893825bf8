"""The HTTP face of an engine: a FastAPI app, the same in a test's process and in a Serve replica."""

import asyncio
import base64
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any
from urllib.parse import quote

import numpy as np
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from rayemb import __version__
from rayemb.index import Query, QueryError, Rerank, Reranker
from rayemb.index.filters import filter_schemas
from rayemb.models import ImageError
from rayemb.serve import api
from rayemb.serve.config import ServeConfig
from rayemb.serve.engine import Description, Engine, Found, Vectors
from rayemb.serve.envelope import Envelope, JsonResponse, error_response, request_id
from rayemb.serve.errors import ApiError, EngineUnavailable
from rayemb.serve.metrics import Metrics
from rayemb.serve.page import page, sniff
from rayemb.serve.parse import Search, embeddings_request, search_query

logger = logging.getLogger(__name__)

_LEAST_DIGEST = 12
_REF = "#/components/schemas/{model}"


def create_app(engine: Engine, config: ServeConfig | None = None, *, send_id_header: bool = True) -> FastAPI:
    """The app that answers from `engine`: search, embeddings, pictures, health, metrics and the web page.

    `send_id_header`: whether the app itself sends X-Request-ID; off behind Serve's proxy, which does.
    """
    config = config or ServeConfig()
    description = engine.describe()
    gateway = _Gateway(engine, description, config)
    # No docs_url: FastAPI's page loads its scripts from another server. /openapi.json has it all.
    app = FastAPI(
        title="rayemb",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        default_response_class=JsonResponse,
    )
    app.add_middleware(
        Envelope, metrics=gateway.metrics, max_body_bytes=config.max_body_bytes, send_id_header=send_id_header
    )
    for kind in (ApiError, HTTPException, QueryError, ImageError, EngineUnavailable):
        app.add_exception_handler(kind, _on_error)
    _add_routes(app, gateway, config)
    _document(app)
    return app


def _document(app: FastAPI) -> None:
    """Adds what `requestBody` of a search refers to: FastAPI knows only the models that it validates itself."""
    described = app.openapi

    def openapi() -> dict[str, Any]:
        document = described()
        schemas = api.SearchRequest.model_json_schema(ref_template=_REF)["$defs"]
        document["components"]["schemas"] |= filter_schemas() | schemas
        return document

    app.openapi = openapi  # type: ignore[method-assign]


class _Gateway:
    """What the routes do; one for each app."""

    def __init__(self, engine: Engine, description: Description, config: ServeConfig) -> None:
        self.engine, self.description, self.config = engine, description, config
        self.metrics = Metrics(description.index_version, description.model_digest, description.rows)
        self._places = asyncio.Semaphore(config.max_ongoing_requests)
        self._waiting = 0
        self._reranker: Reranker | None = None
        if config.reranker:
            from rayemb.mining import CrossEncoder  # with Ray Data: not for gateways without one

            self._reranker = CrossEncoder(config.reranker)

    async def search(self, request: Request) -> Response:
        started = time.perf_counter()
        query = await search_query(request, self.config, self.description)
        async with self._place():
            begin = time.perf_counter()
            vector = await self._vector(query)
            embedded = time.perf_counter()
            wanted = self._reranked(query)
            if vector is not None and wanted.plain:
                found = await self.engine.search(
                    vector, wanted.k, wanted.filter, effort=wanted.effort, recall=wanted.recall
                )
            else:
                found = await self.engine.query(None if vector is None else vector[0], wanted)
            searched = time.perf_counter()
        hits = self._hits(found, request.scope.get("root_path", ""))
        embed_s, search_s = embedded - begin, searched - embedded
        self.metrics.seconds.labels("embed").observe(embed_s)
        self.metrics.seconds.labels("search").observe(search_s)
        self.metrics.hits.observe(len(hits))
        if found.missing_shards:
            self.metrics.partial.inc()
        timings = {"embed": embed_s, "search": search_s, "total": time.perf_counter() - started}
        return JsonResponse(
            {
                "hits": hits,
                "index_version": self.description.index_version,
                "model_digest": self.description.model_digest,
                "partial": bool(found.missing_shards),
                "missing_shards": found.missing_shards,
                "strategies": sorted(set(found.strategies)),
                "timings_ms": {stage: round(seconds * 1000, 3) for stage, seconds in timings.items()},
                "request_id": request_id(request.scope),
            }
        )

    async def embeddings(self, request: Request) -> Response:
        body, texts = await embeddings_request(request, self.config)
        digest, dim = self.description.model_digest, self.description.dim
        if body.model != "rayemb" and not (len(body.model) >= _LEAST_DIGEST and digest.startswith(body.model)):
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
        async with self._place():
            begin = time.perf_counter()
            vectors, tokens = await self.engine.embed_texts(texts)
            self.metrics.seconds.labels("embed").observe(time.perf_counter() - begin)
        as_text = body.encoding_format == "base64"
        data = [
            {"object": "embedding", "index": index, "embedding": _base64(vector) if as_text else vector}
            for index, vector in enumerate(np.ascontiguousarray(vectors, np.float32))
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return JsonResponse({"object": "list", "data": data, "model": digest, "usage": usage})

    async def index(self) -> Response:
        about, config = self.description, self.config
        info = api.IndexInfo(
            **vars(about),
            topology=config.topology,
            max_k=config.max_k,
            max_text_chars=config.max_text_chars,
            max_image_bytes=config.image.max_bytes,
            max_batch=config.max_batch,
        )
        return JsonResponse(info.model_dump(mode="json"))

    async def image(self, item: str, request: Request) -> Response:
        async with self._place():
            data = await self.engine.image(item)
        if data is None:
            raise ApiError(404, "not_found", "no item with this id has a picture", "id")
        # Ids stay, pictures change only with the index version, which is in the URL that hits carry.
        tag = f'"{self.description.index_version}-{len(data)}"'
        headers = {"Cache-Control": "private, max-age=3600", "ETag": tag}
        if request.headers.get("if-none-match") == tag:
            return Response(status_code=304, headers=headers)
        # Pictures come from a corpus that nobody vetted: never anything a browser would run.
        headers["Content-Security-Policy"] = "default-src 'none'; sandbox"
        return Response(data, media_type=sniff(data), headers=headers)

    async def ready(self) -> Response:
        missing = await self.engine.missing()
        parts = {"embedder", *(shard["name"] for shard in self.description.shards)}
        # Without an embedder, or without any shard, nothing can be answered: send no traffic here.
        dead = "embedder" in missing or len(missing) >= len(parts) - 1
        body = {"status": "degraded" if missing else "ok", "missing_shards": missing}
        return JsonResponse(body, 503 if dead and missing else 200)

    # -- parts -----------------------------------------------------------------------------------------------

    def _reranked(self, query: Search) -> Query:
        if query.rerank is None or self._reranker is None:
            return query.wanted
        rerank = Rerank(query.text or "", self.config.rerank_column, query.rerank, self._reranker)
        return replace(query.wanted, rerank=rerank)

    async def _vector(self, query: Search) -> Vectors | None:
        """The query as one unit vector `(1, D)`: of its text, its image, or the normalised mean of both; None if it
        has neither.
        """
        parts: list[Vectors] = []
        calls: list[Any] = []
        if query.text is not None:
            calls.append(self.engine.embed_texts([query.text]))
        if query.image is not None:
            calls.append(self.engine.embed_images([query.image]))
        for result in await asyncio.gather(*calls):
            parts.append(result[0] if isinstance(result, tuple) else result)
        if len(parts) < 2:
            return parts[0] if parts else None
        mean = (parts[0] + parts[1]) / 2
        norm = float(np.linalg.norm(mean))
        if norm < 1e-6:
            raise ApiError(422, "invalid_request", "text and image cancel each other out", "text, image")
        return np.asarray(mean / norm, np.float32)

    def _hits(self, found: Found, root: str) -> list[dict[str, Any]]:
        hits = []
        version = self.description.index_version
        for score, key in zip(found.scores[0].tolist(), found.keys[0].tolist(), strict=True):
            if key < 0:
                continue
            payload = dict(found.rows[key])
            item = str(payload.pop("id"))
            url = f"{root}/v1/items/{quote(item, safe='')}/image?v={version}" if self.description.has_images else None
            hits.append({"id": item, "score": score, "payload": payload, "image_url": url})
        return hits

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        """A place among the requests worked on; refused at once if too many wait already.

        Here and not only in Serve's queue: the refusal has our JSON, and health checks still get through.
        """
        if self._places.locked() and self._waiting >= self.config.max_queued_requests:
            self.metrics.refused.inc()
            raise ApiError(
                self.config.overload_status,
                "overloaded",
                "too many requests wait already: try again",
                headers={"Retry-After": str(self.config.retry_after_s)},
            )
        self._waiting += 1
        self.metrics.waiting.inc()
        try:
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


def _base64(vector: Vectors) -> str:
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


async def _on_error(request: Request, error: Exception) -> Response:
    if isinstance(error, ApiError):
        answer = error
    elif isinstance(error, HTTPException):
        kinds = {404: "not_found", 405: "method_not_allowed"}
        answer = ApiError(
            error.status_code,
            kinds.get(error.status_code, "http_error"),
            f"{request.method} {request.url.path[:200]}: {error.detail}",
            headers=dict(error.headers or {}),
        )
    elif isinstance(error, ImageError):
        status = 413 if error.reason == "too_large" else 422
        answer = ApiError(status, "too_large" if status == 413 else "invalid_image", error.what, "image")
    elif isinstance(error, QueryError):
        fix = f"; {error.fix}" if error.fix else ""
        answer = ApiError(400, "invalid_query", f"{error.what}{fix}", error.where or None)
    else:
        headers = {"Retry-After": "1"}
        answer = ApiError(503, "unavailable", str(error), headers=headers)
    return error_response(answer, request.url.path, request_id(request.scope))


def _add_routes(app: FastAPI, gateway: _Gateway, config: ServeConfig) -> None:
    problems: dict[int | str, dict[str, Any]] = {
        status: {"model": api.ErrorResponse, "description": text} for status, text in _PROBLEMS.items()
    }
    openai_problems = {**{s: {**p, "model": api.OpenAIErrorResponse} for s, p in problems.items() if s != 422}}
    openai_problems[404] = {"model": api.OpenAIErrorResponse, "description": "Another model is served here"}
    busy: dict[int | str, dict[str, Any]] = {
        config.overload_status: problems[config.overload_status],
        503: problems[503],
    }
    missing: dict[int | str, dict[str, Any]] = {
        404: {"model": api.ErrorResponse, "description": "No such item, or it has no picture"},
        422: problems[422],  # else FastAPI documents its own shape
    }
    pictures = {
        "description": "The picture",
        "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}},
    }

    app.add_api_route(
        "/v1/search",
        gateway.search,
        methods=["POST"],
        summary="Search by text, image, or both",
        response_model=api.SearchResponse,
        responses=problems,
        openapi_extra={"requestBody": _search_body(config)},
    )
    app.add_api_route(
        "/v1/embeddings",
        gateway.embeddings,
        methods=["POST"],
        summary="Embed texts (OpenAI's schema)",
        response_model=api.EmbeddingsResponse,
        responses=openai_problems,
        openapi_extra={"requestBody": _json_body(api.EmbeddingsRequest.model_json_schema())},
    )
    app.add_api_route(
        "/v1/index", gateway.index, methods=["GET"], summary="What is served", response_model=api.IndexInfo
    )
    app.add_api_route(
        "/v1/items/{item:path}/image",
        gateway.image,
        methods=["GET"],
        summary="The picture of an item",
        responses={200: pictures, **missing, **busy},
        response_class=Response,
    )

    async def healthz() -> Response:
        return JsonResponse({"status": "ok", "missing_shards": []})

    async def metrics() -> Response:
        return Response(gateway.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    unready: dict[int | str, dict[str, Any]] = {503: {"model": api.Status, "description": "It cannot answer"}}
    app.add_api_route("/healthz", healthz, methods=["GET"], summary="Alive", response_model=api.Status)
    app.add_api_route(
        "/readyz",
        gateway.ready,
        methods=["GET"],
        summary="Ready",
        response_model=api.Status,
        responses=unready,
    )
    app.add_api_route("/metrics", metrics, methods=["GET"], summary="Prometheus metrics", response_class=Response)
    app.add_api_route("/", page, methods=["GET"], include_in_schema=False, response_class=Response)


_PROBLEMS = {
    400: "Malformed JSON or form, or a filter that does not fit the index",
    413: "A text, an image or the body is too large",
    415: "A content type that is not taken",
    422: "A field is missing or wrong",
    429: "Overloaded: try again after Retry-After",
    500: "Something went wrong here",
    503: "No shard answers, or overloaded: try again after Retry-After",
}


def _search_body(config: ServeConfig) -> dict[str, Any]:
    schema = api.SearchRequest.model_json_schema(ref_template=_REF)
    del schema["$defs"]
    schema["properties"]["filter"]["anyOf"][0] = {"$ref": _REF.format(model="Filter")}
    schema["properties"]["k"]["maximum"] = config.max_k
    form = {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "text": {"type": "string", "description": "what to look for, in words"},
            "image": {"type": "string", "format": "binary", "description": "an encoded picture"},
            "k": {"type": "integer", "minimum": 1, "maximum": config.max_k, "default": 10},
            "filter": {
                "type": "string",
                "description": 'the filter as JSON, such as {"source": "openmoji"}',
            },
        },
    }
    body = _json_body(schema)
    body["content"]["multipart/form-data"] = {"schema": form}
    return body


def _json_body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"required": True, "content": {"application/json": {"schema": schema}}}
