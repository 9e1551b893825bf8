"""The coalescer, the local engine, and the spread engine over parts that are slow, dead or wrong."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from rayemb.index import Effort, FilterError, IndexArtefactError, IndexConfig, Shard, build_index, load_manifest
from rayemb.models import ImageError
from rayemb.serve.asgi import create_app
from rayemb.serve.coalesce import Coalescer
from rayemb.serve.config import ServeConfig, SpreadConfig
from rayemb.serve.deploy import Embedder, ShardServer
from rayemb.serve.errors import EngineUnavailable
from rayemb.serve.limits import set_deadline
from rayemb.serve.local import LocalEngine
from rayemb.serve.spread import SpreadEngine
from tests.serve.conftest import World, draw


class TestCoalescer:
    def test_gives_each_caller_its_results_and_merges_what_waits(self) -> None:
        batches: list[list[int]] = []
        first = threading.Event()

        def work(items: list[int]) -> list[int]:
            batches.append(items)
            if len(batches) == 1:
                first.wait(5)
            return [item * 10 for item in items]

        async def main() -> list[list[int]]:
            with ThreadPoolExecutor(2) as pool:
                coalesce = Coalescer(work, 4, pool)
                lone = asyncio.create_task(coalesce([0]))
                await asyncio.sleep(0.05)
                others = [asyncio.create_task(coalesce([i, -i])) for i in range(1, 6)]
                await asyncio.sleep(0.05)
                first.set()
                return await asyncio.gather(lone, *others)

        results = asyncio.run(main())
        assert results == [[0], *([10 * i, -10 * i] for i in range(1, 6))]
        assert batches[0] == [0]  # a lone query does not wait
        assert [len(batch) for batch in batches] == [1, 4, 4, 2]

    def test_an_exception_goes_to_its_batch_and_the_next_works(self) -> None:
        def work(items: list[int]) -> list[int]:
            if 13 in items:
                raise ValueError("unlucky")
            return items

        async def main() -> None:
            with ThreadPoolExecutor(1) as pool:
                coalesce = Coalescer(work, 8, pool)
                with pytest.raises(ValueError, match="unlucky"):
                    await coalesce([13])
                assert await coalesce([1, 2]) == [1, 2]
                assert await coalesce([]) == []

        asyncio.run(main())

    def test_a_padded_batch_stays_within_its_cells(self) -> None:
        batches: list[list[int]] = []
        first = threading.Event()

        def work(items: list[int]) -> list[int]:
            batches.append(items)
            first.wait(5)
            return items

        async def main() -> list[list[int]]:
            with ThreadPoolExecutor(1) as pool:
                coalesce = Coalescer(work, 8, pool, max_cells=12, weigh=lambda item: item)
                lone = asyncio.create_task(coalesce([1]))
                await asyncio.sleep(0.05)
                others = [asyncio.create_task(coalesce([item])) for item in (3, 2, 4, 5, 2, 20, 1, 1)]
                await asyncio.sleep(0.05)
                first.set()
                return await asyncio.gather(lone, *others)

        results = asyncio.run(main())
        assert [item for (item,) in results] == [1, 3, 2, 4, 5, 2, 20, 1, 1]
        # Three of four is 12; 5 and 2 are 10; what is larger than all room goes alone.
        assert batches == [[1], [3, 2, 4], [5, 2], [20], [1, 1]]

    def test_a_caller_that_left_does_not_harm_the_others(self) -> None:
        async def main() -> None:
            with ThreadPoolExecutor(1) as pool:
                coalesce = Coalescer(lambda items: (time.sleep(0.05), items)[1], 8, pool)
                gone, stays = asyncio.create_task(coalesce([1])), asyncio.create_task(coalesce([2]))
                await asyncio.sleep(0.01)
                gone.cancel()
                assert await stays == [2]
                with pytest.raises(asyncio.CancelledError):
                    await gone

        asyncio.run(main())


def test_local_engine_refuses_an_index_of_another_model(world: World) -> None:
    with pytest.raises(IndexArtefactError, match="was built with model"):
        LocalEngine(world.other_model_uri, world.index_uri)


def test_one_bad_image_fails_alone(world: World, local: LocalEngine) -> None:
    async def main() -> list[Any]:
        good, bad = [draw("red", "star", 50)], [b"nothing"]
        return await asyncio.gather(
            *(local.embed_images(images) for images in (good, bad, good)), return_exceptions=True
        )

    first, second, third = asyncio.run(main())
    assert isinstance(second, ImageError)
    np.testing.assert_allclose(first, world.model.embed_images([draw("red", "star", 50)]), atol=1e-6)
    np.testing.assert_array_equal(first, third)


class Handle:
    """A deployment handle to an object in this process; when `dead`, calls wait for ever, as Serve's do.

    So do the next `stuck` ones, as in a replica that hangs.
    """

    def __init__(self, target: Any) -> None:
        self.target, self.dead, self.stuck, self.calls = target, False, 0, 0

    def __getattr__(self, name: str) -> Any:
        handle = self

        class Method:
            @staticmethod
            async def remote(*args: Any) -> Any:
                handle.calls += 1
                handle.stuck -= 1
                if handle.dead or handle.stuck >= 0:
                    await asyncio.sleep(3600)
                return await getattr(handle.target, name)(*args)

        return Method


class Spread:
    """The real parts of a spread topology, in this process."""

    def __init__(self, world: World, deadline_s: float = 0.3, **settings: Any) -> None:
        manifest, config = load_manifest(world.index_uri), ServeConfig(deadline_s=deadline_s, **settings)
        self.embedder = Handle(Embedder(world.model_uri, manifest.model_digest, config, "image"))
        shards = range(len(manifest.shards))
        self.shards = [Handle(ShardServer(world.index_uri, manifest, i, config)) for i in shards]
        self.engine = SpreadEngine(world.index_uri, manifest, self.embedder, self.shards, config)


def test_spread_equals_local(world: World, local: LocalEngine) -> None:
    async def main() -> None:
        spread = Spread(world).engine
        assert spread.describe() == local.describe()
        for engine in (spread, local):
            with pytest.raises(FilterError, match=r"filter\.nosuch"):
                await engine.search(np.zeros((1, 32), np.float32), 3, {"nosuch": 1})
            with pytest.raises(ImageError):
                await engine.embed_images([b"nothing"])
        texts = ["red circle", "star", "blue"]
        (ours, tokens), (theirs, counted) = await spread.embed_texts(texts), await local.embed_texts(texts)
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
        assert tokens == counted
        picture = draw("pink", "square", 77)
        np.testing.assert_allclose(await spread.embed_images([picture]), await local.embed_images([picture]), atol=1e-6)
        for condition in (None, {"shape": "star"}, {"colour": "nothing"}):
            one, two = await spread.search(ours, 20, condition), await local.search(ours, 20, condition)
            np.testing.assert_array_equal(one.keys, two.keys)
            np.testing.assert_allclose(one.scores, two.scores, atol=1e-6)
            assert {key: one.rows[key] for key in two.rows} == two.rows
            assert one.missing_shards == []
            ids = [await engine.search_ids(ours, 20, condition) for engine in (spread, local)]
            expected = [two.rows[key]["id"] if key >= 0 else None for key in two.keys.reshape(-1).tolist()]
            assert [found.ids.to_pylist() for found in ids] == [expected, expected]
            np.testing.assert_array_equal(ids[0].scores, one.scores)
        # By an id that a search has shown, and by one that none has.
        for number in (int(one.keys.max()), 3, 58):
            assert await spread.image(world.rows[number]["id"]) == world.images[number]
        assert await spread.image("nobody") is None
        assert await spread.missing() == []

    asyncio.run(main())


def test_a_late_call_is_made_again_and_counted(world: World) -> None:
    spread = Spread(world, deadline_s=2, replicas=2, spread=SpreadConfig(hedge=1.0))
    with TestClient(create_app(spread.engine)) as http:
        assert 'rayemb_hedged_total{part="shard-0"} 0.0' in http.get("/metrics").text
        spread.shards[0].stuck = 1
        found = http.post("/v1/search", json={"text": "red star"}).json()
        assert (found["partial"], len(found["hits"])) == (False, 10)
        assert 'rayemb_hedged_total{part="shard-0"} 1.0' in http.get("/metrics").text


def test_by_cell_only_the_owners_of_the_probed_cells_are_asked(world: World, tmp_path: Path) -> None:
    table = load_manifest(world.index_uri).embeddings.uri
    cells = IndexConfig(factory="IVF8,Flat", nprobe=1, shards=3, by="cell", words="text")
    build_index(table, str(tmp_path / "cells"), cells)
    placed = replace(world, index_uri=str(tmp_path / "cells"))
    local = LocalEngine(world.model_uri, placed.index_uri)

    async def main() -> None:
        spread = Spread(placed)
        engine, x = spread.engine, world.vectors[7:8]

        async def asked(search: Any) -> int:
            before = sum(shard.calls for shard in spread.shards)
            found = await search
            assert found.missing_shards == []
            return sum(shard.calls for shard in spread.shards) - before

        assert await asked(engine.search(x, 5)) == 1
        assert await asked(engine.search(x, 5, effort=Effort(nprobe=8))) == 3
        assert await asked(engine.search(x, 5, {"shape": "star"})) == 3
        assert await asked(engine.words_at(None, "star", 5)) == 3
        for width in ({}, {"recall": 1.0}, {"effort": Effort(nprobe=3)}):
            one, two = await engine.search(x, 20, **width), await local.search(x, 20, **width)
            np.testing.assert_array_equal(one.keys, two.keys)
        # A dead shard is missed by those alone that need it.
        owner = next(i for i, shard in enumerate(spread.shards) if 7 in shard.target._shard.keys.listed)
        for i, shard in enumerate(spread.shards):
            shard.dead = i != owner
        assert (await engine.search(x, 5)).missing_shards == []
        wide = await engine.search(x, 5, effort=Effort(nprobe=8))
        assert wide.missing_shards == [f"shard-{i}" for i in range(3) if i != owner]

    asyncio.run(main())


def test_a_dead_shard_is_named_within_the_deadline_and_then_not_waited_for(world: World) -> None:
    async def main() -> None:
        spread = Spread(world, deadline_s=0.3)
        engine, vector = spread.engine, world.vectors[:1]
        spread.shards[1].dead = True
        started = time.perf_counter()
        found = await engine.search(vector, 60, None)
        assert time.perf_counter() - started < 0.6
        assert found.missing_shards == ["shard-1"]
        start = load_manifest(world.index_uri).shards[1].start
        assert set(found.keys[found.keys >= 0]) == set(range(start))

        started, calls = time.perf_counter(), spread.shards[1].calls
        again = await engine.search(vector, 5, None)
        assert time.perf_counter() - started < 0.2  # the breaker is open
        assert spread.shards[1].calls == calls
        assert again.missing_shards == ["shard-1"]
        assert await engine.missing() == ["shard-1"]
        with pytest.raises(EngineUnavailable):  # not "there is no such picture"
            await engine.image(world.rows[-1]["id"])

        spread.shards[1].dead = False
        await asyncio.sleep(0.35)
        assert (await engine.search(vector, 60, None)).missing_shards == []

        spread.shards[0].dead = spread.shards[1].dead = True
        with pytest.raises(EngineUnavailable, match="no shard"):
            await engine.search(vector, 5, None)
        spread.embedder.dead = True
        with pytest.raises(EngineUnavailable, match="embedder"):
            await engine.embed_texts(["a"])

    asyncio.run(main())


def test_a_client_that_waits_less_gets_a_part_and_no_shard_is_blamed(world: World) -> None:
    async def main() -> None:
        spread = Spread(world, deadline_s=5.0)
        spread.shards[1].dead = True
        started = time.perf_counter()
        set_deadline(0.3)
        found = await spread.engine.search_ids(world.vectors[:1], 60, None)
        assert time.perf_counter() - started < 0.3  # in time for an answer
        assert found.missing_shards == ["shard-1"]
        assert {item for item in found.ids.to_pylist() if item} == {
            row["id"] for row in world.rows[: load_manifest(world.index_uri).shards[1].start]
        }
        spread.shards[1].dead = False
        set_deadline(5.0)
        assert (await spread.engine.search(world.vectors[:1], 60, None)).missing_shards == []  # its breaker is shut

    asyncio.run(main())


def test_embedder_refuses_a_model_that_changed(world: World) -> None:
    with pytest.raises(ValueError, match="has changed"):
        Embedder(world.other_model_uri, str(world.model.digest), ServeConfig(), "image")


def test_shards_are_those_of_the_index(world: World) -> None:
    manifest = load_manifest(world.index_uri)
    assert sum(Shard.open(world.index_uri, manifest, i).rows for i in range(2)) == len(world.rows)
