"""What a run's workers tell its driver while they work, and the driver's watch over it: progress, stalls, room."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayemb.progress import Progress
from rayemb.train.clock import Clock
from rayemb.train.sinks import MetricsStream, Run

logger = logging.getLogger(__name__)

# In the order of a step: who is in an earlier one is waited for.
PHASES = ("start", "data", "forward", "exchange", "backward", "step", "report", "evaluate", "checkpoint", "end")
BEAT_S = 1.0
SILENT_S = 10.0  # without a beat, and a process does not run


@dataclass(frozen=True)
class Beat:
    """Where one worker was when it last told."""

    rank: int
    step: int
    phase: str
    pid: int
    node: str
    at: float  # of the log's clock


@dataclass(frozen=True)
class State:
    """What the log knows."""

    message: str
    metrics: dict[str, Any] | None
    beats: dict[int, Beat]
    warnings: tuple[str, ...]  # of this attempt
    still: float  # seconds since a worker last ended a step or its start
    now: float


# Started again after the loss of its node; what it knew of the attempt is then of no use any more.
@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)
class TrainingLog:
    """What the workers of one run have reported so far; lives with the driver, and hands metrics on to the sinks."""

    def __init__(self, run: Run | None = None, sinks: dict[str, Any] | None = None) -> None:
        self._stream = MetricsStream(run, sinks or {}, self._warn) if run else None
        self.rows: list[dict[str, Any]] = []
        self.message = "waiting for workers"
        self.begin()

    def begin(self) -> None:
        """Forgets the workers of the attempt before."""
        self.beats: dict[int, Beat] = {}
        self.warnings: list[str] = []
        self.parts: dict[str, dict[int, tuple[dict[str, int], str | None]]] = {}
        self._moved, self._furthest = time.monotonic(), -1

    def add(self, metrics: dict[str, Any]) -> None:
        """Takes one report."""
        self.rows.append(metrics)
        if self._stream:
            self._stream.add(metrics)

    def resume(self, step: int) -> None:
        """The run goes on after `step`: what was reported of later ones is void."""
        self.rows = [row for row in self.rows if row["step"] <= step]
        if self._stream:
            self._stream.begin(step)

    def close(self) -> None:
        """Waits until the sinks have everything."""
        if self._stream:
            self._stream.close()

    def say(self, message: str, warning: bool = False) -> None:
        """Takes a line about what is going on; a `warning` the driver logs."""
        self.message = message
        if warning:
            self._warn(message)

    def _warn(self, message: str) -> None:
        self.warnings.append(message)

    def beat(self, rank: int, step: int, phase: str, pid: int, node: str) -> None:
        """Takes where a worker is."""
        now = time.monotonic()
        self.beats[rank] = Beat(rank, step, phase, pid, node, now)
        if step > self._furthest or phase == "end":
            self._moved, self._furthest = now, max(step, self._furthest)

    def state(self) -> State:
        """All that a driver asks for at once."""
        now = time.monotonic()
        still = now - self._moved if self.beats else 0.0
        return State(
            self.message, self.rows[-1] if self.rows else None, dict(self.beats), tuple(self.warnings), still, now
        )

    def uploaded(self, name: str, rank: int, files: dict[str, int], problem: str | None) -> None:
        """Takes what a rank has uploaded of a checkpoint, or why it could not."""
        self.parts.setdefault(name, {})[rank] = files, problem

    def uploads(self, name: str) -> dict[int, tuple[dict[str, int], str | None]]:
        """What the ranks have uploaded of a checkpoint so far."""
        return self.parts.get(name, {})


class Pulse:
    """A worker's thread that tells the log where the worker is, and goes on telling while it waits."""

    def __init__(self, log: Any, rank: int) -> None:
        self.step, self.phase = 0, "start"
        self.clock: Clock | None = None
        self._log, self._rank, self._done = log, rank, threading.Event()
        self._node = ray.get_runtime_context().get_node_id()
        self._tell()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def at(self, phase: str, step: int | None = None) -> None:
        """Notes where the worker is; costs nothing, the thread tells."""
        self.phase = phase
        if self.clock is not None:
            self.clock.at(phase)
        if step is not None:
            self.step = step

    def stop(self) -> None:
        """Tells a last time."""
        self._done.set()
        self.phase = "end"
        self._tell()

    def _run(self) -> None:
        while not self._done.wait(BEAT_S):
            self._tell()

    def _tell(self) -> None:
        self._log.beat.remote(self._rank, self.step, self.phase, os.getpid(), self._node)


