"""What a request must pass before anything is done for it: its key, its deadline, the size of its body."""

import base64
import binascii
import math
import time
from contextvars import ContextVar

from starlette.types import Message, Receive, Scope

from rayemb.serve.config import ServeConfig
from rayemb.serve.errors import ApiError
from rayemb.serve.keys import Key, KeyRing
from rayemb.serve.metrics import Metrics

# A load balancer asks these, and has no key.
FREE = ("/healthz", "/readyz")
# What changes items: for keys that may.
WRITES = ("/v1/items", "/v1/items/delete")
_TIMEOUT = "X-Request-Timeout"
_DRAIN_FACTOR = 4
_deadline: ContextVar[float] = ContextVar("rayemb_deadline", default=math.inf)


def set_deadline(seconds: float) -> None:
    """From now on the request of this context has `seconds` left."""
    _deadline.set(time.monotonic() + seconds)


def remaining(most: float) -> float:
    """The seconds that this context's request has left, at most `most`, at least 0; `most` where there is none."""
    return max(0.0, min(most, _deadline.get() - time.monotonic()))


def header(scope: Scope, name: str) -> str:
    """The first header of that name, or an empty text."""
    wanted = name.lower().encode()
    return next((value.decode("latin-1") for key, value in scope["headers"] if key == wanted), "")


def is_call(scope: Scope) -> bool:
    """Whether the request is a gRPC call (`rayemb.serve.rpc`): its body is a message, and so is the answer."""
    return bool(scope.get("state", {}).get("message"))


def timeout_of(scope: Scope, most: float) -> float:
    """The seconds that this request has: what its X-Request-Timeout says, but at most `most`. Raises ApiError."""
    wanted = _TIMEOUT.lower().encode()
    if all(key != wanted for key, _ in scope["headers"]):
        return most
    try:
        seconds = float(header(scope, _TIMEOUT))
    except ValueError:
        seconds = math.nan
    if not seconds > 0:  # also for NaN
        raise ApiError(400, "invalid_request", f"{_TIMEOUT} is a number of seconds above 0", _TIMEOUT.lower())
    return min(seconds, most)


class Guard:
    """Who may come in: every request without a ring of keys, those with a key otherwise."""

    def __init__(self, config: ServeConfig, metrics: Metrics) -> None:
        self._ring = KeyRing(config.keys) if config.keys else None
        self._collection, self._metrics = config.collection, metrics

    def admit(self, scope: Scope) -> Key | None:
        """The key of a request. Raises ApiError: 401 without a live one, 403 for other collections, 429 too often."""
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if self._ring is None or path in FREE:
            return None
        secret = _secret(header(scope, "authorization"))
        key = self._ring.find(secret) if secret else None
        if key is None:
            told = "this key is not known here, or was revoked" if secret else "an API key is needed"
            # Basic is for browsers, which ask for it: any name, the key as the password.
            headers = {"WWW-Authenticate": 'Basic realm="rayemb: the API key as password", charset="UTF-8"'}
            raise ApiError(401, "unauthorized", f"{told}: send Authorization: Bearer KEY", "authorization", headers)
        wanted = scope.get("state", {}).get("collection") or self._collection
        if key.collections is not None and wanted not in key.collections:
            self._metrics.refused.labels("collection").inc()
            raise ApiError(403, "forbidden", f"this key does not open {wanted!r}", "authorization")
        if path in WRITES and not key.write:
            raise ApiError(403, "forbidden", "this key may not write", "authorization")
        if wait := self._ring.wait_s(key):
            self._metrics.refused.labels("rate").inc()
            headers = {"Retry-After": str(math.ceil(wait))}
            told = f"this key may ask {key.per_second:g} times a second"
            raise ApiError(429, "rate_limited", told, "authorization", headers)
        return key


def _secret(text: str) -> str:
    kind, _, value = text.partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode("utf-8").partition(":")[2]
        except (binascii.Error, UnicodeDecodeError, ValueError):
            return ""
    return ""


class Bodies:
    """Reads bodies whole, none over its limit, and all that are held at once within `max_buffered_bytes`."""

    def __init__(self, config: ServeConfig, metrics: Metrics) -> None:
        self._most, self._most_held = config.max_body_bytes, config.max_buffered_bytes
        self._status, self._retry_after_s = config.overload_status, config.retry_after_s
        self._metrics, self._held = metrics, 0

    async def read(self, scope: Scope, receive: Receive, key: Key | None) -> bytes | None:
        """The whole body, to be given back by `release`; None if the client left. Raises ApiError."""
        limit = min(self._most, key.max_body_bytes) if key and key.max_body_bytes else self._most
        declared = header(scope, "content-length")
        expected = int(declared) if declared.isdigit() else 0
        parts: list[bytes] = []
        problem = self._too_large(limit) if expected > limit else _encoded(scope)
        size, more, kept = 0, True, False
        try:
            # The rest is thrown away rather than left unread: closing on a client that still sends resets the
            # connection, and it would never see why. Not without end, though.
            while more and max(size, expected if problem else 0) <= _DRAIN_FACTOR * limit:
                message: Message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                part, more = message.get("body", b""), message.get("more_body", False)
                size += len(part)
                if problem is None and size > limit:
                    problem = self._too_large(limit)
                if problem is None and self._held + len(part) > self._most_held:
                    problem = self._no_room()
                if problem is None:
                    parts.append(part)
                    self._hold(len(part))
                elif parts:
                    self._hold(-sum(map(len, parts)))
                    parts.clear()
            if problem is not None:
                raise problem
            kept = True
            return b"".join(parts)
        finally:
            if not kept:  # also where the deadline ended the reading
                self._hold(-sum(map(len, parts)))

    async def discard(self, scope: Scope, receive: Receive) -> None:
        """Takes the body of a refused request and drops it, so that the client sees the answer."""
        declared = header(scope, "content-length")
        if declared.isdigit() and int(declared) > self._most:
            return
        size, more = 0, True
        while more and size <= self._most:
            message = await receive()
            size += len(message.get("body", b""))
            more = message.get("more_body", False)

    def release(self, body: bytes) -> None:
        """The body of `read` is no longer held."""
        self._hold(-len(body))

    def _hold(self, count: int) -> None:
        self._held += count
        self._metrics.buffered.set(self._held)

    def _too_large(self, limit: int) -> ApiError:
        self._metrics.refused.labels("size").inc()
        return ApiError(413, "too_large", f"the body is over {limit:,} bytes", "body", {"Connection": "close"})

    def _no_room(self) -> ApiError:
        self._metrics.refused.labels("memory").inc()
        headers = {"Retry-After": str(self._retry_after_s), "Connection": "close"}
        return ApiError(self._status, "overloaded", "too many bodies are held already: try again", headers=headers)


def _encoded(scope: Scope) -> ApiError | None:
    # Never unpacked, so that a small body cannot become a large one.
    if header(scope, "content-encoding").strip().lower() in ("", "identity"):
        return None
    return ApiError(415, "unsupported_media_type", "bodies are taken as they are, not compressed", "content-encoding")
