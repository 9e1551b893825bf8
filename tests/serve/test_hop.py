"""Hops: batches that gather while a call is under way, second calls, deadlines, a part that is dead."""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import pytest
from ray.exceptions import ActorDiedError

from rayemb.serve.hop import Breaker, Hedge, Hop, Unanswered
from rayemb.serve.limits import set_deadline


class Part:
    """Replicas of a part; each call goes to the next, and does what `behaviour[replica]` says."""

    def __init__(self, *behaviour: Any) -> None:
        self.behaviour, self.calls, self.cancelled = list(behaviour), [], 0

    async def __call__(self, items: list[int], within_s: list[float]) -> Sequence[int | Exception]:
        number = len(self.calls) % len(self.behaviour)
        self.calls.append(items)
        self.within_s = within_s
        does = self.behaviour[number]
        if isinstance(does, Exception):
            raise does
        try:
            await asyncio.sleep(does)
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return [ValueError("unlucky") if item == 13 else item * 10 for item in items]


def hop(part: Part, **changes: Any) -> Hop[int, int]:
    settings = {"deadline_s": 2.0, "most": 4, "weigh": lambda _: 1, "abreast": 1, "spare": False}
    hedge = Hedge(changes.pop("share", 0.0), changes.pop("floor_s", 10.0), 2.0)
    return Hop("part", part, hedge=hedge, **{**settings, **changes})


async def asked(hop: Hop[int, int], *items: int) -> list[Any]:
    return await asyncio.gather(*map(hop, items), return_exceptions=True)


def test_what_waits_goes_together_and_a_lone_question_at_once() -> None:
    async def main() -> None:
        part = Part(0.1)
        calls = hop(part)
        lone = asyncio.create_task(calls(0))
        await asyncio.sleep(0.02)
        found = await asked(calls, *range(1, 7))
        assert [await lone, *found] == [0, 10, 20, 30, 40, 50, 60]
        assert part.calls == [[0], [1, 2, 3, 4], [5, 6]]
        # What wakes up together goes together, though nothing is under way.
        await asked(calls, 7, 8, 9)
        assert part.calls[3:] == [[7, 8, 9]]
        assert calls._calls == calls._calls_aside == 0

    asyncio.run(main())


def test_after_a_call_a_batch_gathers_as_long_as_calls_take_where_others_are_at_work() -> None:
    async def main() -> None:
        at_work = 1
        part = Part(0.05)
        calls = hop(part, most=10, at_work=lambda: at_work)
        for i in range(20):
            assert await calls(i + 100) == (i + 100) * 10
        started = time.monotonic()
        await calls(1)
        assert time.monotonic() - started < 0.09  # alone: at once
        at_work = 3
        part.calls.clear()
        first = asyncio.create_task(calls(2))
        await asyncio.sleep(0.01)
        assert part.calls == []
        second = asyncio.create_task(calls(3))
        assert [await first, await second] == [20, 30]
        assert part.calls == [[2, 3]]
        assert time.monotonic() - started < 0.5
        # All who are at work wait: nothing is to be gained.
        third = asyncio.create_task(calls(4))
        await asyncio.sleep(0.001)
        at_work = 2
        fourth = asyncio.create_task(calls(5))
        await asyncio.sleep(0.01)
        assert part.calls[1:] == [[4, 5]]
        assert [await third, await fourth] == [40, 50]

    asyncio.run(main())


def test_a_heavy_question_goes_alone_and_as_many_calls_as_replicas() -> None:
    async def main() -> None:
        part = Part(0.05)
        assert await asked(hop(part, weigh=lambda item: item, abreast=2), 3, 9, 1, 2) == [30, 90, 10, 20]
        assert part.calls == [[3], [9], [1, 2]]

    asyncio.run(main())


def test_an_error_is_of_its_question_alone() -> None:
    async def main() -> None:
        part = Part(0.0)
        first, second, third = await asked(hop(part), 1, 13, 2)
        assert (first, third) == (10, 20)
        assert isinstance(second, ValueError)
        assert part.calls == [[1, 13, 2]]

    asyncio.run(main())


