"""A hop to a deployment: what waits goes together, a late call is made twice, a dead part is not waited for."""

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException

from rayemb.serve.limits import remaining

logger = logging.getLogger(__name__)

A = TypeVar("A")
B = TypeVar("B")
# Of a client's own deadline, the rest being for the merge and the answer.
_SHARE_OF_CLIENT = 0.9
# Calls whose latencies say what is late; before the first few, a part of the deadline says it.
_RECENT, _FEW = 128, 16
_LATE, _LATE_AT_FIRST = 0.95, 0.25
# Second calls that a quiet time may save up for.
_SAVED = 5.0
# Of a deadline: what makes a call stuck, and what is the whole of it but for the rounding of timers.
_STUCK, _WHOLE = 0.5, 0.98
# Where so great a part of the calls is answered in so short a part of the deadline, a replica is well.
_PROMPT, _PROMPTLY = 0.25, 0.25
# How much of what calls usually take is forgotten with each.
_FORGOTTEN = 0.2
# Late calls beside those in time, for each of those.
_ASIDE = 3
_FAILURES = (RayError, RayServeException, BackPressureError)


class Unanswered(Exception):  # noqa: N818 - what became of a question, not a mistake
    """A part did not answer: it is dead, it failed, or its time is over."""


class Breaker:
    """Keeps requests from waiting, one after another, for a part that is known to be dead.

    After a failure it is open for `rest_s`; then one call may try while the others still go without.
    """

    def __init__(self, rest_s: float) -> None:
        self._rest_s = rest_s
        self._open_until = 0.0
        self._failed = False

    def allows(self) -> bool:
        """Whether to call now."""
        if not self._failed:
            return True
        now = time.monotonic()
        if now < self._open_until:
            return False
        self._open_until = now + self._rest_s
        return True

    def report(self, well: bool) -> None:
        """What became of a call."""
        self._failed = not well
        if self._failed:
            self._open_until = time.monotonic() + self._rest_s


class Hedge:
    """When a call is late, and whether it may be made a second time (Dean and Barroso, The Tail at Scale, 2013).

    Late is what takes longer than 95 % of the recent calls did, and than `floor_s`. Second calls are `share` of all
    at most, but for a few saved up in quiet times, and for calls that are stuck: a part that is slow under load does
    not get twice the load.
    """

    def __init__(self, share: float, floor_s: float, deadline_s: float) -> None:
        self._share, self._floor_s, self._deadline_s = share, floor_s, deadline_s
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._credit = min(1.0, _SAVED * share)

    def late_s(self) -> float:
        """How long a call may take before it is late, in s."""
        if len(self._recent) < _FEW:
            return max(self._floor_s, self._deadline_s * _LATE_AT_FIRST)
        return max(self._floor_s, self._recent_s(_LATE))

    def one_is_well(self) -> bool:
        """Whether a quarter of the recent calls was answered promptly: what hangs hangs in another replica.

        Where all are slow, as under load, or nothing is known yet, none is.
        """
        return len(self._recent) >= _FEW and self._recent_s(_PROMPT) < self._deadline_s * _PROMPTLY

    def _recent_s(self, share: float) -> float:
        return sorted(self._recent)[math.ceil(share * len(self._recent)) - 1]

    def called(self) -> None:
        """A call was made."""
        self._credit = min(_SAVED, self._credit + self._share)

    def answered(self, seconds: float) -> None:
        """A call was answered after `seconds`."""
        self._recent.append(seconds)

    def spend(self, *, stuck: bool) -> bool:
        """Whether a call may be made a second time now; that one is then spent.

        `stuck`: half of its deadline is over. Where others are answered promptly it hangs in a replica, and only a
        second call saves its answers; under load all are slow, and it would add to that.
        """
        if stuck and self.one_is_well():
            return True
        if self._credit < 1.0:
            return False
        self._credit -= 1.0
        return True


@dataclass
class _Asked(Generic[A, B]):
    """A question that waits: until when, and who waits for its answer."""

    item: A
    until: float
    future: "asyncio.Future[B]"


