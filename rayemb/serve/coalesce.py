"""Concurrent queries in one pass through the model, without making a lone query wait."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import Generic, TypeVar, cast

A = TypeVar("A")
B = TypeVar("B")


class Coalescer(Generic[A, B]):
    """Calls `work(items) -> results` in a thread, `at_once` calls at a time; what comes meanwhile is the next batch.

    A lone query starts at once; under load the batches grow by themselves, up to `max_batch` items, and to
    `max_cells`: their number times the largest `weigh(item)`, which is what a padded batch costs. An exception of
    `work` goes to every caller in its batch, so `work` must not fail for one item's sake.
    """

    def __init__(
        self,
        work: Callable[[list[A]], list[B]],
        max_batch: int,
        executor: Executor,
        *,
        max_cells: int | None = None,
        weigh: Callable[[A], int] = lambda _: 1,
        at_once: int = 1,
    ) -> None:
        self._work, self._max_batch, self._executor = work, max_batch, executor
        self._max_cells, self._weigh = max_cells or max_batch, weigh
        self._waiting: deque[tuple[A, asyncio.Future[B]]] = deque()
        self._at_once = at_once
        self._runners: set[asyncio.Task[None]] = set()

    async def __call__(self, items: Sequence[A]) -> list[B]:
        """The results of `items`, in order."""
        loop = asyncio.get_running_loop()
        futures: list[asyncio.Future[B]] = [loop.create_future() for _ in items]
        self._waiting += zip(items, futures, strict=True)
        if len(self._runners) < self._at_once:
            # Kept on self: the loop itself holds tasks only weakly.
            runner = loop.create_task(self._run())
            self._runners.add(runner)
        return list(await asyncio.gather(*futures))

    async def _run(self) -> None:
        try:
            while self._waiting:
                batch = self._gathered()
                if batch:
                    await self._compute(batch)
        finally:
            # Here and not when the task is done: what comes in between would find a runner that takes nothing more.
            self._runners.discard(cast("asyncio.Task[None]", asyncio.current_task()))

    def _gathered(self) -> list[tuple[A, asyncio.Future[B]]]:
        batch: list[tuple[A, asyncio.Future[B]]] = []
        heaviest = 0
        while self._waiting and len(batch) < self._max_batch:
            item, future = self._waiting[0]
            # A caller that went away (client gone, deadline) has cancelled its future.
            if not future.done():
                heaviest = max(heaviest, self._weigh(item))
                if batch and heaviest * (len(batch) + 1) > self._max_cells:
                    break
                batch.append((item, future))
            self._waiting.popleft()
        return batch

    async def _compute(self, batch: list[tuple[A, asyncio.Future[B]]]) -> None:
        try:
            loop = asyncio.get_running_loop()
            results = await loop.run_in_executor(self._executor, self._work, [item for item, _ in batch])
            for (_, future), result in zip(batch, results, strict=True):
                if not future.done():
                    future.set_result(result)
        except Exception as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)
