"""Which path does what, and what /openapi.json says of it."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.responses import Response

from rayemb.serve import api
from rayemb.serve.batch import ARROW, BatchResponse
from rayemb.serve.bodies import BINARY, batch_body, components, embeddings_body, ids_body, items_body, search_body
from rayemb.serve.config import ServeConfig
from rayemb.serve.engine import Description
from rayemb.serve.items import DeleteResponse, GetResponse, Items, UpsertResponse
from rayemb.serve.limits import FREE
from rayemb.serve.maps import MapResponse, Maps
from rayemb.serve.page import page
from rayemb.serve.versions.administration import Administration, add_collection_routes

if TYPE_CHECKING:
    from rayemb.serve.gateway import Gateway

_PROBLEMS = {
    400: "Malformed JSON, form or stream, a header that is wrong, or a filter that does not fit the index",
    401: "No API key, or one that is not known or was revoked",
    403: "The key is for other collections",
    404: "No such item, or it has no picture; no map was made; or no such collection",
    409: "The vectors are of another model; or a change that the catalog, or the gate, refuses",
    413: "A text, an image or the body is too large",
    415: "A content type or a content encoding that is not taken",
    422: "A field is missing or wrong",
    429: "The key may not ask as often, or overloaded: try again after Retry-After",
    500: "Something went wrong here",
    503: "No shard answers, or overloaded: try again after Retry-After",
    504: "No answer within the request's time (X-Request-Timeout)",
}
# What the envelope may answer to any request, whatever is asked for.
_ANY = (400, 401, 403, 413, 415, 429, 500, 503, 504)


def add_routes(app: FastAPI, gateway: "Gateway", config: ServeConfig, about: Description | None) -> None:
    """Adds every route of `gateway` to `app`; `about`: what is served, for the document, if that is known."""
    app.openapi = _whole(app, config, components(about))  # type: ignore[method-assign]

    def add(
        path: str, method: str, endpoint: Any, summary: str, extra: dict[str, Any] | None = None, **options: Any
    ) -> None:
        app.add_api_route(path, endpoint, methods=[method], summary=summary, openapi_extra=extra, **options)

    add(
        "/v1/search",
        "POST",
        gateway.search,
        "Search by text, image, or both",
        {"requestBody": search_body(config, about)},
        response_model=api.SearchResponse,
        responses=_problems(*_ANY, 422),
    )
    batch = {"description": "The hits of each query", "content": {ARROW: {"schema": BINARY}}}
    add(
        "/v1/search/batch",
        "POST",
        gateway.search_batch,
        "Search by many texts, or by vectors of the served model",
        {"requestBody": batch_body(config, about)},
        response_model=BatchResponse,
        responses={200: batch, **_problems(*_ANY, 409, 422)},
    )
    openai_problems = {status: {**each, "model": api.OpenAIErrorResponse} for status, each in _problems(*_ANY).items()}
    openai_problems[404] = {"model": api.OpenAIErrorResponse, "description": "Another model is served here"}
    add(
        "/v1/embeddings",
        "POST",
        gateway.embeddings,
        "Embed texts (OpenAI's schema)",
        {"requestBody": embeddings_body(config, about)},
        response_model=api.EmbeddingsResponse,
        responses=openai_problems,
    )
    problems = _problems(*_ANY)
    add("/v1/index", "GET", gateway.index, "What is served", response_model=api.IndexInfo, responses=problems)
    add(
        "/v1/map",
        "GET",
        Maps(gateway).get,
        "A sample of the items as points in the plane",
        response_model=MapResponse,
        responses={**problems, **_problems(404)},
    )
    if config.live:
        _add_items(add, gateway, config, about)
    pictures = {"description": "The picture", "content": {"image/*": {"schema": BINARY}}}
    add(
        "/v1/items/{item:path}/image",
        "GET",
        gateway.image,
        "The picture of an item",
        responses={200: pictures, **_problems(*_ANY, 404, 422)},
        response_class=Response,
    )
    unready: dict[int | str, dict[str, Any]] = {503: {"model": api.Status, "description": "It cannot answer"}}
    add("/healthz", "GET", gateway.health, "Alive", response_model=api.Status, responses=problems)
    add("/readyz", "GET", gateway.ready, "Ready", response_model=api.Status, responses={**problems, **unready})
    text = {"description": "The metrics", "content": {"text/plain": {"schema": {"type": "string"}}}}
    add(
        "/metrics",
        "GET",
        gateway.prometheus,
        "Prometheus metrics",
        responses={200: text, **problems},
        response_class=Response,
    )
    if config.catalog is not None:
        add_collection_routes(app, add, _problems(*_ANY, 404, 409, 422), Administration(gateway))
    app.add_api_route("/", page, methods=["GET"], include_in_schema=False, response_class=Response)


def _add_items(add: Callable[..., None], gateway: "Gateway", config: ServeConfig, about: Description | None) -> None:
    items, problems = Items(gateway), _problems(*_ANY, 422)
    body, ids = items_body(config, about), ids_body(config)
    add(
        "/v1/items",
        "POST",
        items.upsert,
        "Put items in, or in place of others",
        {"requestBody": body},
        response_model=UpsertResponse,
        responses={**problems, **_problems(409)},
    )
    add(
        "/v1/items/delete",
        "POST",
        items.delete,
        "Take items out",
        {"requestBody": ids},
        response_model=DeleteResponse,
        responses=problems,
    )
    add(
        "/v1/items/get",
        "POST",
        items.get,
        "Items by id",
        {"requestBody": ids},
        response_model=GetResponse,
        responses=problems,
    )


def _whole(app: FastAPI, config: ServeConfig, schemas: dict[str, Any]) -> Any:
    """The app's OpenAPI document, with what its bodies refer to; with keys, one for all but the health checks."""
    plain = app.openapi

    def document() -> dict[str, Any]:
        found = plain()
        found["components"]["schemas"] |= schemas
        if config.keys:
            key = {"type": "http", "scheme": "bearer", "description": "an API key"}
            found["components"]["securitySchemes"] = {"key": key}
            for path, operations in found["paths"].items():
                for operation in operations.values():
                    operation["security"] = [] if path in FREE else [{"key": []}]
        return found

    return document


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {status: {"model": api.ErrorResponse, "description": _PROBLEMS[status]} for status in statuses}
