"""API keys: a file of their digests, and who may ask what, how often and how much.

A key is 32 random bytes, so SHA-256 is the right digest: there is nothing to guess, which is what a slow digest
(scrypt, for passwords that people think up) would make expensive, and a slow one would let anybody keep the
gateway busy with wrong keys. The file never holds a key, only its digest.
"""

import asyncio
import hashlib
import logging
import secrets
import time
from datetime import UTC, datetime

from pydantic import Field, ValidationError

from rayemb import storage
from rayemb.config import Config
from rayemb.serve.errors import ServeError

logger = logging.getLogger(__name__)

FORMAT = 1
# How old a gateway's copy of the file may be: a revoked key is refused by then.
REFRESH_S = 5.0
_PREFIX = "rayemb-"
_NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


class Key(Config):
    """One key: its digest, and its limits. null: no limit but the service's own."""

    name: str = Field(pattern=_NAME, description="whose key it is; logs and metrics have this name, never the key")
    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="digest of the key")
    created: str = Field(description="when it was made, ISO 8601")
    revoked: str | None = Field(None, description="since when it is refused, ISO 8601")
    collections: tuple[str, ...] | None = Field(None, description="the collections that it opens; null: all of them")
    write: bool = Field(False, description="whether it may write and delete items")
    per_second: float | None = Field(None, gt=0, description="requests a second, at each gateway replica")
    max_body_bytes: int | None = Field(None, ge=1, description="largest body of a request")
    admin: bool = Field(False, description="whether it may change the catalog: add, promote, roll back, remove")


class KeyFile(Config):
    """What a file of keys holds, as JSON."""

    format: int = Field(FORMAT, ge=1, le=FORMAT)
    keys: tuple[Key, ...] = Field((), description="every key there ever was, the revoked ones too")


def read_keys(uri: str) -> tuple[Key, ...]:
    """The keys in the file at `uri`. Raises ServeError if it is missing or damaged."""
    try:
        return KeyFile.model_validate(storage.read_json(uri)).keys
    except storage.MissingError as error:
        raise ServeError(
            "there is no file of keys here", where=uri, fix="make a key: rayemb serve key new NAME --keys FILE"
        ) from error
    except (ValidationError, storage.StorageError) as error:
        # Not pydantic's own message: it quotes the input.
        raise ServeError("this is no file of keys, or a damaged one", where=uri, fix="restore it") from error


def new_key(
    uri: str,
    name: str,
    *,
    collections: tuple[str, ...] | None = None,
    write: bool = False,
    per_second: float | None = None,
    max_body_bytes: int | None = None,
    admin: bool = False,
) -> str:
    """Adds a key to the file at `uri`, which is made if need be, and gives the key itself: nobody can show it again.

    Raises ServeError if there is a live key of that name. For one writer at a time.
    """
    keys = read_keys(uri) if storage.exists(uri) else ()
    if any(key.name == name and key.revoked is None for key in keys):
        raise ServeError(f"there is a key {name!r} already", where=uri, fix="choose another name, or revoke it first")
    secret = _PREFIX + secrets.token_urlsafe(32)
    try:
        key = Key(
            name=name,
            sha256=digest(secret),
            created=_now(),
            collections=collections or None,
            write=write,
            per_second=per_second,
            max_body_bytes=max_body_bytes,
            admin=admin,
        )
    except ValidationError as error:
        wrong = error.errors(include_url=False)[0]
        raise ServeError(wrong["msg"], where=str(wrong["loc"][0])) from error
    _write(uri, (*keys, key))
    return secret


def revoke_key(uri: str, name: str) -> None:
    """Ends the live key of that name; running gateways refuse it within seconds. Raises ServeError if there is none."""
    keys = read_keys(uri)
    if not any(key.name == name and key.revoked is None for key in keys):
        raise ServeError(f"there is no live key {name!r}", where=uri, fix="rayemb serve key list shows them")
    revoked = {"revoked": _now()}
    ended = (key.model_copy(update=revoked) if key.name == name and not key.revoked else key for key in keys)
    _write(uri, tuple(ended))


def digest(secret: str) -> str:
    """What the file holds of a key."""
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


class TokenBucket:
    """At most `per_second` takings a second, up to a second's worth (at least one) at once."""

    def __init__(self, per_second: float) -> None:
        self.per_second = per_second
        self._most = max(1.0, per_second)
        self._left, self._at = self._most, time.monotonic()

    def take(self) -> float:
        """0 if there was a token, which is then gone; else the seconds until there is one."""
        now = time.monotonic()
        self._left = min(self._most, self._left + (now - self._at) * self.per_second)
        self._at = now
        if self._left >= 1.0:
            self._left -= 1.0
            return 0.0
        return (1.0 - self._left) / self.per_second


class KeyRing:
    """The live keys of a file, read again while it is used; a file that cannot be read leaves those known.

    Raises ServeError if the file cannot be read at the start.
    """

    def __init__(self, uri: str, refresh_s: float = REFRESH_S) -> None:
        self._uri, self._refresh_s = uri, refresh_s
        self._keys = _live(read_keys(uri))
        self._buckets: dict[str, TokenBucket] = {}
        self._read_at = time.monotonic()
        self._reading: asyncio.Task[None] | None = None

    def find(self, secret: str) -> Key | None:
        """The live key with this secret. Never waits: a new copy of the file is read beside."""
        if time.monotonic() - self._read_at > self._refresh_s and self._reading is None:
            self._reading = asyncio.get_running_loop().create_task(self._refresh())
        # A lookup by digest: what its timing tells is about digests, which nobody can choose.
        return self._keys.get(digest(secret))

    def wait_s(self, key: Key) -> float:
        """Counts a request of `key`: 0 if it may go on, else the seconds until it might."""
        if key.per_second is None:
            return 0.0
        bucket = self._buckets.get(key.name)
        if bucket is None or bucket.per_second != key.per_second:
            bucket = self._buckets[key.name] = TokenBucket(key.per_second)
        return bucket.take()

    async def _refresh(self) -> None:
        try:
            keys = await asyncio.get_running_loop().run_in_executor(None, read_keys, self._uri)
            self._keys = _live(keys)
        except ServeError as error:
            logger.warning("the keys could not be read again, those known stay: %s", error)
        finally:
            self._read_at, self._reading = time.monotonic(), None


def _live(keys: tuple[Key, ...]) -> dict[str, Key]:
    return {key.sha256: key for key in keys if key.revoked is None}


def _write(uri: str, keys: tuple[Key, ...]) -> None:
    storage.write_json(uri, KeyFile(keys=keys).model_dump(mode="json"))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
