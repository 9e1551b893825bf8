"""What a query sees: the shards of an index and the updates beside them, at one version of both."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from rayemb.index import queries
from rayemb.index.effort import Effort
from rayemb.index.errors import QueryError
from rayemb.index.filters import Filter
from rayemb.index.live.follower import State
from rayemb.index.manifest import Manifest
from rayemb.index.merge import merge
from rayemb.index.placement import Router
from rayemb.index.queries import Hits, Query
from rayemb.index.selection import Selection
from rayemb.index.shard import Answer, Shard, check_queries


@dataclass(frozen=True)
class Part:
    """A shard, and the rows of it that are there (None: all)."""

    shard: Shard
    alive: Selection | None = None


class View:
    """One state of an index, which no update changes: all parts of a query are answered from it.

    `updates`: the version of the live updates; None where they are not followed.
    """

    def __init__(
        self,
        manifest: Manifest,
        shards: Sequence[Shard],
        router: Router,
        pool: ThreadPoolExecutor | None,
        state: State | None = None,
    ) -> None:
        self._manifest, self._router, self._pool, self.state = manifest, router, pool, state
        alive = state.alive if state else [None] * len(shards)
        self._base = [Part(*each) for each in zip(shards, alive, strict=True)]
        self._new = [Part(*each) for each in state.parts] if state else []
        self._end = manifest.embeddings.rows + (state.rows if state else 0)
        self.updates = state.version if state else None

    @property
    def rows(self) -> int:
        """Rows that can be found."""
        parts = [*self._base, *self._new]
        return sum(part.shard.rows if part.alive is None else part.alive.count for part in parts)

    def search(
        self,
        vectors: ArrayLike,
        k: int,
        filter: Filter | None = None,
        *,
        effort: Effort | None = None,
        recall: float | None = None,
    ) -> Hits:
        """The `k` best rows for each of `vectors` `(N, D)`, as `Shard.search` finds them in each shard.

        `effort` says how wide to search; or `recall`, the share of the exact answer wanted: the cheapest effort
        that reached it when the index was built. Default: the manifest's effort.

        Raises QueryError for vectors or a `k` that cannot be searched, or a recall that no measured effort
        reaches; FilterError for a filter that does not fit.
        """
        x_ND = check_queries(vectors, self._manifest.dim, k)
        chosen = self._manifest.chosen_effort(effort, recall)
        # Under a filter the lists that hold enough may lie anywhere.
        asked = self._base if filter else [self._base[i] for i in self._router.shards(x_ND, chosen.nprobe)]
        return self._asked(asked, lambda part: part.shard.answer(x_ND, k, filter, chosen, part.alive), k)

    def words(self, text: str, k: int, filter: Filter | None = None) -> Hits:
        """The `k` best rows by BM25 for the words of `text`, as of one query `(1, k)`.

        Raises QueryError if the index was built without `index.words`, FilterError as `search` does.
        """
        return self._asked(self._base, lambda part: part.shard.words(text, k, filter, part.alive), k)

    def query(self, vector: ArrayLike | None, query: Query) -> Hits:
        """One query of any kind, `(1, <= results)`: see `rayemb.index.queries`."""
        return replace(queries.answer(self, vector, query), updates=self.updates)

    def vectors(self, keys: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """The whole vectors `(len(keys), D)` of rows, from the index where it keeps them, else from the table.

        Raises QueryError for a key of no row.
        """
        wanted = self._checked(keys)
        found = np.empty((len(wanted), self._manifest.dim), np.float32)
        for shard, places, positions in self._owners(wanted):
            found[places] = shard.vectors(positions)
        return found

    def payload(self, keys: Sequence[int] | NDArray[np.int64]) -> list[dict[str, Any]]:
        """Id and payload columns of the rows `keys` `(K,)`, in that order, from memory.

        Raises QueryError for a key of no row, such as the -1 of an empty place: drop those first.
        """
        wanted = self._checked(keys)
        rows: list[dict[str, Any]] = [{}] * len(wanted)
        for shard, places, positions in self._owners(wanted):
            for place, row in zip(places.tolist(), shard.payload.take(positions.tolist()), strict=True):
                rows[place] = row
        return rows

    def ids(self, keys: NDArray[np.int64]) -> pa.Array:
        """The ids of the rows `keys`, flat and in order, as arrow texts; null for the -1 of an empty place."""
        flat = keys.reshape(-1)
        if len(self._base) == 1 and not self._new:
            return self._base[0].shard.ids(flat)
        owned = list(self._owners(flat))
        if not owned:
            return self._base[0].shard.ids(flat)
        # Each id's place among the parts, which lie one after the other.
        order = np.concatenate([places for _, places, _ in owned])
        at = np.zeros(len(flat), np.int64)
        at[order] = np.arange(len(order))
        parts = [shard.payload.ids(pa.array(positions)) for shard, _, positions in owned]
        return pa.concat_arrays(parts).take(pa.array(at, mask=flat < 0))

    def key(self, row_id: str) -> int | None:
        """The key of the row with this id, or None."""
        if self.state is not None:
            return self.state.key(row_id)
        found = (part.shard.key(row_id) for part in self._base)
        return next((key for key in found if key is not None), None)

    def _checked(self, keys: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        wanted = np.asarray(keys, np.int64).reshape(-1)
        outside = wanted[(wanted < 0) | (wanted >= self._end)]
        if len(outside):
            raise QueryError(f"there is no row {int(outside[0])}", where="keys", fix=f"keys are 0 to {self._end - 1}")
        return wanted

    def _owners(self, keys: NDArray[np.int64]) -> Iterator[tuple[Shard, NDArray[np.int64], NDArray[np.int64]]]:
        """Each shard that has rows of `keys`: the places of those in `keys`, and their positions in the shard."""
        for part in (*self._base, *self._new):
            positions = part.shard.keys.at(keys)
            places = np.flatnonzero(positions >= 0)
            if len(places):
                yield part.shard, places, positions[places]

    def _asked(self, asked: Sequence[Part], ask: Callable[[Part], Answer], k: int) -> Hits:
        """The k best of parts of the index, asked side by side, and of all that is new."""
        parts = [*asked, *self._new]
        if len(parts) == 1:
            answer = ask(parts[0])
            return Hits(answer.scores, answer.keys, (answer.strategy,), self.updates)
        answers = list(self._pool.map(ask, parts) if self._pool and len(asked) > 1 else map(ask, parts))
        scores, keys = [each.scores for each in answers], [each.keys for each in answers]
        return Hits(*merge(scores, keys, k), tuple(each.strategy for each in answers), self.updates)
