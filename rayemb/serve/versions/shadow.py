"""Requests that are asked of a second version too, beside their answer: what it would have said, and how fast."""

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from rayemb.serve.engine import Found
from rayemb.serve.errors import ApiError
from rayemb.serve.metrics import Metrics
from rayemb.serve.versions.table import Served, Versions

logger = logging.getLogger(__name__)

# Shadow requests at once; more are dropped rather than let them take the place of requests.
_AT_ONCE = 2
_LONGEST_S = 10.0


@dataclass
class Compared:
    """What is known of a shadow beside the version that answered."""

    queries: int = 0
    overlap: float = 0.0
    live_s: float = 0.0
    shadow_s: float = 0.0
    failed: int = 0
    dropped: int = 0

    def figures(self) -> dict[str, float]:
        """Means, for people."""
        n = max(self.queries, 1)
        return {
            "queries": self.queries,
            "overlap": round(self.overlap / n, 4),
            "live_ms": round(self.live_s / n * 1000, 3),
            "shadow_ms": round(self.shadow_s / n * 1000, 3),
            "failed": self.failed,
            "dropped": self.dropped,
        }


@dataclass
class Shadows:
    """The shadow requests of one gateway. `busy`: whether requests wait, so that there is no room for more."""

    versions: Versions
    metrics: Metrics
    busy: Callable[[], bool]
    compared: dict[tuple[str, str], Compared] = field(default_factory=dict)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def offer(self, served: Served, found: Found, seconds: float, ask: Callable[[Served], Awaitable[Found]]) -> None:
        """Asks the shadow of `served`'s collection what it was asked, if chance has it; `ask` asks a version that.

        `found` in `seconds` is what was answered. On the event loop, blocks never.
        """
        routes = self.versions.routes.get(served.collection)
        if routes is None or routes.shadow is None or routes.shadow[0] is served:
            return
        shadow, percent = routes.shadow
        if random.random() * 100 >= percent:
            return
        known = self.compared.setdefault((shadow.collection, shadow.version), Compared())
        if len(self._tasks) >= _AT_ONCE or self.busy() or not self.versions.hold(shadow):
            known.dropped += 1
            self.metrics.shadows.labels(shadow.collection, shadow.version, "dropped").inc()
            return
        task = asyncio.get_running_loop().create_task(self._ask(shadow, found, seconds, ask, known))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _ask(
        self,
        shadow: Served,
        found: Found,
        seconds: float,
        ask: Callable[[Served], Awaitable[Found]],
        known: Compared,
    ) -> None:
        names = shadow.collection, shadow.version
        try:
            started = time.perf_counter()
            async with asyncio.timeout(_LONGEST_S):
                other = await ask(shadow)
            took = time.perf_counter() - started
            overlap = _overlap(found, other)
            known.queries += 1
            known.overlap += overlap
            known.live_s += seconds
            known.shadow_s += took
            self.metrics.shadows.labels(*names, "asked").inc()
            self.metrics.overlap.labels(*names).observe(overlap)
            self.metrics.shadow_seconds.labels(*names, "live").observe(seconds)
            self.metrics.shadow_seconds.labels(*names, "shadow").observe(took)
        except Exception as error:  # whatever it is, nobody but the figures should notice
            known.failed += 1
            self.metrics.shadows.labels(*names, "failed").inc()
            level = logging.DEBUG if isinstance(error, ValueError | ApiError) else logging.WARNING
            logger.log(level, "the shadow %s of %s failed: %s", shadow.version, shadow.collection, error)
        finally:
            self.versions.leave(shadow)


def _overlap(found: Found, other: Found) -> float:
    """The share of `found`'s hits, by id, that `other` has too; 1 where there are none."""
    first, second = _ids(found), _ids(other)
    return len(first & second) / len(first) if first else 1.0


def _ids(found: Found) -> set[Any]:
    return {found.rows[key]["id"] for key in found.keys[0].tolist() if key >= 0}
