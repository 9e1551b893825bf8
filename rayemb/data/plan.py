"""Which rows make up each global batch: a function of the seed and the position, known before anything is decoded.

Nothing here depends on how many workers there are, on blocks or on time. A planner's state is a few integers per
corpus (and the ordinals of rows kept back as duplicates), so that a run goes on exactly where its checkpoint stands,
with any number of workers.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayemb.data.corpus import CorpusError, RowGroup
from rayemb.data.keys import keys_of
from rayemb.data.mix import CorpusEntry, MixConfig, apportioned, drawn, in_turn, shares
from rayemb.data.samplers import Arrangement, Sampler, Window

Ordinals = NDArray[np.int64]
ReadColumn = Callable[[Sequence[RowGroup], str], NDArray[np.generic]]
# Rows kept back for want of a batch without their like, in batches; older ones are left out of the epoch.
MOST_WAITING = 8
MOST_TRIED = 16


@dataclass
class Cursor:
    """Where a corpus's stream stands. `waiting`: ordinals of rows that were kept back as duplicates."""

    epoch: int = 0
    window: int = 0
    offset: int = 0
    waiting: list[int] = field(default_factory=list)
    taken: int = 0  # rows, altogether
    left_out: int = 0  # rows that no batch could take
    ended: bool = False


class Part(NamedTuple):
    """Rows of one corpus (its position among the corpora) in a global batch."""

    corpus: int
    ordinals: Ordinals


class GlobalBatch(NamedTuple):
    """The rows of one step over all ranks, and the planner's state after it."""

    step: int
    parts: tuple[Part, ...]
    state: dict[str, Any]


class Rows(NamedTuple):
    """Rows `(n,)` of a corpus and, where a batch has none twice, their keys `(n, C)` int64 of C columns."""

    ordinals: Ordinals
    keys: NDArray[np.int64]

    def of(self, indexes: Sequence[int]) -> "Rows":
        """These rows alone."""
        at = np.array(indexes, dtype=np.int64)
        return Rows(self.ordinals[at], self.keys[at])


class Seen:
    """The keys that are in a batch already. A row's keys of different columns never equal each other."""

    def __init__(self) -> None:
        self._keys: set[int] = set()

    def admitted(self, rows: Rows, most: int) -> tuple[list[int], list[int]]:
        """Indexes of the first rows, `most` at most, that share no key with the batch or each other; the others."""
        chosen: list[int] = []
        again: list[int] = []
        for index, keys in enumerate(rows.keys.tolist()):
            if len(chosen) == most:
                return chosen, [*again, *range(index, len(rows.ordinals))]
            if self._keys.isdisjoint(keys):
                self._keys.update(keys)
                chosen.append(index)
            else:
                again.append(index)
        return chosen, again


