"""Deadlines, the bound on bodies, the access log, spans, the metrics and the dashboard that reads them."""

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from fastapi.testclient import TestClient
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from rayemb.serve import ServeConfig, ServeError
from rayemb.serve.asgi import create_app
from rayemb.serve.errors import ApiError
from rayemb.serve.keys import new_key
from rayemb.serve.limits import Bodies, remaining, set_deadline
from rayemb.serve.local import LocalEngine
from rayemb.serve.metrics import Metrics
from rayemb.serve.tracing import OpenTelemetry
from tests.serve.test_bad_requests import Slow, check

DASHBOARD = Path(__file__).parents[2] / "cluster" / "grafana" / "rayemb.json"
RULES = DASHBOARD.parents[1] / "prometheus" / "rayemb.rules.yaml"


def with_timeout(seconds: object) -> dict[str, str]:
    return {"X-Request-Timeout": str(seconds)}


def test_a_client_may_wait_less() -> None:
    engine = Slow()
    with TestClient(create_app(engine, ServeConfig(request_timeout_s=20))) as http:
        answer = http.post("/v1/search", json={"text": "a"}, headers=with_timeout(0.2))
        assert "0.2 s" in check(answer, 504, None)["message"]
        text = http.get("/metrics").text
        assert 'rayemb_refused_total{reason="deadline"} 1.0' in text
        assert "rayemb_in_progress 0.0" in text  # its place is free again
        assert "rayemb_buffered_bytes 0.0" in text
        engine.go.set()
        assert http.post("/v1/search", json={"text": "a"}, headers=with_timeout(10)).status_code == 200


def test_but_not_more_than_the_service_gives() -> None:
    with TestClient(create_app(Slow(), ServeConfig(request_timeout_s=0.2))) as http:
        for headers in ({}, with_timeout(3600), with_timeout("inf"), with_timeout("1e300")):
            check(http.post("/v1/search", json={"text": "a"}, headers=headers), 504, None)


@pytest.mark.parametrize("text", ["0", "-1", "nan", "soon", "1s", "1,5"])
def test_a_timeout_is_a_number_of_seconds(http: TestClient, text: str) -> None:
    check(http.post("/v1/search", json={"text": "a"}, headers=with_timeout(text)), 400, "x-request-timeout")


def test_what_is_behind_knows_how_long_the_client_waits() -> None:
    async def request(seconds: float) -> float:
        set_deadline(seconds)
        return await asyncio.create_task(inner())

    async def inner() -> float:
        return remaining(5.0)

    async def main() -> list[float]:
        return await asyncio.gather(request(2.0), request(100.0), request(0.0), inner())

    short, long, none, outside = asyncio.run(main())
    assert 1.5 < short <= 2.0
    assert (long, none, outside) == (5.0, 0.0, 5.0)


