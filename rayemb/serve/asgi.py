"""The HTTP face of an engine: a FastAPI app, the same in a test's process and in a Serve replica."""

import inspect
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.routing import APIRoute
from starlette._utils import get_route_path
from starlette.exceptions import HTTPException
from starlette.responses import Response

from rayemb import __version__
from rayemb.index import QueryError
from rayemb.models import ImageError
from rayemb.serve.accesslog import AccessLog
from rayemb.serve.config import ServeConfig
from rayemb.serve.engine import Engine
from rayemb.serve.envelope import Envelope, JsonResponse, error_response, request_id
from rayemb.serve.errors import ApiError, EngineUnavailable
from rayemb.serve.gateway import Gateway
from rayemb.serve.limits import Guard
from rayemb.serve.routes import add_routes
from rayemb.serve.tracing import Tracer
from rayemb.serve.versions.follow import CatalogFollower
from rayemb.serve.versions.paths import Collections
from rayemb.serve.versions.table import Versions

_ABOUT = (
    "Search by text and image. X-Request-Timeout, a header of every request, says how many seconds its answer is worth "
    "waiting for: it lowers the service's own limit, and 504 says that they are over. X-Request-ID names a request in "
    "the log. X-Rayemb-Client names who asks: the same version answers the same client while there are two. Every path "
    "is there for each collection too, under /collections/NAME."
)


def create_app(
    engine: Engine | CatalogFollower,
    config: ServeConfig | None = None,
    *,
    replica: str = "",
    tracer: Tracer | None = None,
) -> FastAPI:
    """The app that answers from `engine`, or from the versions of a catalog that a follower has opened: search,
    embeddings, pictures, health, metrics and the web page.

    `replica`: the name of the Serve replica that it is in, if it is in one; Serve's proxy then sends X-Request-ID.
    `tracer`: default: the one that `config.tracing` asks for. Raises ServeError where keys, log or tracing cannot be
    opened. With `config.grpc` the app listens for gRPC too, from its start to its end, unless Serve's proxies do it for
    the replica; `app.state.grpc_port` is where.
    """
    config = config or ServeConfig()
    follower = engine if isinstance(engine, CatalogFollower) else None
    versions = follower.versions if follower else Versions.of(cast(Engine, engine), config.collection)
    gateway = Gateway(versions, config, replica, tracer, follower)
    # Opened here, not at the first request: what is wrong with them is wrong from the start.
    guard = Guard(config, gateway.metrics)
    log = AccessLog(config.access_log) if config.access_log else None
    app = _empty_app(None if replica or config.grpc is None else partial(_with_grpc, config=config))
    app.add_middleware(
        Envelope,
        config=config,
        metrics=gateway.metrics,
        guard=guard,
        tracer=gateway.tracer,
        log=log,
        send_id_header=not replica,
    )
    app.add_middleware(Collections)
    for kind in (ApiError, HTTPException, QueryError, ImageError, EngineUnavailable):
        app.add_exception_handler(kind, _on_error)
    # With a catalog the columns that filters know change with the versions: the document names none.
    add_routes(app, gateway, config, None if follower else versions.routes[config.collection].live.about)
    app.state.gateway = gateway
    return app


def openapi_document(config: ServeConfig | None = None) -> dict[str, Any]:
    """What /openapi.json says under this config; needs neither model nor index."""
    app = _empty_app()
    # The document knows the routes' names and types; what would answer them is not asked.
    add_routes(app, Gateway.__new__(Gateway), config or ServeConfig(), None)
    return app.openapi()


class _DirectRoute(APIRoute):
    """A route whose endpoint is called with the request, where that is all it takes, and nothing else is done.

    It gives a response that needs no check; FastAPI's way there has two exit stacks and a solver of dependencies.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        names = list(inspect.signature(self.endpoint).parameters)
        if names == ["request"] and inspect.iscoroutinefunction(self.endpoint):
            return cast(Callable[[Request], Coroutine[Any, Any, Response]], self.endpoint)
        return super().get_route_handler()


@asynccontextmanager
async def _with_grpc(app: FastAPI, config: ServeConfig) -> AsyncIterator[None]:
    from rayemb.serve.rpc.server import listening  # gRPC is for who asked for it

    async with listening(app, config) as port:
        app.state.grpc_port = port
        yield


def _empty_app(lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]] | None = None) -> FastAPI:
    # No docs_url: FastAPI's page loads its scripts from another server. /openapi.json has it all.
    app = FastAPI(
        title="rayemb",
        version=__version__,
        description=_ABOUT,
        docs_url=None,
        redoc_url=None,
        default_response_class=JsonResponse,
        lifespan=lifespan,
    )
    app.router.route_class = _DirectRoute
    return app


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
    return error_response(answer, get_route_path(request.scope), request_id(request.scope))
