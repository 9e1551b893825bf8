"""Many questions to a shard in one call: each gets what it would get alone."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from rayemb.index import Effort, FilterError, QueryError, Shard, load_manifest
from rayemb.index.selection import Selection
from rayemb.serve.asks import Ask, Told, replies
from rayemb.serve.hop import Unanswered
from rayemb.storage import StorageError
from tests.serve.conftest import World


@pytest.fixture(scope="module")
def shard(world: World) -> Shard:
    return Shard.open(world.index_uri, load_manifest(world.index_uri), 0)


def all_there(updates: int) -> None:
    raise AssertionError("nobody asked for updates")


def ask(shard: Shard, asks: list[Ask], within_s: list[float] | None = None) -> list[Any]:
    with ThreadPoolExecutor(2) as pool:
        return asyncio.run(replies(shard, asks, within_s or [5.0] * len(asks), pool, all_there))


def test_each_gets_what_it_would_get_alone(world: World, shard: Shard) -> None:
    x, star = world.vectors, {"shape": "star"}
    asks = [
        Ask("rows", x[:1], 5),
        Ask("ids", x[1:4], 5),
        Ask("rows", x[4:6], 3, star),
        Ask("rows", x[6:7], 5, None, Effort(nprobe=2)),
        Ask("words", k=4, filter=star, text="red star"),
        Ask("rows", x[7:8], 3, dict(star)),
        Ask("rows", x[:0], 5),
        Ask("key", text=world.rows[3]["id"]),
        Ask("key", text="nobody"),
    ]
    together = ask(shard, asks)
    for each, told in zip(asks, together, strict=True):
        (alone,) = ask(shard, [each])
        if isinstance(told, Told):
            np.testing.assert_array_equal(told.keys, alone.keys)
            np.testing.assert_allclose(told.scores, alone.scores, atol=1e-6)
            assert (told.rows, told.strategy) == (alone.rows, alone.strategy)
        else:
            assert told == alone
    assert together[7:] == [3, None]
    expected = [world.rows[key]["id"] for key in together[1].keys.reshape(-1)]
    assert together[1].ids.to_pylist() == expected
    assert {row["shape"] for row in together[2].rows.values()} == {"star"}


def test_equal_questions_share_a_pass(world: World, shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    answer = shard.answer

    def counted(vectors: Any, *args: Any) -> Any:
        seen.append(len(vectors))
        return answer(vectors, *args)

    monkeypatch.setattr(shard, "answer", counted)
    x = world.vectors
    ask(
        shard,
        [
            Ask("rows", x[:2], 5),
            Ask("ids", x[2:3], 5),
            Ask("rows", x[3:4], 6),
            Ask("rows", x[4:5], 5, {"shape": "star"}),
        ],
    )
    assert sorted(seen) == [1, 1, 3]


def test_what_is_wrong_with_one_is_its_own(world: World, shard: Shard) -> None:
    x = world.vectors
    nothing = np.full((1, 32), np.nan, np.float32)
    good, bad, field, short, endless = ask(
        shard,
        [
            Ask("rows", x[:1], 5),
            Ask("rows", nothing, 5),
            Ask("rows", x[:1], 5, {"nosuch": 1}),
            Ask("rows", x[:1, :7], 5),
            Ask("rows", x[:1], 5, {"text": object()}),
        ],
    )
    assert good.keys.shape == (1, 5)
    assert [type(each) for each in (bad, field, short, endless)] == [QueryError, FilterError, QueryError, FilterError]


def test_those_whose_time_is_over_cost_nothing(world: World, shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = shard.answer

    def slow(*args: Any) -> Any:
        time.sleep(0.2)
        return answer(*args)

    monkeypatch.setattr(shard, "answer", slow)
    with ThreadPoolExecutor(1) as pool:
        asks = [Ask("rows", world.vectors[:1], k) for k in (3, 4, 5)]
        found: list[Any] = asyncio.run(replies(shard, asks, [1.0, 0.1, 5.0], pool, all_there))
    assert found[0].keys.shape == (1, 3)
    assert isinstance(found[1], Unanswered)  # in the queue behind the first
    assert found[2].keys.shape == (1, 5)


def test_what_is_gone_is_left_out_and_nothing_is_said_where_that_is_not_known(world: World, shard: Shard) -> None:
    first = shard.answer(world.vectors[:1], 3).keys[0].tolist()
    gone = Selection(np.ones(shard.rows, bool)).without(shard.keys.at(np.array(first[:1])))

    def alive(updates: int) -> Selection:
        if updates > 1:
            raise StorageError("the log is away")
        return gone

    asks = [
        Ask("rows", world.vectors[:1], 2, updates=1),
        Ask("rows", world.vectors[:1], 3),
        Ask("ids", world.vectors[:1], 3, updates=2),
        Ask("count", updates=1),
        Ask("count", updates=2),
        Ask("held", keys=tuple(first)),
    ]
    with ThreadPoolExecutor(2) as pool:
        found: list[Any] = asyncio.run(replies(shard, asks, [5.0] * len(asks), pool, alive))
    assert found[0].keys[0].tolist() == first[1:]
    assert found[1].keys[0].tolist() == first
    assert found[3] == shard.rows - 1
    assert isinstance(found[2], Unanswered)
    assert isinstance(found[4], Unanswered)
    assert {key: row["id"] for key, row in found[5].items()} == {key: world.rows[key]["id"] for key in first}