class Hop(Generic[A, B]):
    """Calls to one part of the service, each with all the questions that wait.

    A lone question goes at once; while `abreast` calls are under way the next batch gathers. After a call it gathers on
    for as long as calls usually take, unless all who are at work wait already: parts that answer quickly would else be
    called for a query or two each time, and under load the calls are what costs. A call that is late no longer counts
    as one of them, so that what is stuck does not hold up the rest.

    Args:
        name: of the part, for the log.
        call: `call(items, within_s)` gives as many answers; an exception among them is of that item alone. `within_s`
            has the seconds that each item has left.
        deadline_s: what a call may take.
        most: the sum of `weigh(item)` that one call carries; an item above it goes alone.
        abreast: calls under way at once.
        hedge: when a call is late and may be made twice.
        spare: whether there are replicas enough for a second call; one that failed is then made again too.
        at_work: how many questions there are, here and at other parts, which may come here next.
    """

    def __init__(
        self,
        name: str,
        call: Callable[[list[A], list[float]], Awaitable[Sequence[B | Exception]]],
        *,
        deadline_s: float,
        most: int,
        weigh: Callable[[A], int],
        abreast: int,
        hedge: Hedge,
        spare: bool,
        at_work: Callable[[], int] = lambda: 0,
    ) -> None:
        self._name, self._call, self._deadline_s = name, call, deadline_s
        self._most, self._weigh, self._abreast = most, weigh, abreast
        self._hedge, self._spare = hedge, spare
        self._at_work = at_work
        self._ended = self._usual_s = 0.0
        self._breaker = Breaker(deadline_s)
        self._waiting: deque[_Asked[A, B]] = deque()
        self._calls = self._calls_aside = 0
        self._woken = False
        self._held: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self.hedged = 0

    def allows(self) -> bool:
        """Whether the part is worth asking now; while it is known to be dead, one question at times tries it."""
        return self._breaker.allows()

    async def __call__(self, item: A) -> B:
        """The answer to `item`. Raises Unanswered, or the exception that the part gave as the answer."""
        # A client with less time left than that gets what there is by then: a part rather than nothing.
        within_s = min(self._deadline_s, remaining(math.inf) * _SHARE_OF_CLIENT)
        loop = asyncio.get_running_loop()
        asked = _Asked[A, B](item, time.monotonic() + within_s, loop.create_future())
        self._waiting.append(asked)
        self._wake()
        try:
            return await asyncio.wait_for(asked.future, within_s)
        except TimeoutError as error:
            if within_s >= self._deadline_s and not self._answered_since(asked.until - within_s):  # else it had no time
                self._breaker.report(False)
            raise Unanswered(f"{self._name} did not answer within {within_s:.3g} s") from error

    def _answered_since(self, then: float) -> bool:
        # A node that is gone hangs for as long as Ray takes to notice; the other replicas answer meanwhile.
        return self._spare and self._ended > then

    def _wake(self) -> None:
        if not self._woken and self._calls < self._abreast:
            self._woken = True
            # After all that is ready now: the queries of a batch that was just embedded wake up together. In no
            # request's context: Serve cancels what was called in that of a client that left.
            asyncio.get_running_loop().call_soon(self._pump, context=Context())

    def _pump(self, *, held: bool = False) -> None:
        self._woken = False
        held_s = self._ended + self._usual_s - time.monotonic()
        if not held and self._waiting and held_s > 0 and self._at_work() > len(self._waiting):
            if self._held is None:
                self._held = asyncio.get_running_loop().call_later(held_s, self._go_on)
            return
        if self._held is not None:
            self._held.cancel()
            self._held = None
        while self._waiting and self._calls < self._abreast:
            batch = self._gathered()
            if batch:
                self._calls += 1
                # Kept on self: the loop itself holds tasks only weakly.
                task = asyncio.get_running_loop().create_task(self._send(batch))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    def _go_on(self) -> None:
        self._held = None
        self._pump(held=True)

    def _gathered(self) -> list[_Asked[A, B]]:
        batch: list[_Asked[A, B]] = []
        weight = 0
        while self._waiting:
            asked = self._waiting[0]
            # A caller that went away (client gone, deadline) has cancelled its future.
            if not asked.future.done():
                weight += self._weigh(asked.item)
                if batch and weight > self._most:
                    break
                batch.append(asked)
            self._waiting.popleft()
        return batch

    async def _send(self, batch: list[_Asked[A, B]]) -> None:
        call = _Call(self, batch)
        try:
            answers = await call.answers()
        except _Abandoned:
            pass  # nobody waits any more, and what became of it is not known
        except (TimeoutError, *_FAILURES) as error:
            logger.warning("%s did not answer (%s)", self._name, type(error).__name__)
            lost = list(batch)
            if not (isinstance(error, TimeoutError) and self._answered_since(call.started)):
                self._breaker.report(False)
                lost += self._waiting  # they would wait for nothing
            for asked in lost:
                _fail(asked, Unanswered(f"{self._name} did not answer ({type(error).__name__})"))
        except Exception as error:
            logger.exception("a call to %s failed", self._name)
            for asked in batch:
                _fail(asked, error)
        else:
            self._breaker.report(True)
            self._ended = time.monotonic()
            # Late ones do not count: the next batch would wait for what hangs.
            took_s = min(call.took_s, self._hedge.late_s())
            self._usual_s += (took_s - self._usual_s) * _FORGOTTEN
            for asked, answer in zip(batch, answers, strict=True):
                if isinstance(answer, Exception):
                    _fail(asked, answer)
                elif not asked.future.done():
                    asked.future.set_result(answer)
        finally:
            call.ended()
            self._wake()