def test_each_question_has_its_own_deadline() -> None:
    async def main() -> None:
        part = Part(0.4)
        calls = hop(part)

        async def within(seconds: float, item: int) -> int:
            set_deadline(seconds)
            return await calls(item)

        started = time.monotonic()
        hasty, patient = await asyncio.gather(
            asyncio.create_task(within(0.2, 1)), asyncio.create_task(within(1.5, 2)), return_exceptions=True
        )
        assert isinstance(hasty, Unanswered)
        assert patient == 20
        assert part.calls == [[1, 2]]
        assert part.within_s[0] <= 0.2 < part.within_s[1] <= 1.5
        assert calls.allows()  # the part is not to blame for a hasty client
        # One whose time is over before its turn is not sent.
        slow = asyncio.create_task(calls(3))
        await asyncio.sleep(0.02)
        assert isinstance((await asyncio.gather(within(0.1, 4), return_exceptions=True))[0], Unanswered)
        assert await slow == 30
        assert part.calls[1:] == [[3]]
        assert time.monotonic() - started < 2

    asyncio.run(main())


def test_a_call_that_nobody_waits_for_is_cancelled() -> None:
    async def main() -> None:
        part = Part(5.0)
        calls = hop(part)
        tasks = [asyncio.create_task(calls(i)) for i in range(2)]
        await asyncio.sleep(0.02)
        tasks[0].cancel()
        await asyncio.sleep(0.02)
        assert part.cancelled == 0
        tasks[1].cancel()
        await asyncio.sleep(0.02)
        assert part.cancelled == 1
        assert calls._calls == 0
        assert calls.allows()

    asyncio.run(main())


def test_a_late_call_is_made_twice_and_the_first_answer_wins() -> None:
    async def main() -> None:
        part = Part(5.0, 0.01)
        calls = hop(part, share=0.5, floor_s=0.05, spare=True)
        calls._hedge._recent.extend([0.01] * 50)
        started = time.monotonic()
        assert await asked(calls, 1, 2) == [10, 20]
        assert time.monotonic() - started < 1
        assert part.calls == [[1, 2], [1, 2]]
        await asyncio.sleep(0.01)
        assert (part.cancelled, calls.hedged) == (1, 1)

    asyncio.run(main())


def test_second_calls_are_a_share_of_all() -> None:
    async def main() -> None:
        part = Part(0.03)
        calls = hop(part, share=0.05, floor_s=0.001, spare=True)
        calls._hedge._recent.extend([0.001] * 128)
        calls._hedge.answered = lambda seconds: None  # type: ignore[method-assign]  # all stay late
        for i in range(100, 160):
            assert await calls(i) == i * 10
        assert 2 <= calls.hedged <= 4
        assert len(part.calls) == 60 + calls.hedged

    asyncio.run(main())


def test_late_follows_the_recent_latencies() -> None:
    hedge = Hedge(0.05, 0.02, 2.0)
    assert hedge.late_s() == 0.5  # nothing is known yet
    for i in range(1, 101):
        hedge.answered(i / 100)
    assert hedge.late_s() == 0.95
    for _ in range(200):
        hedge.answered(0.001)
    assert hedge.late_s() == 0.02


def test_a_stuck_call_is_made_again_whatever_the_share_unless_all_are_slow() -> None:
    async def main() -> None:
        part = Part(5.0, 0.01)
        calls = hop(part, floor_s=0.05, spare=True, deadline_s=0.4)
        calls._hedge._deadline_s = 0.4
        calls._hedge._recent.extend([0.01] * 50)
        started = time.monotonic()
        assert await calls(1) == 10
        assert 0.2 <= time.monotonic() - started < 0.4
        part.calls.clear()
        calls._hedge._recent.extend([0.3] * 128)
        with pytest.raises(Unanswered):
            await calls(1)
        assert len(part.calls) == 1

    asyncio.run(main())


