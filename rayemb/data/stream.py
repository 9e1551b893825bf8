"""The training stream: a plan of global batches, decoded by actors near each worker, in order, ahead of their use.

One planner per run says which rows make up each step; every worker's decoders fetch their part of it. Of decoded
rows there are never more than `prefetch` steps in the object store, of encoded ones `cache_mb` in each decoder: the
memory of a stream does not depend on the size of its corpora.

Actors, and not Ray Data's own iterator: that one has no position to go on from, and through it the same plan cost more
CPU a row (`jobs/bench/RESULTS.md`). Building, curating and embedding, which have no order to keep, are Ray Data.
"""

import contextlib
import json
import os
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import ray
from numpy.typing import NDArray
from pydantic import Field
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayemb import storage
from rayemb.config import Config
from rayemb.data.attributes import Attributes
from rayemb.data.corpus import Corpus, CorpusError, Kind
from rayemb.data.decode import (
    BadRow,
    ColumnReader,
    Decoder,
    DecodeSettings,
    Member,
    Piece,
    merged,
)
from rayemb.data.mix import CorpusEntry, MixConfig
from rayemb.data.plan import GlobalBatch, Planner
from rayemb.data.shared import Shared, SharedPieces
from rayemb.models import TextTokenizer

BEHIND = 64  # steps that a worker may be behind the first one before the planner has forgotten them


class LoaderConfig(Config):
    """How rows get to the workers: nothing of it changes what they get."""

    decoders: int = Field(1, ge=1, description="processes that decode for each worker")
    cpus_per_decoder: float = Field(0.5, gt=0, description="CPUs that each of them takes in the cluster")
    prefetch: int = Field(4, ge=1, description="steps that are decoded ahead of their use")
    cache_mb: int = Field(256, ge=1, description="encoded rows that each decoder keeps for the next batches, MiB")
    shared: str | None = Field(
        None,
        pattern=r"^[A-Za-z0-9._-]+$",
        description="a name under which trainings on one machine share decoded rows; null: none. A sweep's trials do",
    )
    shared_mb: int = Field(1024, ge=1, description="of those at most, MiB of each machine's temporary folder")


@dataclass(frozen=True)
class StreamSettings:
    """All that decides what a stream yields. `entries` have their URIs; `state`: where to begin, null for the start.

    `until`: the stream pauses after so many steps of the run; null: it does not.
    """

    entries: Mapping[str, CorpusEntry]
    mix: MixConfig
    batch_size: int
    seed: int
    state: dict[str, Any] | None = None
    until: int | None = None


def open_members(entries: Mapping[str, CorpusEntry]) -> list[Member]:
    """The corpora of a mixture; reads manifests and footers, O(files).

    Raises CorpusError for one that is missing, has no such split, or is of another kind than one that it would
    share batches with.
    """
    members = []
    for name, entry in entries.items():
        if entry.uri is None:
            raise CorpusError("no uri", where=f"train.corpora.{name}.uri")
        corpus = Corpus.open(entry.uri)
        kind: Kind = "text" if entry.identical else corpus.kind
        members.append(Member(entry, kind, corpus.row_groups(entry.split), corpus.image_limits))
    return members


