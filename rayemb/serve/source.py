"""The shards of topology `spread` as what queries of other kinds are composed of."""

import asyncio
from collections.abc import Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from rayemb.index import Effort, Filter, Hits
from rayemb.index.live.follower import State
from rayemb.serve.engine import Found, Vectors

if TYPE_CHECKING:
    from rayemb.serve.spread import SpreadEngine

T = TypeVar("T")


class ShardSource:
    """The shards as a `Source` for one query, in a thread beside the event loop; it remembers what it was told."""

    def __init__(self, engine: "SpreadEngine", loop: asyncio.AbstractEventLoop, state: State | None) -> None:
        self._engine, self._loop, self.state = engine, loop, state
        self.rows: dict[int, dict[str, Any]] = {}
        self.missing: set[str] = set()

    def search(
        self,
        vectors: ArrayLike,
        k: int,
        filter: Filter | None = None,
        *,
        effort: Effort | None = None,
        recall: float | None = None,
    ) -> Hits:
        """As `SpreadEngine.search`."""
        x_ND = np.asarray(vectors, np.float32)
        return self._hits(self._engine.search_at(self.state, x_ND, k, filter, effort, recall))

    def words(self, text: str, k: int, filter: Filter | None = None) -> Hits:
        """As `SpreadEngine.words_at`."""
        return self._hits(self._engine.words_at(self.state, text, k, filter))

    def key(self, row_id: str) -> int | None:
        """The key of the row with this id, or None."""
        return self._wait(self._engine.key_of(self.state, row_id))

    def vectors(self, keys: Sequence[int]) -> Vectors:
        """Vectors of rows."""
        return self._engine.vectors_of(self.state, keys)

    def payload(self, keys: Sequence[int]) -> list[dict[str, Any]]:
        """Id and payload of rows that were found before."""
        return [self.rows[key] for key in keys]

    def _hits(self, call: Coroutine[Any, Any, Found]) -> Hits:
        found = self._wait(call)
        self.rows |= found.rows
        self.missing |= set(found.missing_shards)
        return Hits(found.scores, found.keys, tuple(found.strategies))

    def _wait(self, call: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(call, self._loop).result()
