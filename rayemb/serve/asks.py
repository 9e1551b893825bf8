"""Many questions to one shard in one call: equal ones share a pass, what is wrong with one is its own."""

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayemb.errors import RayembError
from rayemb.index import Effort, Filter, IndexArtefactError, Shard
from rayemb.index.filters import canonical
from rayemb.index.selection import Selection
from rayemb.index.shard import Answer
from rayemb.serve.engine import Vectors
from rayemb.serve.hop import Unanswered
from rayemb.storage import StorageError

logger = logging.getLogger(__name__)

# Id and payload of rows by key.
Rows = Mapping[int, dict[str, Any]]


@dataclass(frozen=True)
class Ask:
    """A question to a shard: the `k` best rows of each vector `(n, D)` or of the words of `text`, or where a row is.

    `want`: `rows` (keys and payloads), `ids` (keys and ids), `words` (as `rows`, by BM25), `key` (of the row with the
    id `text`), `held` (those of the rows `keys` that the shard has), `count` (how many rows it has). `updates`:
    the version of the live updates that searches and counts are of: what of the shard is gone by then is left out.
    """

    want: Literal["rows", "ids", "words", "key", "held", "count"]
    vectors: Vectors | None = None
    k: int = 1
    filter: Filter | None = None
    effort: Effort | None = None
    text: str = ""
    keys: Sequence[int] = ()
    updates: int | None = None

    @property
    def weight(self) -> int:
        """Queries in it, at least 1."""
        return 1 if self.vectors is None else max(1, len(self.vectors))


@dataclass(frozen=True)
class Told:
    """What a shard found for one question: scores and keys `(n, k)`, padded with -inf and -1, and the strategy.

    `rows`: id and payload by key, for `rows` and `words`; `ids`: `n * k` arrow texts, for `ids`.
    """

    scores: Vectors
    keys: NDArray[np.int64]
    strategy: str
    rows: Rows | None = None
    ids: pa.Array | None = None


# The rows that are there at a version of the live updates (None: all). Raises what reading them raises.
Alive = Callable[[int], Selection | None]
# Of `key`: the key, None if the row is not in the shard; of `held`: rows. Never an exception that was raised: what is
# wrong with a question comes as a value, since Ray would wrap it and Serve log it as the replica's failure.
Reply = Told | Rows | int | None | Exception


async def replies(
    shard: Shard, asks: Sequence[Ask], within_s: Sequence[float], pool: Executor, alive: Alive
) -> list[Reply]:
    """The replies to `asks`, in order; Unanswered to those whose `within_s` is over before their turn."""
    until = [time.monotonic() + each for each in within_s]
    groups: dict[Any, list[int]] = {}
    for i, ask in enumerate(asks):
        groups.setdefault(_likeness(ask, i), []).append(i)
    loop = asyncio.get_running_loop()
    work = [
        loop.run_in_executor(pool, _reply, shard, [asks[i] for i in group], [until[i] for i in group], alive)
        for group in groups.values()
    ]
    found: list[Reply] = [None] * len(asks)
    for group, answers in zip(groups.values(), await asyncio.gather(*work), strict=True):
        for i, answer in zip(group, answers, strict=True):
            found[i] = answer
    return found


def _likeness(ask: Ask, i: int) -> Any:
    """Equal for questions that one pass of FAISS can answer."""
    if ask.vectors is None:
        return i
    shape = ask.vectors.shape[1:], ask.k, ask.effort, ask.updates
    try:
        return *shape, canonical(ask.filter) if ask.filter else ""
    except (TypeError, ValueError):
        return i  # a filter that is none: the search says what is wrong with it


def _reply(shard: Shard, asks: Sequence[Ask], until: Sequence[float], alive: Alive) -> list[Reply]:
    now = time.monotonic()
    live = [i for i in range(len(asks)) if until[i] > now]
    found: list[Reply] = [Unanswered("its time was over before its turn")] * len(asks)
    for i, reply in zip(live, _pass(shard, [asks[i] for i in live], alive) if live else [], strict=True):
        found[i] = reply
    return found


def _pass(shard: Shard, asks: Sequence[Ask], alive: Alive) -> list[Reply]:
    first = asks[0]
    try:
        there = None if first.updates is None else alive(first.updates)
        if first.vectors is None:
            return [_alone(shard, first, there)]
        vectors = [ask.vectors for ask in asks if ask.vectors is not None]
        answer = shard.answer(np.concatenate(vectors), first.k, first.filter, first.effort, there)
    except (StorageError, IndexArtefactError) as error:
        # It does not know what is gone: silent, it is missing; speaking, it would be wrong.
        logger.warning("the updates cannot be followed: %s", error)
        return [Unanswered("it cannot follow the updates")] * len(asks)
    except Exception as error:
        if len(asks) == 1:
            return [_portable(error)]
        # One of them, such as a vector with NaN: the others are answered.
        return [_pass(shard, [ask], alive)[0] for ask in asks]
    found: list[Reply] = []
    at = 0
    for ask, own in zip(asks, vectors, strict=True):
        part = slice(at, at := at + len(own))
        found.append(_told(shard, ask, Answer(answer.scores[part], answer.keys[part], answer.strategy)))
    return found


def _portable(error: Exception) -> Exception:
    if isinstance(error, RayembError):
        return error
    logger.error("a search failed", exc_info=error)
    return RuntimeError(f"{type(error).__name__}: {error}")  # of a class that every process can read


def _alone(shard: Shard, ask: Ask, alive: Selection | None) -> Reply:
    if ask.want == "key":
        return shard.key(ask.text)
    if ask.want == "held":
        return rows_of(shard, np.asarray(ask.keys, np.int64))
    if ask.want == "count":
        return rows_alive(shard, alive)
    return tell(shard, ask, alive)


def tell(shard: Shard, ask: Ask, alive: Selection | None = None) -> Told:
    """What a shard finds for one search, among the rows that are `alive` (None: all). Raises QueryError."""
    if ask.vectors is None:
        found = shard.words(ask.text, ask.k, ask.filter, alive)
    else:
        found = shard.answer(ask.vectors, ask.k, ask.filter, ask.effort, alive)
    return _told(shard, ask, found)


def rows_alive(shard: Shard, alive: Selection | None) -> int:
    """How many rows of the shard are there."""
    return shard.rows if alive is None else alive.count


def rows_of(shard: Shard, keys: NDArray[np.int64]) -> Rows:
    """Id and payload of those of the keys that are of the shard."""
    positions = shard.keys.at(keys)
    there = positions >= 0
    return dict(zip(keys[there].tolist(), shard.payload.take(positions[there].tolist()), strict=True))


def _told(shard: Shard, ask: Ask, found: Answer) -> Told:
    if ask.want == "ids":
        return Told(found.scores, found.keys, found.strategy, ids=shard.ids(found.keys))
    kept = np.unique(found.keys[found.keys >= 0])
    return Told(found.scores, found.keys, found.strategy, rows=rows_of(shard, kept))