class _Abandoned(Exception):  # noqa: N818
    """Nobody waits for the answers of a call."""


class _Call(Generic[A, B]):
    """One call of a batch, made a second time where that helps."""

    def __init__(self, hop: Hop[A, B], batch: list[_Asked[A, B]]) -> None:
        self._hop, self._batch = hop, batch
        self.started = time.monotonic()
        self._tasks: set[asyncio.Task[Sequence[B | Exception]]] = set()
        self._tries = 0
        self._aside = False

    async def answers(self) -> Sequence[B | Exception]:
        """The first answers that come. Raises TimeoutError, _Abandoned, or what the last call failed with."""
        hop, gone = self._hop, _all_done(self._batch)
        until, late_at = self.started + hop._deadline_s, self.started + hop._hedge.late_s()
        stuck_at = self.started + hop._deadline_s * _STUCK
        hop._hedge.called()
        self._ask()
        try:
            while True:
                ahead = [at for at in (late_at, stuck_at, until) if at > time.monotonic()]
                wait_s = min(ahead, default=until) - time.monotonic()
                waited: set[asyncio.Future[Any]] = {*self._tasks, gone}
                await asyncio.wait(waited, timeout=max(0.0, wait_s), return_when=asyncio.FIRST_COMPLETED)
                failure: BaseException | None = None
                for task in [task for task in self._tasks if task.done()]:
                    self._tasks.discard(task)
                    failure = task.exception()
                    if failure is None:
                        hop._hedge.answered(time.monotonic() - self.started)
                        return task.result()
                now = time.monotonic()
                if gone.done() and now < self.started + hop._deadline_s * _WHOLE:
                    raise _Abandoned
                if gone.done() or now >= until:
                    hop._hedge.answered(hop._deadline_s)
                    raise TimeoutError
                if failure is not None and not self._tasks:
                    if self._tries > 1 or not hop._spare or not isinstance(failure, _FAILURES):
                        raise failure
                    self._ask()  # its replica died, and another one lives
                elif now >= late_at:
                    self._become_late()
                    if self._tries == 1 and hop._spare and hop._hedge.spend(stuck=now >= stuck_at):
                        hop.hedged += 1
                        self._ask()
        finally:
            for task in self._tasks:
                task.cancel()

    @property
    def took_s(self) -> float:
        """The seconds since it was made."""
        return time.monotonic() - self.started

    def ended(self) -> None:
        """The call is under way no longer."""
        if self._aside:
            self._hop._calls_aside -= 1
        else:
            self._hop._calls -= 1

    def _become_late(self) -> None:
        hop = self._hop
        if not self._aside and hop._calls_aside < _ASIDE * hop._abreast:
            self._aside = True
            hop._calls_aside += 1
            hop._calls -= 1
            hop._wake()

    def _ask(self) -> None:
        self._tries += 1
        task = asyncio.get_running_loop().create_task(self._made())
        # Looked at, or a failure that comes after the answer would be logged as nobody's.
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        self._tasks.add(task)

    async def _made(self) -> Sequence[B | Exception]:
        now = time.monotonic()
        call = self._hop._call([asked.item for asked in self._batch], [asked.until - now for asked in self._batch])
        try:
            return await call
        except asyncio.CancelledError:
            # Serve goes on with a call whose answer nobody awaits, unless it is told.
            cancel = getattr(call, "cancel", None)
            if cancel is not None:
                cancel()
            raise


def _all_done(batch: Sequence[_Asked[A, B]]) -> "asyncio.Future[None]":
    """Done as soon as nobody waits for any of `batch`."""
    gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    left = len(batch)

    def leave(_: object) -> None:
        nonlocal left
        left -= 1
        if not left and not gone.done():
            gone.set_result(None)

    for asked in batch:
        asked.future.add_done_callback(leave)
    return gone


def _fail(asked: _Asked[A, B], error: Exception) -> None:
    if not asked.future.done():
        asked.future.set_exception(error)