class RowStream:
    """The endless (or one-epoch) stream of one corpus's rows, window after window.

    An epoch permutes the row groups anew and cuts them into windows; the sampler arranges each. Seeking to a cursor
    reads nothing but the columns that the sampler and the distinct keys need of that one window.
    """

    def __init__(
        self,
        name: str,
        groups: Sequence[RowGroup],
        sampler: Sampler,
        read: ReadColumn,
        *,
        size: int,
        seed: int,
        repeat: bool,
        distinct: Sequence[str] = (),
        cursor: Cursor | None = None,
    ) -> None:
        self.groups, self.sampler, self.size, self.repeat = groups, sampler, size, repeat
        self.cursor = cursor or Cursor()
        self._read, self._distinct = read, tuple(distinct)
        # By name, so that a corpus more or less in the mixture leaves the others' order as it is.
        self._seed = [seed, int(keys_of([name])[0])]
        self._rows = np.array([group.rows for group in groups], dtype=np.int64)
        self._epoch: tuple[int, list[NDArray[np.int64]]] | None = None
        self._window: tuple[tuple[int, int], _Arranged] | None = None
        self._waiting = self._kept_back()

    @property
    def rows(self) -> int:
        """Rows of an epoch."""
        return int(self._rows.sum())

    def take(self, number: int, seen: Seen | None = None) -> Ordinals:
        """The next `number` rows; fewer at the end, in a batch of the sampler's own making, or for want of others.

        Where rows are to be distinct, those that share a key with `seen` are kept back for the next batch. After 16
        times as many tries the batch stays short: there may be no others.
        """
        if not self._distinct:
            return self._count(self._next(number).ordinals)
        seen = seen or Seen()
        chosen: list[Ordinals] = []
        again: list[Rows] = []
        missing, tried = number, 0
        flush = self.cursor.ended
        fresh = self._waiting
        while True:
            these, others = seen.admitted(fresh, missing)
            chosen.append(fresh.ordinals[these])
            again.append(fresh.of(others))
            missing -= len(these)
            whole = self.sampler.whole_batches and missing < number
            if not missing or tried >= MOST_TRIED * number or whole:
                break
            fresh = self._next(missing)
            tried += len(fresh.ordinals)
            if not len(fresh.ordinals):
                break
        # Moved into the next batch they would break what a sampler made it for; at the end there is no next one.
        self._keep_back(_joined(again), 0 if self.sampler.whole_batches or flush else MOST_WAITING * self.size)
        return self._count(np.concatenate(chosen))

    def _keep_back(self, rows: Rows, most: int) -> None:
        """Makes these rows wait for the next batch, the latest `most` of them."""
        over = max(0, len(rows.ordinals) - most)
        self.cursor.left_out += over
        self._waiting = Rows(rows.ordinals[over:], rows.keys[over:])
        self.cursor.waiting = self._waiting.ordinals.tolist()

    def _kept_back(self) -> Rows:
        """The cursor's waiting rows with their keys, which are read again."""
        waiting = np.array(self.cursor.waiting, dtype=np.int64)
        starts = np.array([group.first for group in self.groups], dtype=np.int64)
        at = np.searchsorted(starts, waiting, side="right") - 1
        used, inverse = np.unique(at, return_inverse=True)
        groups = [self.groups[i] for i in used]
        offsets = np.cumsum([0, *(group.rows for group in groups)])[:-1]
        return Rows(waiting, self._keys(groups)[offsets[inverse] + waiting - starts[at]])

    def _keys(self, groups: Sequence[RowGroup]) -> NDArray[np.int64]:
        """The keys `(n, C)` of all rows of these groups, salted by column: a query may equal a text and is no copy."""
        rows = sum(group.rows for group in groups)
        if not rows or not self._distinct:
            return np.zeros((rows, len(self._distinct)), dtype=np.int64)
        salts = keys_of(self._distinct)
        columns = [self._read(groups, column) ^ salt for column, salt in zip(self._distinct, salts, strict=True)]
        return np.stack(columns, axis=1).astype(np.int64)

    def _count(self, rows: Ordinals) -> Ordinals:
        self.cursor.taken += len(rows)
        return rows

    def _next(self, number: int) -> Rows:
        """The next `number` rows as the sampler gives them, moving the cursor."""
        parts: list[Rows] = []
        missing, empty = number, 0
        while missing and not self.cursor.ended:
            arranged = self._arranged()
            stop = min(arranged.stop(self.cursor.offset), self.cursor.offset + missing)
            if stop > self.cursor.offset:
                these = slice(self.cursor.offset, stop)
                parts.append(Rows(arranged.ordinals[these], arranged.keys[these]))
                missing -= stop - self.cursor.offset
                self.cursor.offset = stop
                empty = 0
            if self.cursor.offset >= len(arranged.ordinals):
                empty += self._advance(arranged)
            if empty > 1:
                raise CorpusError(
                    f"an epoch of {self.rows} rows has no batch of {number} for the sampler {self._name}",
                    where="train.corpora",
                    fix="a smaller batch_size, a larger window_rows, or another sampler",
                )
            if parts and self.sampler.whole_batches:
                break
        return _joined(parts) if parts else Rows(np.zeros(0, dtype=np.int64), self._keys([]))

    @property
    def _name(self) -> str:
        return str(getattr(self.sampler, "name", type(self.sampler).__name__))

    def _advance(self, arranged: "_Arranged") -> int:
        """Moves to the next window; 1 if that began an epoch."""
        self.cursor.left_out += arranged.rows - len(arranged.ordinals)
        self.cursor.window, self.cursor.offset = self.cursor.window + 1, 0
        if self.cursor.window < len(self._windows()):
            return 0
        if not self.repeat:
            self.cursor.ended = True
            return 0
        self.cursor.epoch, self.cursor.window = self.cursor.epoch + 1, 0
        return 1

    def _windows(self) -> list[NDArray[np.int64]]:
        """The epoch's windows, each the indexes of its row groups; O(row groups)."""
        if self._epoch is None or self._epoch[0] != self.cursor.epoch:
            order = np.random.default_rng([*self._seed, self.cursor.epoch]).permutation(len(self._rows))
            number = np.maximum(np.cumsum(self._rows[order]) - 1, 0) // self.sampler.window_rows
            self._epoch = self.cursor.epoch, np.split(order, np.flatnonzero(np.diff(number)) + 1)
        return self._epoch[1]

    def _arranged(self) -> "_Arranged":
        at = (self.cursor.epoch, self.cursor.window)
        if self._window is None or self._window[0] != at:
            groups = [self.groups[i] for i in self._windows()[self.cursor.window]]
            ordinals = np.concatenate([np.arange(g.first, g.first + g.rows) for g in groups])
            rng = np.random.default_rng([*self._seed, *at])
            window = Window(len(ordinals), lambda column: self._read(groups, column), ordinals)
            arrangement = self.sampler.arrange(window, self.size, rng)
            self._window = at, _Arranged(ordinals, self._keys(groups), arrangement)
        return self._window[1]


