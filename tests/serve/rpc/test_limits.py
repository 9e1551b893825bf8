"""Calls and the limits: keys, overload, deadlines, clients that leave, messages that are too large."""

import json
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import httpx

from rayemb.serve import ServeConfig
from rayemb.serve.keys import new_key
from rayemb.serve.limits import remaining
from rayemb.serve.local import LocalEngine
from rayemb.serve.rpc.messages import SearchRequest
from tests.serve.rpc.conftest import Both, Refused, Stub, serving
from tests.serve.test_bad_requests import Slow

Code = grpc.StatusCode


def test_keys(local: LocalEngine, config: ServeConfig, tmp_path: Path) -> None:
    uri = str(tmp_path / "keys.json")
    secrets = {
        "ann": new_key(uri, "ann"),
        "other": new_key(uri, "other", collections=("other",)),
        "slow": new_key(uri, "slow", per_second=0.5),
        "small": new_key(uri, "small", max_body_bytes=50),
    }

    def of(name: str) -> list[tuple[str, str]]:
        return [("authorization", f"Bearer {secrets.get(name, name)}")]

    log = tmp_path / "access.log"
    changes = {"keys": uri, "access_log": str(log)}
    with serving(local, config.model_copy(update=changes)) as both, both.stub() as stub:
        question = SearchRequest(text="red star", k=1)
        assert stub("Health").status == "ok"  # load balancers have no key
        assert len(stub("Search", question, metadata=[*of("ann"), ("x-request-id", "mine")]).hits) == 1
        for metadata in ([], of("nobody"), [("authorization", "ann")]):
            for name in ("Search", "SearchBatch", "Embed", "Index"):
                refused = stub.refused(name, metadata=metadata)
                assert (refused.code, refused.status) == (Code.UNAUTHENTICATED, 401)
        refused = stub.refused("Search", question, metadata=of("other"))
        assert (refused.code, refused.status) == (Code.PERMISSION_DENIED, 403)
        refused = stub.refused("Search", SearchRequest(text="x" * 60), metadata=of("small"))
        assert (refused.code, refused.field, refused.status) == (Code.INVALID_ARGUMENT, "body", 413)
        stub("Search", question, metadata=of("slow"))
        refused = stub.refused("Search", question, metadata=of("slow"))
        assert (refused.code, refused.status, refused.retry_s) == (Code.RESOURCE_EXHAUSTED, 429, 2)
        assert refused.trailing["grpc-retry-pushback-ms"] == "2000"
        metrics = httpx.get(f"{both.url}/metrics", headers={"Authorization": f"Bearer {secrets['ann']}"}).text
    assert 'rayemb_requests_total{method="GRPC",route="/v1/search",status="200"} 2.0' in metrics
    assert 'rayemb_key_requests_total{key="ann",status="200"}' in metrics
    text = log.read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    (mine,) = [line for line in lines if line["request_id"] == "mine"]
    assert (mine["method"], mine["route"], mine["key"], mine["status"]) == ("GRPC", "/v1/search", "ann", 200)
    assert mine["bytes_in"] == question.ByteSize()
    assert all(secret not in text for secret in secrets.values())
    assert "red star" not in text


def test_overload_is_refused_at_once_and_says_when_to_come_again() -> None:
    engine = Slow()
    config = ServeConfig(max_ongoing_requests=2, max_queued_requests=3, retry_after_s=7)
    with serving(engine, config) as both, both.stub() as stub, ThreadPoolExecutor(12) as pool:
        calls = [pool.submit(stub, "Search", SearchRequest(text="a")) for _ in range(12)]
        until(lambda: sum(call.done() for call in calls) >= 7)
        assert stub("Health").status == "ok"
        engine.go.set()
        problems = [call.exception() for call in calls]
    refused = [Refused.of(problem) for problem in problems if problem is not None]
    assert len(refused) == 7
    for each in refused:
        assert (each.code, each.reason, each.retry_s) == (Code.RESOURCE_EXHAUSTED, "OVERLOADED", 7)
        assert each.trailing["grpc-retry-pushback-ms"] == "7000"


