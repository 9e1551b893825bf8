"""A call as a request to the ASGI app, and the app's answer as a call's.

The app sees a POST whose body is the message's bytes, so that whatever holds for a request over HTTP holds for a call:
there is nothing here that could differ. What it refuses is told in gRPC's own terms (AIP-193's details).
"""

import asyncio
import contextlib
import math
import re
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import grpc
import orjson
from google.protobuf.any_pb2 import Any as Packed
from google.protobuf.duration_pb2 import Duration
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RequestInfo, RetryInfo
from google.rpc.status_pb2 import Status
from starlette.types import ASGIApp, Message

from rayemb.serve.rpc import messages
from rayemb.serve.versions.catalog import NAME

Metadata = Sequence[tuple[str, str | bytes]]

COLLECTION, REQUEST_ID, TIMEOUT = "x-rayemb-collection", "x-request-id", "x-request-timeout"
DETAILS, PUSHBACK = "grpc-status-details-bin", "grpc-retry-pushback-ms"
DOMAIN = "rayemb"
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# What says how a message travels, or is for a proxy between; the rest goes to the app as headers.
_OWN = ("te", "content-type", "content-length", "content-encoding", "accept-encoding", "user-agent", "host", COLLECTION)
_OVERLOADED = "overloaded"
# Of a message, in bytes: all trailing metadata has to fit into 8 KB, and the message is in it three times.
_LONGEST = 800
_CODES = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    405: grpc.StatusCode.UNIMPLEMENTED,
    409: grpc.StatusCode.FAILED_PRECONDITION,
    429: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}


@dataclass(frozen=True)
class Method:
    """What a method asks of the app; `answer` makes a message of what it gives, where that is none."""

    verb: str
    path: str
    answer: Callable[[bytes], bytes] | None = None


METHODS = {
    "Search": Method("POST", "/v1/search"),
    "SearchBatch": Method("POST", "/v1/search/batch"),
    "Embed": Method("POST", "/v1/embeddings"),
    "Index": Method("GET", "/v1/index", messages.index_answer),
    "Health": Method("GET", "/readyz", messages.health_answer),
}


@dataclass(frozen=True)
class Answer:
    """What a call gives: a message, or a code other than OK and why."""

    message: bytes
    trailing: tuple[tuple[str, str | bytes], ...]
    code: grpc.StatusCode = grpc.StatusCode.OK
    details: str = ""


async def call(app: ASGIApp, name: str, message: bytes, metadata: Metadata, seconds: float | None) -> Answer:
    """The app's answer to a call of the method `name`, which has `seconds` left, or no deadline."""
    method = METHODS[name]
    request_id = _request_id(metadata)
    status, headers = 0, list[tuple[bytes, bytes]]()
    parts: list[bytes] = []
    pending = [message if method.answer is None else b""]

    async def receive() -> Message:
        if pending:
            return {"type": "http.request", "body": pending.pop(), "more_body": False}
        # The client is there: a call whose client left is cancelled.
        left: Message = await asyncio.get_running_loop().create_future()
        return left

    async def send(event: Message) -> None:
        nonlocal status, headers
        if event["type"] == "http.response.start":
            status, headers = event["status"], event.get("headers", [])
        else:
            parts.append(event.get("body", b""))

    path = method.path
    if collection := _first(metadata, COLLECTION):
        # A name that none can have goes no further than this: it would be another path.
        if not re.fullmatch(NAME, collection):
            return refusal(404, {"message": f"there is no collection {collection[:64]!r} here"}, request_id)
        path = f"/collections/{collection}{path}"
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "2",
        "method": method.verb,
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": _headers(metadata, request_id, seconds),
        "client": None,
        "server": None,
        "state": {"message": True},
    }
    await app(scope, receive, send)
    body = b"".join(parts)
    if status == 200:
        return Answer(body if method.answer is None else method.answer(body), ((REQUEST_ID, request_id),))
    retry_after = next((value.decode() for key, value in headers if key == b"retry-after"), "")
    return refusal(status, _told(body, status), request_id, retry_after)