def test_while_one_of_several_replicas_hangs_every_question_is_answered() -> None:
    async def main() -> None:
        part = Part(5.0, 0.01, 0.01, 0.01)  # every third question comes to the one that hangs, and then to another
        calls = hop(part, floor_s=0.05, spare=True, deadline_s=0.4)
        calls._hedge._deadline_s = 0.4
        calls._hedge._recent.extend([0.01] * 50)
        for i in range(100, 118):
            assert await calls(i) == i * 10
        assert len(part.calls) == 24

    asyncio.run(main())


def test_what_hangs_twice_does_not_shut_out_a_part_that_answers_others() -> None:
    async def main() -> None:
        part = Part(5.0, 0.01, 5.0)
        calls = hop(part, floor_s=0.05, spare=True, deadline_s=0.2, abreast=2)
        calls._hedge._deadline_s = 0.2
        calls._hedge._recent.extend([0.01] * 50)
        hangs = asyncio.create_task(calls(1))
        await asyncio.sleep(0.02)
        assert await calls(2) == 20
        with pytest.raises(Unanswered):
            await hangs
        assert part.calls == [[1], [2], [1]]
        assert calls.allows()
        # Where nobody is answered meanwhile it is.
        part.behaviour = (5.0,)
        with pytest.raises(Unanswered):
            await calls(3)
        assert not calls.allows()

    asyncio.run(main())


def test_a_lone_question_to_a_dead_part_opens_the_breaker() -> None:
    async def main() -> None:
        calls = hop(Part(5.0), deadline_s=0.1)
        with pytest.raises(Unanswered):
            await calls(1)
        assert not calls.allows()

    asyncio.run(main())


def test_without_a_spare_replica_nothing_is_made_twice() -> None:
    async def main() -> None:
        part = Part(0.1)
        calls = hop(part, share=1.0, floor_s=0.01)
        calls._hedge._recent.extend([0.01] * 50)
        assert await calls(1) == 10
        assert part.calls == [[1]]

    asyncio.run(main())


def test_a_stuck_call_does_not_hold_up_what_comes_behind() -> None:
    async def main() -> None:
        part = Part(5.0, 0.01)
        calls = hop(part, floor_s=0.05)
        calls._hedge._recent.extend([0.01] * 50)
        stuck = asyncio.create_task(calls(1))
        await asyncio.sleep(0.01)
        started = time.monotonic()
        assert await calls(2) == 20
        assert time.monotonic() - started < 1
        stuck.cancel()
        await asyncio.sleep(0.02)
        assert calls._calls == calls._calls_aside == 0

    asyncio.run(main())


def test_a_replica_that_dies_costs_no_answer_where_another_lives() -> None:
    async def main() -> None:
        part = Part(ActorDiedError(), 0.01)
        calls = hop(part, spare=True)
        assert await asked(calls, 1, 2) == [10, 20]
        assert part.calls == [[1, 2], [1, 2]]
        alone = hop(Part(ActorDiedError()))
        assert [type(each) for each in await asked(alone, 1, 2)] == [Unanswered, Unanswered]
        assert not alone.allows()

    asyncio.run(main())


def test_a_dead_part_fails_all_that_wait_and_is_tried_again_later() -> None:
    async def main() -> None:
        part = Part(5.0)
        calls = hop(part, deadline_s=0.2, most=1)
        started = time.monotonic()
        assert {type(each) for each in await asked(calls, 1, 2, 3)} == {Unanswered}
        assert time.monotonic() - started < 0.5
        assert not calls.allows()
        part.behaviour = [0.0]
        await asyncio.sleep(0.25)
        assert [calls.allows(), calls.allows()] == [True, False]
        assert await calls(4) == 40
        assert calls.allows()

    asyncio.run(main())


def test_breaker_lets_one_through_after_its_rest() -> None:
    breaker = Breaker(0.05)
    assert breaker.allows()
    breaker.report(False)
    assert not breaker.allows()
    time.sleep(0.06)
    assert [breaker.allows(), breaker.allows()] == [True, False]
    breaker.report(True)
    assert breaker.allows()


def test_a_bug_in_a_call_reaches_its_askers() -> None:
    async def main() -> None:
        calls = hop(Part(KeyError("bug")), spare=True)
        with pytest.raises(KeyError, match="bug"):
            await calls(1)
        assert calls.allows()

    asyncio.run(main())
