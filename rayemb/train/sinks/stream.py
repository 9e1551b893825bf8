"""One stream of metrics into several sinks, each in a thread of its own, so that none waits for another."""

import contextlib
import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

from rayemb.train.sinks.base import Row, Run, Sink

logger = logging.getLogger(__name__)

AT_ONCE = 1000


class MetricsStream:
    """Hands rows on to sinks; never waits for them and never raises for them.

    A sink that fails goes on being tried with later rows. `failures` counts, by name; `say` is told once for each.
    """

    def __init__(self, run: Run, sinks: dict[str, Callable[[], Sink]], say: Callable[[str], None]) -> None:
        self.failures: dict[str, int] = {}
        self._say, self._run = say, run
        self._pipes = [_Pipe(name, make, run, self._failed) for name, make in sinks.items()]

    def begin(self, step: int | None) -> None:
        """Rows after `step` come next; what there is of later ones is void. None: nothing is void."""
        for pipe in self._pipes:
            pipe.put(("begin", step))

    def add(self, row: Row) -> None:
        """Takes one row."""
        for pipe in self._pipes:
            pipe.put(("row", dict(row)))

    def close(self, timeout: float = 60.0) -> None:
        """Waits, so long at most for each sink, until all rows are written."""
        for pipe in self._pipes:
            pipe.put(("close", None))
        for pipe in self._pipes:
            pipe.thread.join(timeout)
            if pipe.thread.is_alive():
                self._failed(pipe.name, TimeoutError(f"not done after {timeout:g} s"))

    def _failed(self, name: str, error: BaseException) -> None:
        self.failures[name] = self.failures.get(name, 0) + 1
        text = f"the metrics sink {name} failed ({type(error).__name__}: {' '.join(str(error).split())[:300]})"
        if self.failures[name] == 1:
            self._say(f"{text}; the training goes on without it")
        else:
            logger.debug("%s, for the %d. time", text, self.failures[name])


class _Pipe:
    def __init__(self, name: str, make: Callable[[], Sink], run: Run, failed: Callable[[str, BaseException], None]):
        self.name, self._make, self._run, self._failed = name, make, run, failed
        self._queue: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._sink: Sink | None = None
        self.thread = threading.Thread(target=self._work, name=f"sink-{name}", daemon=True)
        self.thread.start()

    def put(self, item: tuple[str, Any]) -> None:
        self._queue.put(item)

    def _work(self) -> None:
        rows: list[Row] = []
        while True:
            kind, value = self._queue.get()
            if kind == "row":
                rows.append(value)
                # What has come meanwhile goes with it: a slow sink is called less often.
                if not self._queue.empty() and len(rows) < AT_ONCE:
                    continue
            self._try(self._write, rows)
            rows = []
            if kind == "begin":
                self._try(self._begin, value)
            elif kind == "close":
                self._try(self._close)
                return

    def _try(self, call: Callable[..., None], *args: Any) -> None:
        try:
            call(*args)
        except Exception as error:  # whatever a tracker does, the training goes on
            self._failed(self.name, error)

    def _begin(self, step: int | None) -> None:
        if self._sink is None:
            self._sink = self._make()
        sink = self._sink
        with contextlib.ExitStack() as undo:
            undo.callback(self._forget)
            sink.begin(self._run, step)
            undo.pop_all()

    def _forget(self) -> None:
        self._sink = None

    def _write(self, rows: Sequence[Row]) -> None:
        if rows and self._sink is not None:
            self._sink.write(rows)

    def _close(self) -> None:
        if self._sink is not None:
            self._sink.close()
