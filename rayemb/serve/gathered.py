"""Searches of one index that come while others are under way go to it together."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np

from rayemb.index import Effort, Hits, Index
from rayemb.index.searcher import cores
from rayemb.serve.coalesce import Coalescer
from rayemb.serve.encoder import use_threads
from rayemb.serve.engine import Vectors

# Requests, and queries of them all, in one pass: a lone query behind a full one waits for so many.
_REQUESTS, _QUERIES = 64, 256


@dataclass(frozen=True)
class _Ask:
    index: Index
    vectors: Vectors
    k: int
    effort: Effort | None
    recall: float | None
    then: Callable[[Index, Hits], Any]

    @property
    def likeness(self) -> Any:
        """Equal for what one pass can answer."""
        return id(self.index), self.vectors.shape[1:], self.k, self.effort, self.recall


class GatheredSearch:
    """Searches without a filter, in as many threads as there are cores for them.

    A thread for each request would fight for Python's lock with all the others and with the event loop; here what
    waits is answered by one pass of FAISS. A lone search starts at once.
    """

    def __init__(self, threads: int) -> None:
        """`threads`: of FAISS in one search."""
        lanes = max(1, cores() // threads)
        self._pool = ThreadPoolExecutor(lanes, "rayemb-search", use_threads, (threads,))
        self._search = Coalescer(
            _answers, _REQUESTS, self._pool, max_cells=_QUERIES, weigh=lambda ask: len(ask.vectors), at_once=lanes
        )

    async def __call__(
        self,
        index: Index,
        vectors: Vectors,
        k: int,
        effort: Effort | None,
        recall: float | None,
        then: Callable[[Index, Hits], Any],
    ) -> Any:
        """What `then` makes of the hits of `vectors` `(n, D)`, in the same thread. Raises what either raises."""
        (found,) = await self._search([_Ask(index, vectors, k, effort, recall, then)])
        if isinstance(found, Exception):
            raise found
        return found

    def close(self) -> None:
        """Ends the threads once they have done what they were given; waits for it."""
        self._pool.shutdown(wait=True)


def _answers(asks: list[_Ask]) -> list[Any]:
    if len(asks) == 1:
        return _pass(asks)
    groups: dict[Any, list[int]] = {}
    for i, ask in enumerate(asks):
        groups.setdefault(ask.likeness, []).append(i)
    found: list[Any] = [None] * len(asks)
    for group in groups.values():
        for i, answer in zip(group, _pass([asks[i] for i in group]), strict=True):
            found[i] = answer
    return found


def _pass(asks: Sequence[_Ask]) -> list[Any]:
    """An answer for each of some that are alike, or the exception that it has."""
    first = asks[0]
    try:
        vectors = first.vectors if len(asks) == 1 else np.concatenate([ask.vectors for ask in asks])
        hits = first.index.search(vectors, first.k, effort=first.effort, recall=first.recall)
        if len(asks) == 1:
            return [first.then(first.index, hits)]
    except Exception as error:
        # One of them may be what is wrong: the others are answered.
        return [error] if len(asks) == 1 else [_pass([ask])[0] for ask in asks]
    found: list[Any] = []
    at = 0
    for ask in asks:
        part = slice(at, at := at + len(ask.vectors))
        try:
            found.append(ask.then(ask.index, Hits(hits.scores[part], hits.keys[part], hits.strategies, hits.updates)))
        except Exception as error:
            found.append(error)
    return found
