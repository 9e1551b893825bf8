"""GrpcClient: what Client gives, with the same errors; tried again when and only when that helps."""

import threading
import time
from typing import Any

import numpy as np
import pytest

from rayemb.serve import Client, GrpcClient, ServeConfig, ServeError
from rayemb.serve.local import LocalEngine
from tests.serve.conftest import World, draw
from tests.serve.rpc.conftest import Both, serving
from tests.serve.test_bad_requests import Slow

CHANGING = {"timings_ms", "request_id"}


@pytest.mark.parametrize(
    "fields",
    [
        {"text": "red star", "k": 3},
        {"image": draw("blue", "circle", 60)},
        {"text": "red", "image": draw("blue", "circle", 60), "filter": {"round": True}},
        {"positive": ["red/star 64?"], "negative": ["pink/star 40?"]},
        {"text": "star", "group_by": "colour", "group_size": 2, "k": 4},
        {"text": "star", "hybrid": {"fusion": "rrf"}, "effort": {"nprobe": 2}},
    ],
    ids=lambda fields: "+".join(fields),
)
def test_searches_are_clients(both: Both, fields: dict[str, Any]) -> None:
    with GrpcClient(both.address) as grpc, Client(both.url) as http:
        found, expected = grpc.search(**fields), http.search(**fields)
    assert found.model_dump(exclude=CHANGING) == expected.model_dump(exclude=CHANGING)
    assert found.hits


def test_a_picture_may_be_a_file(both: Both, picture: Any) -> None:
    with GrpcClient(both.address) as grpc:
        assert grpc.search(image=picture).hits == grpc.search(image=picture.read_bytes()).hits


@pytest.mark.parametrize("payload", [False, True])
def test_batches_are_clients(both: Both, world: World, payload: bool) -> None:
    digest = str(world.model.digest)
    asked: list[tuple[Any, dict[str, Any]]] = [
        (world.vectors[:5], {"model": digest}),
        (["red", "blue star"], {"filter": {"shape": "star"}}),
        (["red"], {"filter": {"shape": "none"}}),
        (world.vectors[:1].tolist(), {"model": digest, "k": 50}),
    ]
    with GrpcClient(both.address) as grpc, Client(both.url) as http:
        for queries, more in asked:
            found, expected = (client.search_batch(queries, payload=payload, **more) for client in (grpc, http))
            a, b = vars(found), vars(expected)
            scores = a.pop("scores"), b.pop("scores")
            assert all(map(np.array_equal, *scores))
            assert len(scores[0]) == len(scores[1]) == len(queries)
            assert [each.dtype for each in scores[0]] == [np.float32] * len(queries)
            assert {key: a[key] for key in a.keys() - CHANGING} == {key: b[key] for key in b.keys() - CHANGING}
            assert set(found.timings_ms) == set(expected.timings_ms)


def test_the_rest_is_clients(both: Both) -> None:
    with GrpcClient(both.address) as grpc, Client(both.url) as http:
        assert np.array_equal(grpc.embed(["a", "b c"]), http.embed(["a", "b c"]))
        assert np.array_equal(grpc.embed(["a"], kind="document"), http.embed(["a"], kind="document"))
        assert grpc.embed(["a"]).dtype == np.float32
        assert grpc.index() == http.index()


def test_errors_are_clients(both: Both, world: World) -> None:
    wrong: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("search", ("a",), {"k": 51}),
        ("search", (), {}),
        ("search", ("a",), {"filter": {"nosuch": 1}}),
        ("search_batch", (world.vectors[:1],), {"model": "0" * 64}),
        ("search_batch", (world.vectors[:1],), {}),  # refused by the client itself
        ("search_batch", (world.vectors[0],), {}),
        ("embed", (["a"] * 9,), {}),
        ("search", ("a",), {"filter": {"size": float("nan")}}),
    ]
    with GrpcClient(both.address) as grpc, Client(both.url) as http:
        for name, given, more in wrong:
            problems = []
            for client in (grpc, http):
                with pytest.raises(ServeError) as caught:
                    getattr(client, name)(*given, **more)
                problems.append((caught.value.what, caught.value.status, caught.value.field))
                assert bool(caught.value.request_id) == bool(caught.value.status)
            assert problems[0] == problems[1]
        with pytest.raises(ServeError, match=r"SearchRequest.*nosuch"):
            grpc.search("a", nosuch=1)


def test_nobody_there() -> None:
    with GrpcClient("127.0.0.1:1", retries=0) as grpc, pytest.raises(ServeError, match="no answer") as caught:
        grpc.index()
    assert (caught.value.status, caught.value.where) == (0, "127.0.0.1:1")


def test_it_comes_again_when_it_was_told_to() -> None:
    engine = Slow()
    config = ServeConfig(max_ongoing_requests=1, max_queued_requests=0, retry_after_s=1)
    with serving(engine, config) as both, GrpcClient(both.address) as grpc, GrpcClient(both.address, retries=0) as once:
        first = threading.Thread(target=grpc.search, args=("a",))
        first.start()
        deadline = time.monotonic() + 20
        while both.app.state.gateway._places.locked() is False:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        with pytest.raises(ServeError, match="too many requests") as caught:
            once.search("a")
        assert caught.value.status == 503
        started = time.monotonic()
        threading.Timer(0.3, engine.go.set).start()
        assert [hit.id for hit in grpc.search("a").hits] == ["a"]
        assert 1.0 <= time.monotonic() - started < 10
        first.join(20)


def test_its_patience_is_the_deadline_and_not_tried_again() -> None:
    with serving(Slow()) as both, GrpcClient(both.address, timeout_s=0.5, retries=5) as grpc:
        started = time.monotonic()
        with pytest.raises(ServeError) as caught:
            grpc.search("a")
        assert caught.value.status == 504
        assert time.monotonic() - started < 3


def test_a_collection_that_is_not_there(local: LocalEngine) -> None:
    with (
        serving(local) as both,
        GrpcClient(both.address, collection="nosuch") as grpc,
        pytest.raises(ServeError, match="'nosuch'") as caught,
    ):
        grpc.search("a")
    assert caught.value.status == 404
