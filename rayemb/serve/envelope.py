"""What surrounds every request: its id, the limit on its body, its counters, an answer if all else fails."""

import logging
import re
import time
import uuid
from collections.abc import Mapping
from typing import Any

import numpy as np
import orjson
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayemb.serve.errors import ApiError
from rayemb.serve.metrics import Metrics

logger = logging.getLogger(__name__)

OPENAI_ROUTES = ("/v1/embeddings",)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_DRAIN_FACTOR = 4
_SECURITY = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class JsonResponse(JSONResponse):
    """JSON through orjson; numpy and dates included, bytes left out."""

    def render(self, content: Any) -> bytes:
        """The body."""
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
    """Middleware: request id, body limit before anything reads the body, counters, 500 without a stack trace.

    Plain ASGI, because starlette's BaseHTTPMiddleware buffers and breaks on clients that leave.
    `send_id_header`: off behind Serve's proxy, which adds X-Request-ID itself.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, max_body_bytes: int, send_id_header: bool = True) -> None:
        self._app, self._metrics = app, metrics
        self._max_body_bytes, self._send_id_header = max_body_bytes, send_id_header

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The app's answer to one request, within the envelope."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name = _id_of(scope)
        scope.setdefault("state", {})["request_id"] = name
        started, status = time.perf_counter(), 0

        async def wrapped(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [(key.lower().encode(), value.encode()) for key, value in _SECURITY.items()]
                if self._send_id_header:
                    headers.append((b"x-request-id", name.encode()))
                message = {**message, "headers": [*message.get("headers", []), *headers]}
            await send(message)

        try:
            try:
                body = await _read(scope, receive, self._max_body_bytes)
            except ApiError as error:
                await error_response(error, scope["path"], name)(scope, receive, wrapped)
                return
            if body is None:
                return
            await self._app(scope, _replay(body, receive), wrapped)
        except Exception:
            logger.exception("request %s failed: %s %s", name, scope["method"], scope["path"])
            if status:
                raise  # half an answer is out: cut the connection rather than end it well
            oops = ApiError(500, "internal", "something went wrong here; the log has it under this request_id")
            await error_response(oops, scope["path"], name)(scope, receive, wrapped)
        finally:
            # The template, not the path: one series a route, whatever clients ask for.
            route = getattr(scope.get("route"), "path", None) or "unmatched"
            self._metrics.requests.labels(route, _method(scope), str(status)).inc()
            self._metrics.seconds.labels("request").observe(time.perf_counter() - started)


def _id_of(scope: Scope) -> str:
    for key, value in scope["headers"]:
        if key == b"x-request-id":
            text = value.decode("latin-1")
            # Ids go into logs: only what cannot break a line there.
            if _REQUEST_ID.fullmatch(text):
                return str(text)
    return uuid.uuid4().hex


def _method(scope: Scope) -> str:
    method: str = scope["method"]
    return method if method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH") else "OTHER"


async def _read(scope: Scope, receive: Receive, limit: int) -> bytes | None:
    """The whole body; None if the client left. Raises ApiError 413 past `limit` bytes, never holding more."""
    declared = next((value for key, value in scope["headers"] if key == b"content-length"), b"0")
    too_large = declared.isdigit() and int(declared) > limit
    parts: list[bytes] = []
    size = 0
    while True:
        if too_large and (int(declared) if declared.isdigit() else size) > _DRAIN_FACTOR * limit:
            break
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        size += len(message.get("body", b""))
        too_large = too_large or size > limit
        # The rest is thrown away rather than left unread: closing on a client that still sends resets the
        # connection, and it would never see why. Not without end, though.
        if too_large:
            parts.clear()
        else:
            parts.append(message.get("body", b""))
        if not message.get("more_body", False) or size > _DRAIN_FACTOR * limit:
            break
    if too_large:
        raise ApiError(413, "too_large", f"the body is over {limit:,} bytes", "body", {"Connection": "close"})
    return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    sent = False

    async def replay() -> Message:
        nonlocal sent
        if not sent:
            sent = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replay
