"""The open versions of each collection, and which of them answers a request.

A request takes a version once, at its start, and everything that it needs comes from there: model, shards, payloads,
pictures, names. What a change of the catalog changes is one pointer of the table; requests that began before end on the
version that they took, which is closed when the last of them has left.
"""

import ctypes
import hashlib
import logging
import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from rayemb.serve.engine import Description, Engine
from rayemb.serve.errors import ApiError

logger = logging.getLogger(__name__)


class Served:
    """A version that is open: its `engine`, and how many hold it. Without a name it is called as its index is."""

    def __init__(self, collection: str, name: str | None, engine: Engine) -> None:
        self.collection, self._name, self.engine = collection, name, engine
        self.holders = 0
        self.retired = False

    @property
    def version(self) -> str:
        """What it is called."""
        return self._name or self.about.index_version

    @property
    def about(self) -> Description:
        """What is served: after a compaction, the index that has the updates in it."""
        return self.engine.describe()


@dataclass(frozen=True)
class Routes:
    """Who answers for one collection. `percent`: share of the requests, 0 to 100."""

    live: Served
    canary: tuple[Served, float] | None = None
    shadow: tuple[Served, float] | None = None

    @property
    def roles(self) -> dict[str, Served]:
        """The versions by what they do."""
        beside = {"canary": self.canary, "shadow": self.shadow}
        return {"live": self.live, **{role: each[0] for role, each in beside.items() if each}}


@dataclass
class Versions:
    """The table. `default` is the collection of requests that name none."""

    default: str
    _routes: Mapping[str, Routes] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def of(cls, engine: Engine, collection: str) -> "Versions":
        """One collection of one version, which stays; the engine is the caller's to close."""
        found = cls(collection)
        served = Served(collection, None, engine)
        served.holders = 1  # the caller's own
        found.set({collection: Routes(served)})
        return found

    @property
    def routes(self) -> Mapping[str, Routes]:
        """The table as it is now; it is replaced, never changed."""
        return self._routes

    def name(self, collection: str | None) -> str:
        """The collection that a request is for. Raises ApiError if there is none of that name."""
        name = collection or self.default
        if name not in self._routes:
            raise ApiError(404, "collection_not_found", f"there is no collection {name!r} here", "collection")
        return name

    @contextmanager
    def take(
        self,
        collection: str | None = None,
        client: str = "",
        wanted: Callable[[Description], bool] | None = None,
        *,
        live: bool = False,
    ) -> Iterator[Served]:
        """The version that answers a request, held to the end of the block.

        `client`: who asks; the same one gets the same version while the canary's share stays or grows. Without, chance
        decides. `wanted`: rather the one of the live version and the canary that is so, if one is: what a client has
        of a version already (its vectors, a link) belongs to that one. `live`: the live version and no other, as writes
        want it. Raises ApiError for an unknown collection.
        """
        with self._lock:
            routes = self._routes[self.name(collection)]
            served = routes.live if live else self._choice(routes, client, wanted)
            served.holders += 1
        try:
            yield served
        finally:
            self._leave(served)

    @contextmanager
    def held(self) -> Iterator[Mapping[str, Routes]]:
        """The table as it is now, every version in it held to the end of the block."""
        with self._lock:
            routes = self._routes
            held = [served for each in routes.values() for served in each.roles.values()]
            for served in held:
                served.holders += 1
        try:
            yield routes
        finally:
            for served in held:
                self._leave(served)

    def hold(self, served: Served) -> bool:
        """Holds a version for work beside a request, until `leave`; False if it is closing."""
        with self._lock:
            if served.retired:
                return False
            served.holders += 1
            return True

    def leave(self, served: Served) -> None:
        """Ends a `hold`."""
        self._leave(served)

    def set(self, routes: Mapping[str, Routes]) -> None:
        """The whole table at once. What is in it no more is closed when its last request has left."""
        wanted = {id(served) for each in routes.values() for served in each.roles.values()}
        with self._lock:
            old = {id(served): served for each in self._routes.values() for served in each.roles.values()}
            self._routes = dict(routes)
            gone = [served for key, served in old.items() if key not in wanted]
            for served in gone:
                served.retired = True
            idle = [served for served in gone if not served.holders]
        for served in idle:
            _close(served)

    def _leave(self, served: Served) -> None:
        with self._lock:
            served.holders -= 1
            last = served.retired and not served.holders
        if last:
            _close(served)

    @staticmethod
    def _choice(routes: Routes, client: str, wanted: Callable[[Description], bool] | None) -> Served:
        if routes.canary is None:
            return routes.live
        if wanted is not None:
            for each in (routes.live, routes.canary[0]):
                if wanted(each.about):
                    return each
        served, percent = routes.canary
        return served if share_of(client, served.collection, served.version) * 100 < percent else routes.live


def share_of(client: str, collection: str, version: str) -> float:
    """A number in [0, 1) for a client; for each version another, so that not always the same ones are first."""
    if not client:
        return random.random()
    digest = hashlib.sha256(f"{collection}\0{version}\0{client}".encode()).digest()
    return int.from_bytes(digest[:7], "big") / 256**7


def _close(served: Served) -> None:
    # Not here: this may be the event loop, and closing waits for threads that still compute for a client that left.
    def close() -> None:
        try:
            served.engine.close()
            del served.engine  # nobody may use it, and its memory goes
            if _TRIM is not None:
                _TRIM(0)
            logger.info("closed version %s of %s", served.version, served.collection)
        except Exception:
            logger.exception("version %s of %s did not close", served.version, served.collection)

    threading.Thread(target=close, name="rayemb-closing", daemon=True).start()


def _trimmer() -> Callable[[int], int] | None:
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):
        return None  # not glibc
    return trim


# glibc keeps what was freed: after some switches the process would hold the size of several versions.
_TRIM = _trimmer()