def refusal(status: int, told: dict[str, Any], request_id: str, retry_after: str = "") -> Answer:
    """What a client is told of an HTTP answer other than 200, whose error is `told`."""
    message = str(told.get("message", "")).encode()[:_LONGEST].decode("utf-8", "ignore")
    field = told.get("field") or told.get("param") or ""
    reason = str(told.get("code") or told.get("type") or "unknown")
    code = _CODES.get(status, grpc.StatusCode.INVALID_ARGUMENT if status < 500 else grpc.StatusCode.INTERNAL)
    if reason == _OVERLOADED:
        code = grpc.StatusCode.RESOURCE_EXHAUSTED
    info = ErrorInfo(reason=reason.upper(), domain=DOMAIN, metadata={"http_status": str(status)})
    details: list[Any] = [info, RequestInfo(request_id=request_id)]
    trailing: list[tuple[str, str | bytes]] = [(REQUEST_ID, request_id)]
    if field:
        details.append(BadRequest(field_violations=[BadRequest.FieldViolation(field=field, description=message)]))
    if retry_after.isdigit():
        details.append(RetryInfo(retry_delay=Duration(seconds=int(retry_after))))
        trailing.append((PUSHBACK, str(int(retry_after) * 1000)))
    text = f"{field}: {message}" if field else message
    whole = Status(code=code.value[0], message=text, details=[_packed(each) for each in details])
    trailing.append((DETAILS, whole.SerializeToString()))
    return Answer(b"", tuple(trailing), code, text)


def within(metadata: Metadata, seconds: float | None) -> Metadata:
    """The metadata with what is left of the call's deadline, for whoever answers it elsewhere."""
    return metadata if seconds is None else (*metadata, (TIMEOUT, f"{seconds:.6f}"))


def _headers(metadata: Metadata, request_id: str, seconds: float | None) -> list[tuple[bytes, bytes]]:
    asked = [(REQUEST_ID, request_id)]
    times = [value for key, value in metadata if key == TIMEOUT]
    if seconds is not None:
        # 0 would be no time that a request can have, and this one ends at once anyway.
        times.append(f"{max(seconds, 1e-3):.6f}")
    if times:
        asked.append((TIMEOUT, min(map(str, times), key=_seconds)))
    left = (*_OWN, REQUEST_ID, TIMEOUT)
    passed = [(key, value) for key, value in metadata if key not in left and isinstance(value, str)]
    return [(key.lower().encode("latin-1"), value.encode("latin-1", "replace")) for key, value in (*passed, *asked)]


def _seconds(text: str) -> float:
    # What is no number goes on as it is, for the app to refuse.
    with contextlib.suppress(ValueError):
        seconds = float(text)
        return seconds if not math.isnan(seconds) else -math.inf
    return -math.inf


def _request_id(metadata: Metadata) -> str:
    # `request_id` is what Serve's proxy calls it.
    given = _first(metadata, REQUEST_ID) or _first(metadata, "request_id")
    return given if _ID.fullmatch(given) else uuid.uuid4().hex


def _first(metadata: Iterable[tuple[str, str | bytes]], name: str) -> str:
    return next((value for key, value in metadata if key == name and isinstance(value, str)), "")


def _told(body: bytes, status: int) -> dict[str, Any]:
    with contextlib.suppress(orjson.JSONDecodeError):
        document = orjson.loads(body)
        if isinstance(document, dict):
            if isinstance(document.get("error"), dict):
                return dict(document["error"])
            if missing := document.get("missing_shards"):
                return {"type": "unavailable", "message": f"nothing answers: {', '.join(missing)}"}
    return {"message": f"HTTP {status}"}


def _packed(message: Any) -> Packed:
    packed = Packed()
    packed.Pack(message)
    return packed