def laggards(state: State) -> str:
    """Which ranks the others wait for, as a sentence."""
    beats = sorted(state.beats.values(), key=lambda beat: beat.rank)
    silent = [beat for beat in beats if state.now - beat.at > SILENT_S]
    late = silent or _last(beats)
    if not silent and len(late) == len(beats):
        return f"all {len(beats)} ranks wait in {_place(beats[0])}: see to the network and the storage between them"
    who = ", ".join(
        f"rank {beat.rank} (process {beat.pid} on node {beat.node[:8]}) {_doing(beat, state)}" for beat in late
    )
    others = [beat for beat in beats if beat not in late]
    return f"{who}; the others wait in {_place(others[0])}" if others else who


def _doing(beat: Beat, state: State) -> str:
    if state.now - beat.at > SILENT_S:
        return f"has given no sign of life for {state.now - beat.at:.0f} s, last seen in {_place(beat)}"
    return f"is still in {_place(beat)}"


def _place(beat: Beat) -> str:
    return f"the {beat.phase} of step {beat.step + 1}"


def _last(beats: list[Beat]) -> list[Beat]:
    order = {beat.rank: (beat.step, PHASES.index(beat.phase)) for beat in beats}
    behind = min(order.values())
    return [beat for beat in beats if order[beat.rank] == behind]


@ray.remote(num_cpus=0)  # type: ignore[untyped-decorator]
def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def end_workers(state: State) -> None:
    """Ends the workers' processes: a stopped one answers to nothing else, and the others wait for it."""
    for beat in state.beats.values():
        there = NodeAffinitySchedulingStrategy(beat.node, soft=False)
        _kill.options(scheduling_strategy=there).remote(beat.pid)


class Watch:
    """The driver's thread beside a running attempt. `stalled` says afterwards why it ended the attempt, if it did."""

    def __init__(
        self,
        log: Any,
        steps: int,
        progress: Progress | None,
        stall_seconds: float,
        grow: Callable[[], bool] | None,
        every: float,
    ) -> None:
        self.stalled: str | None = None
        self._log, self._steps, self._progress = log, steps, progress
        self._limit, self._grow, self._every = stall_seconds, grow, every
        self._done = threading.Event()
        self._warned = 0

    @contextmanager
    def running(self) -> Iterator[None]:
        """Watches while the block runs."""
        thread = threading.Thread(target=self._run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._done.set()
            thread.join(timeout=10)

    def _run(self) -> None:
        looked = time.monotonic()
        done = False
        while not done:
            # One look more after the end, for what was said last.
            done = self._done.wait(0.5)
            try:
                state: State = ray.get(self._log.state.remote(), timeout=5)
                self._show(state)
                for text in state.warnings[self._warned :]:
                    logger.warning(text)
                self._warned = len(state.warnings)
                if done:
                    return
                if self.stalled is None and state.still > self._limit:
                    self.stalled = f"no step has ended for {state.still:.0f} s: {laggards(state)}"
                    logger.warning("%s; ending the attempt", self.stalled)
                    end_workers(state)
                if self._grow is not None and time.monotonic() - looked > self._every and state.beats:
                    looked = time.monotonic()
                    if self._grow():
                        self._grow = None
            except (ray.exceptions.RayError, TimeoutError) as error:
                logger.debug("the watch has no answer: %s", error)

    def _show(self, state: State) -> None:
        if self._progress is None:
            return
        metrics = state.metrics
        if metrics is None:
            self._progress(0, self._steps, state.message)
        else:
            warm = metrics["temperature"]
            text = f"loss {metrics['loss']:.3f}" + (f", temperature {warm:.3f}" if warm is not None else "")
            self._progress(metrics["step"], self._steps, f"{text}, {metrics['pairs_per_second']:.0f} pairs/s")