class StepPiece(NamedTuple):
    """What a decoder is to do for one step, and, for the worker, where the run stands after it."""

    pieces: list[Piece]
    step: int
    last: bool
    rows: int  # of the global batch
    state: dict[str, Any]
    pause: bool  # the workers are to stop after this step; all of them hear it at the same one


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class PlanServer:
    """The planner of a run. Started again after a failure it plans the same batches anew."""

    def __init__(
        self, settings: StreamSettings, members: Sequence[Member], tokenizer: TextTokenizer, world: int
    ) -> None:
        names = list(settings.entries)
        readers = {
            name: ColumnReader(member, tokenizer, _attributes(member.entry))
            for name, member in zip(names, members, strict=True)
        }
        groups = {name: member.groups for name, member in zip(names, members, strict=True)}
        self._planner = Planner(
            settings.entries,
            groups,
            readers,
            settings.mix,
            batch_size=settings.batch_size,
            seed=settings.seed,
            state=settings.state,
        )
        self._world = world
        self._batches: dict[int, GlobalBatch] = {}
        self._asked, self._pause_after = -1, (settings.until or 0) - 1
        self._ahead = self._planner.next()

    def step_piece(self, step: int, rank: int, decoders: int) -> StepPiece | None:
        """This rank's part of `step`, in as many pieces as it has decoders; None beyond the end."""
        if 0 <= self._pause_after < step:
            return None
        self._asked = max(self._asked, step)
        while self._ahead is not None and self._ahead.step <= step:
            self._batches[self._ahead.step] = self._ahead
            self._ahead = self._planner.next()
        if step not in self._batches:
            return None
        batch = self._batches[step]
        for old in [known for known in self._batches if known < step - BEHIND]:
            del self._batches[old]
        last = self._ahead is None and step == max(self._batches)
        rows = sum(len(part.ordinals) for part in batch.parts)
        pieces = _pieces(batch, rank, self._world, decoders)
        return StepPiece(pieces, step, last, rows, batch.state, step == self._pause_after)

    def pause(self) -> None:
        """Ends the stream for all workers after the first step that none of them has asked for yet."""
        if self._pause_after < 0 <= self._asked:
            self._pause_after = self._asked + 1

    def left_out(self) -> dict[str, int]:
        """Rows of each corpus that no batch could take so far."""
        streams = zip(self._planner.names, self._planner.streams, strict=True)
        return {name: stream.cursor.left_out for name, stream in streams}


def _attributes(entry: CorpusEntry) -> Attributes | None:
    uri = entry.sampler.attributes
    return None if uri is None or entry.uri is None else Attributes(uri, Corpus.open(entry.uri), entry.split)


def _pieces(batch: GlobalBatch, rank: int, world: int, decoders: int) -> list[Piece]:
    """A rank's rows of a batch: neighbours in storage, so that few row groups are read twice, evenly dealt out."""
    dealt: list[list[tuple[int, NDArray[np.int64]]]] = [[] for _ in range(decoders)]
    for corpus, ordinals in batch.parts:
        mine = np.array_split(np.sort(ordinals), world)[rank]
        for parts, piece in zip(dealt, np.array_split(mine, decoders), strict=True):
            parts.append((corpus, piece))
    return [Piece(batch.step, tuple(parts)) for parts in dealt]


@ray.remote(max_restarts=-1, max_task_retries=-1)
class DecodeServer:
    """A process that decodes. What it is asked twice it answers the same, so that a killed one costs time alone."""

    def __init__(self, members: Sequence[Member], settings: DecodeSettings, shared: Shared | None = None) -> None:
        decoder = Decoder(members, settings)
        self._decoder = SharedPieces(decoder, shared) if shared else decoder
        self._behind = ThreadPoolExecutor(1, "rayemb-decoder", _leave_cores)

    def decode(
        self, planned: StepPiece | None, number: int, calm: bool
    ) -> tuple[dict[str, NDArray[Any]], list[BadRow]] | None:
        """The arrays of piece `number` of a step, and its bad rows; `calm`: in the time that nobody else wants."""
        if planned is None:
            return None
        piece = planned.pieces[number]
        return self._behind.submit(self._decoder, piece).result() if calm else self._decoder(piece)


