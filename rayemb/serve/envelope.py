"""What surrounds every request: its id, key, deadline, body, its counters, an answer if all else fails."""

import asyncio
import contextlib
import logging
import re
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
from starlette._utils import get_route_path
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayemb.serve.accesslog import AccessLog
from rayemb.serve.config import ServeConfig
from rayemb.serve.errors import ApiError
from rayemb.serve.limits import Bodies, Guard, header, is_call, set_deadline, timeout_of
from rayemb.serve.metrics import Metrics
from rayemb.serve.tracing import Tracer

logger = logging.getLogger(__name__)

OPENAI_ROUTES = ("/v1/embeddings",)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# How long the body of a refused request is taken and dropped, in s: whoever sends slower sees a lost connection.
_DISCARD_S = 5.0
_SECURITY = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class JsonResponse(JSONResponse):
    """JSON through orjson; numpy and dates included, bytes left out."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return dumps(content)


def dumps(content: Any) -> bytes:
    """JSON of whatever a payload column may hold."""
    return orjson.dumps(content, default=_plain, option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_NON_STR_KEYS)


def _plain(value: Any) -> Any:
    # Whatever a payload column may hold must not turn an answer into an error.
    if isinstance(value, bytes):
        return f"<{len(value)} bytes>"
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return str(value)


def error_response(error: ApiError, path: str, request_id: str) -> JsonResponse:
    """The one JSON shape of errors; on OpenAI's routes with OpenAI's names and statuses."""
    if path in OPENAI_ROUTES:
        # Their clients know 400 for whatever is wrong with a request.
        status = 400 if error.status == 422 else error.status
        kind = "invalid_request_error" if status < 500 else "server_error"
        body: Mapping[str, Any] = {
            "message": error.message,
            "type": kind,
            "param": error.field,
            "code": error.kind,
            "request_id": request_id,
        }
        return JsonResponse({"error": body}, status, headers=error.headers)
    body = {"type": error.kind, "message": error.message, "field": error.field, "request_id": request_id}
    return JsonResponse({"error": body}, error.status, headers=error.headers)


def request_id(scope: Scope) -> str:
    """The id of the request in `scope`, as the envelope set it."""
    found: str = scope.get("state", {}).get("request_id", "")
    return found


class Envelope:
    """Middleware: id, key, deadline and body limit before anything is done; counters, a line in the log, a last answer.

    Plain ASGI, because starlette's BaseHTTPMiddleware buffers and breaks on clients that leave.
    `send_id_header`: off behind Serve's proxy, which adds X-Request-ID itself.
    """

    def __init__(
        self,
        app: ASGIApp,
        config: ServeConfig,
        metrics: Metrics,
        guard: Guard,
        tracer: Tracer,
        log: AccessLog | None,
        send_id_header: bool,
    ) -> None:
        self._app, self._metrics, self._guard, self._tracer, self._log = app, metrics, guard, tracer, log
        self._send_id_header, self._most_s = send_id_header, config.request_timeout_s
        self._bodies = Bodies(config, metrics)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The app's answer to one request, within the envelope."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        call = _Call(_id_of(scope), time.perf_counter())
        scope.setdefault("state", {})["request_id"] = call.name

        async def wrapped(message: Message) -> None:
            if message["type"] == "http.response.start":
                call.status = message["status"]
                headers = [(key.lower().encode(), value.encode()) for key, value in _SECURITY.items()]
                if self._send_id_header:
                    headers.append((b"x-request-id", call.name.encode()))
                message = {**message, "headers": [*message.get("headers", []), *headers]}
            else:
                call.sent += len(message.get("body", b""))
            await send(message)

        try:
            await self._answer(scope, receive, wrapped, call)
        except ApiError as error:
            if call.status:
                raise  # half an answer is out: cut the connection rather than end it well
            await error_response(error, get_route_path(scope), call.name)(scope, receive, wrapped)
        except Exception:
            logger.exception("request %s failed: %s %s", call.name, scope["method"], scope["path"])
            if call.status:
                raise
            oops = ApiError(500, "internal", "something went wrong here; the log has it under this request_id")
            await error_response(oops, get_route_path(scope), call.name)(scope, receive, wrapped)
        finally:
            self._count(scope, call)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, call: "_Call") -> None:
        try:
            key = self._guard.admit(scope)
            call.key = key.name if key else ""
            scope["state"].update(key=call.key, admin=bool(key and key.admin), opens=key and key.collections)
            seconds = timeout_of(scope, self._most_s)
        except ApiError:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_DISCARD_S):
                    await self._bodies.discard(scope, receive)
            raise
        set_deadline(seconds)
        body: bytes | None = None
        # The span's name has no path: that has ids. What it was comes with the status.
        with self._tracer.request(_method(scope), scope["headers"]) as span:
            try:
                async with asyncio.timeout(seconds) as timer:
                    body = await self._bodies.read(scope, receive, key)
                    if body is None:
                        return
                    call.read = len(body)
                    await self._app(scope, _replay(body, receive), send)
            except TimeoutError:
                if not timer.expired():
                    raise
                self._metrics.refused.labels("deadline").inc()
                raise ApiError(504, "deadline_exceeded", f"no answer within {seconds:g} s") from None
            finally:
                if body is not None:
                    self._bodies.release(body)
                if span is not None:
                    span.set_attributes({"http.route": _route(scope), "http.response.status_code": call.status})
                    span.set_attributes({"rayemb.request_id": call.name, "rayemb.key": call.key})

    def _count(self, scope: Scope, call: "_Call") -> None:
        route, method, seconds = _route(scope), _method(scope), time.perf_counter() - call.started
        metrics = self._metrics
        metrics.requests.labels(route, method, str(call.status)).inc()
        metrics.stages["request"].observe(seconds)
        metrics.sent.observe(call.sent)
        if call.read:
            metrics.read.observe(call.read)
        if call.key:
            metrics.keys.labels(call.key, str(call.status)).inc()
        if self._log:
            self._log.write(
                request_id=call.name,
                key=call.key,
                method=method,
                route=route,
                status=call.status,
                ms=seconds * 1000,
                read=call.read,
                sent=call.sent,
            )


@dataclass
class _Call:
    """What is known of a request so far."""

    name: str
    started: float
    status: int = 0
    key: str = ""
    read: int = 0
    sent: int = 0


def _route(scope: Scope) -> str:
    # The template, not the path: one series a route, whatever clients ask for.
    return getattr(scope.get("route"), "path", None) or "unmatched"


def _id_of(scope: Scope) -> str:
    text = header(scope, "x-request-id")
    # Ids go into logs: only what cannot break a line there.
    return text if _REQUEST_ID.fullmatch(text) else uuid.uuid4().hex


def _method(scope: Scope) -> str:
    if is_call(scope):
        return "GRPC"
    method: str = scope["method"]
    return method if method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH") else "OTHER"


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replay