def test_bodies_held_at_once_are_bounded() -> None:
    config = ServeConfig(max_text_chars=1, max_batch=1, image={"max_bytes": 9, "max_pixels": 9}, retry_after_s=3)  # type: ignore[arg-type]
    most = config.max_body_bytes
    config = config.model_copy(update={"max_buffered_bytes": 2 * most})
    metrics = Metrics()
    bodies = Bodies(config, metrics)
    gate = asyncio.Event()

    def sending(size: int, held: bool) -> Any:
        parts = [b"x" * (size // 2), b"x" * (size - size // 2)]

        async def receive() -> dict[str, Any]:
            if held and len(parts) == 1:
                await gate.wait()
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

        return receive

    async def read(size: int, held: bool = False) -> bytes | None:
        return await bodies.read({"headers": []}, sending(size, held), None)

    async def main() -> None:
        first = await read(most)
        assert first is not None
        second = asyncio.create_task(read(most, held=True))
        await asyncio.sleep(0)
        assert metrics.registry.get_sample_value("rayemb_buffered_bytes") == most + most // 2
        with pytest.raises(ApiError) as caught:
            await read(most)
        assert (caught.value.status, caught.value.headers["Retry-After"]) == (503, "3")
        bodies.release(first)
        gate.set()
        assert await second == first
        bodies.release(first)
        gone = asyncio.create_task(read(most, held=True))
        gate.clear()
        await asyncio.sleep(0)
        gone.cancel()  # as the deadline does
        await asyncio.gather(gone, return_exceptions=True)
        with pytest.raises(ApiError):
            await read(most + 1)
        assert metrics.registry.get_sample_value("rayemb_buffered_bytes") == 0

    asyncio.run(main())


def test_compressed_bodies_are_not_unpacked(http: TestClient) -> None:
    import gzip

    bomb = gzip.compress(b'{"text": "' + b"a" * 50_000_000 + b'"}')
    for path in ("/v1/search", "/v1/search/batch"):
        headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
        check(http.post(path, content=bomb, headers=headers), 415, "content-encoding")
    assert http.get("/healthz").status_code == 200


def test_a_line_a_request_without_what_was_asked(local: LocalEngine, config: ServeConfig, tmp_path: Path) -> None:
    keys, log = str(tmp_path / "keys.json"), tmp_path / "logs" / "access.log"
    secret = new_key(keys, "ann")
    app = create_app(local, config.model_copy(update={"keys": keys, "access_log": str(log)}))
    headers = {"Authorization": f"Bearer {secret}", "X-Request-ID": "mine"}
    with TestClient(app) as http:
        sent = http.post("/v1/search", json={"text": "my private words", "k": 3}, headers=headers)
        http.get("/v1/items/private-id/image", headers=headers)
        log.rename(log.with_suffix(".1"))  # as logrotate does
        http.get("/v1/index")
    lines = [json.loads(line) for line in log.with_suffix(".1").read_text().splitlines()]
    assert [line["route"] for line in lines] == ["/v1/search", "/v1/items/{item:path}/image"]
    search = lines[0]
    assert set(search) == {"time", "request_id", "key", "method", "route", "status", "ms", "bytes_in", "bytes_out"}
    assert (search["request_id"], search["key"], search["method"], search["status"]) == ("mine", "ann", "POST", 200)
    assert (search["bytes_in"], search["bytes_out"]) == (len(sent.request.content), len(sent.content))
    assert search["ms"] > 0
    (refused,) = [json.loads(line) for line in log.read_text().splitlines()]
    assert (refused["status"], refused["key"]) == (401, "")
    everything = log.read_text() + log.with_suffix(".1").read_text()
    assert "private" not in everything
    assert secret not in everything


def test_a_log_that_cannot_be_opened_is_told_at_the_start(local: LocalEngine, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ServeError, match=r"serve\.access_log"):
        create_app(local, ServeConfig(access_log=str(tmp_path / "file" / "log")))


def test_spans_from_gateway_to_search(local: LocalEngine, config: ServeConfig) -> None:
    exporter = InMemorySpanExporter()
    tracer = OpenTelemetry(exporter)
    with TestClient(create_app(local, config, tracer=tracer)) as http:
        trace = "4bf92f3577b34da6a3ce929d0e0e4736"
        headers = {"traceparent": f"00-{trace}-00f067aa0ba902b7-01", "X-Request-ID": "mine"}
        http.post("/v1/search/batch", json={"texts": ["a", "b"]}, headers=headers)
    tracer.provider.force_flush()
    spans = {span.name: span for span in exporter.get_finished_spans()}
    assert set(spans) == {"POST", "wait", "embed", "search", "encode"}
    root = spans["POST"]
    assert f"{root.context.trace_id:032x}" == trace
    assert root.parent is not None
    assert root.attributes is not None
    assert root.attributes["http.route"] == "/v1/search/batch"
    assert root.attributes["http.response.status_code"] == 200
    assert root.attributes["rayemb.request_id"] == "mine"
    for name in ("wait", "embed", "search", "encode"):
        parent = spans[name].parent
        assert parent is not None
        assert parent.span_id == root.context.span_id
    assert spans["search"].attributes == {"rayemb.queries": 2}


def test_metrics_of_stages_and_sizes(local: LocalEngine, config: ServeConfig) -> None:
    with TestClient(create_app(local, config)) as http:
        http.post("/v1/search", json={"text": "a", "k": 3})
        http.post("/v1/search/batch", json={"texts": ["a", "b", "c"], "k": 2})
        text = http.get("/metrics").text
    for stage, count in {"request": 2, "wait": 2, "embed": 2, "search": 2, "encode": 2}.items():
        assert f'rayemb_stage_seconds_count{{stage="{stage}"}} {count}.0' in text
    assert "rayemb_queries_sum 4.0" in text
    assert "rayemb_hits_sum 5.0" in text
    assert "rayemb_request_bytes_count 2.0" in text


def test_replicas_have_series_of_their_own(local: LocalEngine) -> None:
    texts = []
    for replica in ("one", "two"):
        with TestClient(create_app(local, replica=replica)) as http:
            http.get("/healthz")
            texts.append(http.get("/metrics").text)
    for replica, text in zip(("one", "two"), texts, strict=True):
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        assert all(f'replica="{replica}"' in line for line in lines)
        assert len(lines) > 50


def test_a_megabyte_of_text_is_refused_by_name() -> None:
    with TestClient(create_app(Slow(), ServeConfig())) as http:
        check(http.post("/v1/search", json={"text": "a" * 1_000_000}), 422, "text")
        check(http.post("/v1/search/batch", json={"texts": ["a", "a" * 1_000_000]}), 422, "texts.1")
        check(http.post("/v1/search", json={"text": "a", "k": 10**9}), 422, "k")
        assert http.get("/healthz").status_code == 200


def expressions(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if isinstance(part.get("expr"), str):
            yield part["expr"]
        for each in part.values():
            yield from expressions(each)
    elif isinstance(part, list):
        for each in part:
            yield from expressions(each)


def test_the_dashboard_asks_for_what_is_exported() -> None:
    metrics = Metrics()
    metrics.found(1, 1, ["shard-0"])
    metrics.requests.labels("/v1/search", "POST", "200")
    metrics.keys.labels("ann", "200")
    metrics.rows.labels("c", "v", "i", "m", "live")
    metrics.switches.labels("c")
    metrics.problems.labels("c/v")
    for each in (metrics.versions, metrics.failures, metrics.overlap, metrics.shift, metrics.stability):
        each.labels("c", "v")
    for each, last in ((metrics.shadow_seconds, "live"), (metrics.shadows, "asked"), (metrics.recall, "10")):
        each.labels("c", "v", last)
    metrics.alerts.labels("c", "v", "recall")
    metrics.sampled.labels("measured")
    exported: dict[str, set[str]] = {}
    for family in metrics.registry.collect():
        for sample in family.samples:
            exported.setdefault(sample.name, set()).update(sample.labels)
    queries = list(expressions(json.loads(DASHBOARD.read_text())))
    assert len(queries) >= 12
    rules = list(expressions(yaml.safe_load(RULES.read_text())))
    assert len(rules) >= 5
    queries += rules
    asked: set[str] = set()
    for query in queries:
        for name, selector in re.findall(r"\b(rayemb_\w+)(\{[^}]*\})?", query):
            assert name in exported, query
            labels = set(re.findall(r"(\w+)\s*[=!]~?=?", selector))
            assert labels <= exported[name] | {"job", "instance", "replica"}, query
            asked.add(name)
        grouped = {label for group in re.findall(r"by \(([^)]*)\)", query) for label in re.split(r",\s*", group)}
        named = {label for name in re.findall(r"\brayemb_\w+", query) for label in exported[name]}
        assert grouped <= named | {"job", "instance", "replica"}, query
    # And nothing is exported that nobody looks at.
    families = {re.sub(r"_(bucket|sum|count|created|total)$", "", name) for name in exported}
    assert families <= {re.sub(r"_(bucket|sum|count|created|total)$", "", name) for name in asked}