def _leave_cores() -> None:
    """This thread gets the time that nobody else wants."""
    # Linux alone has it, where a sandbox may forbid it. No niceness instead: elsewhere that is the whole process's.
    with contextlib.suppress(AttributeError, OSError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


class Calm:
    """Whether decoders are so far ahead of their worker that they may wait until it waits for the others.

    A step takes as long as its slowest worker, and one whose core a decoder takes holds up all. But what only gets the
    time that nobody wants may starve beside a stranger's program: each time that a worker is held up by it, twice as
    many steps without waiting must have gone by before it is tried again.
    """

    def __init__(self) -> None:
        self._steps, self._needed = 0, 8
        self._since = time.monotonic()

    def __bool__(self) -> bool:
        return self._steps >= self._needed

    def took(self, waited: float) -> None:
        """A batch has come, for which the worker waited so many seconds."""
        now = time.monotonic()
        # A quarter of its time: less is no hold-up, but batches that are fetched, and workers out of step.
        if waited > 0.25 * (now - self._since):
            self._needed *= 2 if self else 1
            self._steps = 0
        else:
            self._steps += 1
        self._since = now


class Batch(NamedTuple):
    """A worker's rows of one step, read-only (see `Decoder` for the arrays), and where the run stands after it.

    step: counts from 0. rows: of the whole global batch. state: what a stream needs to go on after this step.
    bad: this worker's rows that could not be used. waited: seconds until the batch was there. pause: the stream ends
    here for now (see `PlanServer.pause`).
    """

    step: int
    arrays: dict[str, NDArray[Any]]
    rows: int
    state: dict[str, Any]
    bad: list[BadRow]
    last: bool
    waited: float
    pause: bool


@dataclass(frozen=True)
class Stream:
    """The handle of a run's stream, made by the driver and taken to the workers."""

    planner: Any
    members: Any  # reference to list[Member]
    decode: DecodeSettings
    loader: LoaderConfig
    start: int
    world: int
    shared: Shared | None = None

    def batches(self, rank: int, stop: int) -> Iterator[Batch]:
        """This rank's part of steps `start .. stop - 1`, decoded ahead; ends earlier where the mixture does."""
        decoders = self._decoders()
        ahead: deque[tuple[Any, list[Any]]] = deque()
        calm = Calm()
        for step in range(self.start, stop + self.loader.prefetch):
            if step < stop:
                planned = self.planner.step_piece.remote(step, rank, len(decoders))
                ahead.append((planned, [d.decode.remote(planned, n, bool(calm)) for n, d in enumerate(decoders)]))
            if step < self.start + self.loader.prefetch - 1 and step < stop - 1:
                continue
            if not ahead:
                return
            began = time.monotonic()
            plan, pieces = ahead.popleft()
            found = ray.get(pieces)
            if found[0] is None:
                return
            waited = time.monotonic() - began
            calm.took(waited)
            step_piece: StepPiece = ray.get(plan)
            bad = [row for _, rows in found for row in rows]
            yield Batch(
                step_piece.step,
                merged([arrays for arrays, _ in found]),
                step_piece.rows,
                step_piece.state,
                bad,
                step_piece.last or step_piece.step == stop - 1,
                waited,
                step_piece.pause,
            )

    def _decoders(self) -> list[Any]:
        # Not in the placement group of the training, which has no CPU for them; on this node if it has room.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        remote = DecodeServer.options(num_cpus=self.loader.cpus_per_decoder, scheduling_strategy=here)  # type: ignore[attr-defined]
        return [remote.remote(self.members, self.decode, self.shared) for _ in range(self.loader.decoders)]


def open_stream(
    settings: StreamSettings,
    members: Sequence[Member],
    decode: DecodeSettings,
    loader: LoaderConfig,
    *,
    world: int,
) -> Stream:
    """A stream for `world` workers; its planner lives as long as the handle is held. Needs a connected Ray."""
    reference = ray.put(list(members))
    # With the driver, so that the loss of another node leaves it alone.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    server = PlanServer.options(scheduling_strategy=here)  # type: ignore[attr-defined]
    planner = server.remote(settings, reference, decode.tokenizer, world)
    start = int((settings.state or {}).get("step", 0))
    return Stream(planner, reference, decode, loader, start, world, _shared(settings, decode, loader))


def _shared(settings: StreamSettings, decode: DecodeSettings, loader: LoaderConfig) -> Shared | None:
    """Where decoded rows are shared, if they are: under a key of all that decides what a row becomes."""
    if loader.shared is None:
        return None
    classes = None if decode.classes is None else storage.sha256_bytes(decode.classes.tobytes())
    own: list[Any] = [decode.tokenizer.to_json(), decode.tokenizer.max_length, decode.image_size, decode.seed, classes]
    own += [decode.augment.model_dump(mode="json"), decode.prompts.model_dump(mode="json")]
    for entry in settings.entries.values():
        # Which rows are asked for a piece says itself.
        about = entry.model_dump(mode="json", exclude={"weight", "fraction", "sampler"})
        own.append([Corpus.open(str(entry.uri)).digest, about])
    key = storage.sha256_bytes(json.dumps(own, sort_keys=True).encode())[:24]
    return Shared(loader.shared, key, loader.shared_mb << 20)