def test_a_call_beyond_all_places_is_refused_before_the_app_is_asked() -> None:
    engine = Slow()
    config = ServeConfig(max_ongoing_requests=1, max_queued_requests=0)
    with serving(engine, config) as both, both.stub() as stub, ThreadPoolExecutor(90) as pool:
        calls = [pool.submit(stub, "Search", SearchRequest(text="a"), timeout=30) for _ in range(90)]
        until(lambda: sum(call.done() for call in calls) >= 89)
        engine.go.set()
        codes = [problem.code() for call in calls if (problem := call.exception()) is not None]
    assert codes == [Code.RESOURCE_EXHAUSTED] * 89


class Patient(Slow):
    """Says how long it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[float] = []

    async def embed_texts(self, texts: Sequence[str]) -> tuple[Any, int]:
        self.given.append(remaining(1000.0))
        return await super().embed_texts(texts)


def test_the_calls_deadline_is_the_requests() -> None:
    engine = Patient()
    with serving(engine, ServeConfig(request_timeout_s=20)) as both, both.stub() as stub:
        refused = stub.refused("Search", SearchRequest(text="a"), timeout=0.5)
        assert refused.code is Code.DEADLINE_EXCEEDED
        # What was under way has ended, not only what the client waited for.
        until(lambda: metric(both, "rayemb_in_progress ") == 0)
        assert metric(both, "rayemb_buffered_bytes ") == 0
        engine.go.set()
        stub("Search", SearchRequest(text="a"), timeout=10)
        stub("Search", SearchRequest(text="a"), timeout=10, metadata=[("x-request-timeout", "3")])
        stub("Search", SearchRequest(text="a"))
        stub("Search", SearchRequest(text="a"), timeout=3600)
    half, ten, three, none, hour = engine.given
    # On the wire gRPC rounds a deadline up, by some percent.
    assert 0 < half <= 0.55
    assert 9 < ten <= 11
    assert 2 < three <= 3
    assert 19 < none <= 20
    assert 19 < hour <= 20


def test_the_services_own_limit_has_its_words() -> None:
    with serving(Slow(), ServeConfig(request_timeout_s=0.2)) as both, both.stub() as stub:
        refused = stub.refused("Search", SearchRequest(text="a"), timeout=10)
    assert (refused.code, refused.status) == (Code.DEADLINE_EXCEEDED, 504)
    assert refused.text == "no answer within 0.2 s"


def test_a_client_that_leaves_frees_its_place() -> None:
    with serving(Slow()) as both, both.stub() as stub:
        call = stub.method("Search").future(SearchRequest(text="a"))
        until(lambda: metric(both, "rayemb_in_progress ") == 1)
        call.cancel()
        until(lambda: metric(both, "rayemb_in_progress ") == 0)
        assert metric(both, "rayemb_buffered_bytes ") == 0


def test_a_message_over_the_limit_is_not_taken(both: Both, stub: Stub, config: ServeConfig) -> None:
    most = config.max_body_bytes
    refused = stub.refused("Search", SearchRequest(text="x" * most))
    assert refused.code is Code.RESOURCE_EXHAUSTED
    assert str(most) in refused.text
    # What it is unpacked to counts.
    refused = stub.refused("Search", SearchRequest(text="x" * 50_000_000), compression=grpc.Compression.Gzip)
    assert refused.code is Code.RESOURCE_EXHAUSTED
    small = SearchRequest(text="red star", k=3)
    assert len(stub("Search", small, compression=grpc.Compression.Gzip).hits) == 3
    assert metric(both, "rayemb_buffered_bytes ") == 0


def metric(both: Both, name: str) -> float:
    text = httpx.get(f"{both.url}/metrics").text
    found = re.search(rf"^{name}([0-9.e+-]+)$", text, re.M)
    assert found, name
    return float(found[1])


def until(there: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not there():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.02)
