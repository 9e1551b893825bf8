"""Searches that go to the index together: each gets what it would get alone."""

import asyncio
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from rayemb.index import Effort, Hits, Index, QueryError
from rayemb.serve.coalesce import Coalescer
from rayemb.serve.gathered import GatheredSearch
from tests.serve.conftest import World


@pytest.fixture(scope="module")
def index(world: World) -> Iterator[Index]:
    with Index.open(world.index_uri) as opened:
        yield opened


def ask(searches: list[tuple[Any, int, Effort | None]], index: Any) -> list[Any]:
    """The hits of searches that all begin at once, or what each of them raised."""
    gathered = GatheredSearch(1)

    async def main() -> list[Any]:
        calls = (gathered(index, x, k, effort, None, lambda _, hits: hits) for x, k, effort in searches)
        return await asyncio.gather(*calls, return_exceptions=True)

    try:
        return asyncio.run(main())
    finally:
        gathered.close()


def test_each_gets_what_it_would_get_alone(world: World, index: Index) -> None:
    x = world.vectors
    searches: list[tuple[Any, int, Effort | None]] = [
        (x[:1], 5, None),
        (x[1:4], 5, None),
        (x[4:5], 3, None),
        (x[5:6], 5, Effort(nprobe=2)),
        (x[:0], 5, None),
        (x[6:7], 5, None),
    ]
    for (vectors, k, effort), hits in zip(searches, ask(searches, index), strict=True):
        alone = index.search(vectors, k, effort=effort)
        np.testing.assert_array_equal(hits.keys, alone.keys)
        np.testing.assert_allclose(hits.scores, alone.scores, atol=1e-6)
        assert hits.strategies == alone.strategies


def test_what_is_wrong_with_one_is_its_own(world: World, index: Index) -> None:
    x = world.vectors
    nan = np.full_like(x[:1], np.nan)
    found = ask([(x[:1], 5, None), (nan, 5, None), (x[1:2], 5, None), (x[2:3], 0, None)], index)
    for i in (0, 2):
        np.testing.assert_array_equal(found[i].keys, index.search(x[i // 2 : i // 2 + 1], 5).keys)
    assert isinstance(found[1], QueryError)
    assert "NaN" in str(found[1])
    assert isinstance(found[3], QueryError)
    assert found[3].where == "k"


def test_what_waits_shares_a_pass(world: World, index: Index) -> None:
    passes: list[int] = []
    go = threading.Event()

    class Slow:
        """The index, its first passes held until all searches wait."""

        def search(self, vectors: Any, k: int, **options: Any) -> Hits:
            passes.append(len(vectors))
            go.wait(5)
            return index.search(vectors, k, **options)

    gathered, slow = GatheredSearch(1), Slow()

    async def main() -> list[Hits]:
        calls = [
            asyncio.create_task(gathered(slow, world.vectors[i : i + 1], 5, None, None, lambda _, hits: hits))  # type: ignore[arg-type]
            for i in range(60)
        ]
        await asyncio.sleep(0.1)
        go.set()
        return await asyncio.gather(*calls)

    found = asyncio.run(main())
    gathered.close()
    # The lanes' first passes, and the rest in as few as there are lanes.
    assert sum(passes) == 60
    assert len(passes) <= 2 * len(os.sched_getaffinity(0))
    alone = [index.search(world.vectors[i : i + 1], 5).keys for i in range(60)]
    np.testing.assert_array_equal(np.concatenate([hits.keys for hits in found]), np.concatenate(alone))


def test_a_coalescer_may_have_several_calls_at_once() -> None:
    both = threading.Barrier(2)

    def work(items: list[int]) -> list[int]:
        both.wait(5)  # one call alone would break it
        return items

    async def main() -> list[list[int]]:
        with ThreadPoolExecutor(2) as pool:
            coalesce = Coalescer(work, 1, pool, at_once=2)
            return await asyncio.gather(*(coalesce([i]) for i in range(4)))

    assert asyncio.run(main()) == [[0], [1], [2], [3]]