def _joined(parts: Sequence[Rows]) -> Rows:
    return Rows(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


class _Arranged:
    """A window as its sampler arranged it."""

    def __init__(self, ordinals: Ordinals, keys: NDArray[np.int64], arrangement: Arrangement) -> None:
        self.ordinals, self.keys = ordinals[arrangement.order], keys[arrangement.order]
        self.rows, self._ends = len(ordinals), arrangement.ends

    def stop(self, offset: int) -> int:
        """Where the batch that begins at `offset` must end at the latest."""
        if self._ends is None or offset >= len(self.ordinals):
            return len(self.ordinals)
        return int(self._ends[np.searchsorted(self._ends, offset, side="right")])


class Planner:
    """The global batches of a run, one after the other."""

    def __init__(
        self,
        entries: Mapping[str, CorpusEntry],
        groups: Mapping[str, Sequence[RowGroup]],
        read: Mapping[str, ReadColumn],
        mix: MixConfig,
        *,
        batch_size: int,
        seed: int,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        """`groups[name]`: the row groups of each corpus; `read[name]` reads a column of some of them.

        Raises CorpusError for a corpus without rows.
        """
        self.names, self.mix, self.batch_size, self.seed = list(entries), mix, batch_size, seed
        self.step = 0 if state is None else int(state["step"])
        self.streams: list[RowStream] = []
        for name, entry in entries.items():
            chosen = groups[name][: max(1, round(len(groups[name]) * entry.fraction))]
            if not sum(group.rows for group in chosen):
                raise CorpusError("the split has no rows", where=f"train.corpora.{name}.split")
            self.streams.append(
                RowStream(
                    name,
                    chosen,
                    entry.sampler,
                    read[name],
                    size=batch_size,
                    seed=seed,
                    repeat=mix.exhausted == "repeat",
                    distinct=mix.distinct,
                    cursor=Cursor(**state["corpora"][name]) if state else None,
                )
            )
        self.shares = shares(entries, [stream.rows for stream in self.streams], mix.temperature)
        self._credit = np.array(state["credit"] if state else [0.0] * len(self.streams))

    @property
    def state(self) -> dict[str, Any]:
        """What another planner of the same config needs to go on from here; fits JSON."""
        # Not by `asdict`, which copies the waiting rows one by one.
        corpora = {name: {**vars(stream.cursor)} for name, stream in zip(self.names, self.streams, strict=True)}
        return {"step": self.step, "credit": self._credit.tolist(), "corpora": corpora}

    def __iter__(self) -> Iterator[GlobalBatch]:
        """The batches from here on; ends where the mixture says so."""
        while (batch := self.next()) is not None:
            yield batch

    def next(self) -> GlobalBatch | None:
        """The next batch; None at the end."""
        parts: list[Part] = []
        while not parts:
            if not self._alive().any():
                return None
            parts = self._take()
        self.step += 1
        return GlobalBatch(self.step - 1, tuple(parts), self.state)

    def _alive(self) -> NDArray[np.bool_]:
        ended = np.array([stream.cursor.ended and not stream.cursor.waiting for stream in self.streams])
        if self.mix.exhausted == "stop" and ended.any():
            return np.zeros_like(ended)
        return ~ended

    def _take(self) -> list[Part]:
        alive = self._alive()
        share = np.where(alive, self.shares, 0.0)
        share /= share.sum()
        rng = np.random.default_rng([self.seed, self.step, int(alive.sum())])
        if self.mix.batches == "mixed":
            counts = apportioned(share, self.batch_size, rng)
        else:
            one = in_turn(share, self._credit) if self.mix.order == "round_robin" else drawn(share, rng)
            counts = np.zeros(len(share), dtype=np.int64)
            counts[one] = self.batch_size
        seen = Seen()
        parts = []
        for corpus in np.flatnonzero(counts):
            rows = self.streams[corpus].take(int(counts[corpus]), seen)
            if len(rows):
                parts.append(Part(int(corpus), rows))
        return parts
