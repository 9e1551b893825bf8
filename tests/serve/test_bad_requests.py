"""Whatever is wrong with a request: a 4xx in JSON that names the field, no stack trace; never a 500."""

import asyncio
import base64
import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from rayemb.serve.asgi import create_app
from rayemb.serve.config import ServeConfig
from rayemb.serve.engine import Description, Found
from rayemb.serve.local import LocalEngine
from tests.serve.conftest import encode


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def check(answer: Any, status: int, field: str | None) -> dict:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    error = answer.json()["error"]
    assert set(error) == {"type", "message", "field", "request_id"}
    assert error["field"] == field, error
    assert len(error["message"]) > 5
    assert "Traceback" not in answer.text
    assert 'File "' not in answer.text
    return error


NOISE = encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (128, 128, 3), np.uint8)))
HUGE_PICTURE = encode(Image.new("1", (1001, 1000)))
TRUNCATED = encode(Image.new("RGB", (64, 64), "red"), "JPEG")[:-60]

JSON_BODIES = [
    ("{", 400, "body"),
    ("", 400, "body"),
    ('{"text": "a"} x', 400, "body"),
    (b'{"text": "\xff"}', 400, "body"),
    ('{"text": "\\ud800"}', 400, "body"),
    ('{"text": "a", "k": NaN}', 400, "body"),
    ('{"text": "a", "k": Infinity}', 400, "body"),
    ('{"text": "a", "k": 1e400}', 400, "body"),
    ('{"text": "a", "filter": {"area": NaN}}', 400, "body"),
    ("[" * 5000, 400, "body"),
    ("[]", 422, "body"),
    ('"text"', 422, "body"),
    ("null", 422, "body"),
    ("{}", 422, "text, image"),
    ('{"k": 3}', 422, "text, image"),
    ('{"text": null, "image": null}', 422, "text, image"),
    ('{"text": ""}', 422, "text"),
    ('{"text": " \\n\\t"}', 422, "text"),
    ('{"text": 5}', 422, "text"),
    ('{"text": true}', 422, "text"),
    ('{"text": ["a"]}', 422, "text"),
    ('{"text": "a", "k": "5"}', 422, "k"),
    ('{"text": "a", "k": true}', 422, "k"),
    ('{"text": "a", "k": 5.0}', 422, "k"),
    ('{"text": "a", "k": null}', 422, "k"),
    ('{"text": "a", "k": 0}', 422, "k"),
    ('{"text": "a", "k": -1}', 422, "k"),
    ('{"text": "a", "k": 51}', 422, "k"),
    ('{"text": "a", "k": 1e300}', 422, "k"),
    ('{"text": "a", "k": 99999999999999999999999999}', 422, "k"),
    ('{"text": "a", "top_k": 5}', 422, "top_k"),
    ('{"text": "a", "filter": []}', 422, "filter"),
    ('{"text": "a", "filter": "shape=star"}', 422, "filter"),
    ('{"text": "a", "filter": {"shape": ["star"]}}', 422, "filter.shape"),
    ('{"text": "a", "filter": {"shape": {"eq": "star"}}}', 422, "filter.shape.eq"),
    ('{"text": "a", "filter": {"nosuch": "x"}}', 400, "filter.nosuch"),
    ('{"text": "a", "filter": {"shape": 5}}', 400, "filter.shape"),
    ('{"text": "a", "filter": {"size": "64"}}', 400, "filter.size"),
    ('{"text": "a", "filter": {"size": true}}', 400, "filter.size"),
    ('{"text": "a", "filter": {"round": 1}}', 400, "filter.round"),
    ('{"text": "a", "filter": {"vector": 1}}', 400, "filter.vector"),
    (json.dumps({"text": "x" * 101}), 422, "text"),
    (json.dumps({"text": "x" * 200_000}), 413, "body"),
    ('{"image": ""}', 422, "image"),
    ('{"image": "!!!"}', 422, "image"),
    ('{"image": "abcde"}', 422, "image"),
    ('{"image": "é"}', 422, "image"),
    ('{"image": 5}', 422, "image"),
    (json.dumps({"image": base64_of(b"not a picture")}), 422, "image"),
    (json.dumps({"image": base64_of(b"<svg xmlns='http://www.w3.org/2000/svg'/>")}), 422, "image"),
    (json.dumps({"image": base64_of(TRUNCATED)}), 422, "image"),
    (json.dumps({"image": base64_of(NOISE)}), 413, "image"),
    (json.dumps({"image": base64_of(HUGE_PICTURE)}), 413, "image"),
]


@pytest.mark.parametrize(("body", "status", "field"), JSON_BODIES, ids=lambda value: str(value)[:40])
def test_json(http: TestClient, body: str | bytes, status: int, field: str) -> None:
    check(http.post("/v1/search", content=body, headers={"Content-Type": "application/json"}), status, field)


PNG = encode(Image.new("RGB", (8, 8), "red"))
FORMS: list[tuple[dict[str, Any], int, str]] = [
    ({"data": {"k": "3"}}, 422, "text, image"),
    ({"data": {"text": ""}}, 422, "text"),
    ({"data": {"text": "a", "k": "x"}}, 422, "k"),
    ({"data": {"text": "a", "k": "1.5"}}, 422, "k"),
    ({"data": {"text": "a", "k": "0"}}, 422, "k"),
    ({"data": {"text": "a", "k": "51"}}, 422, "k"),
    ({"data": {"text": "a", "k": ""}}, 422, "k"),
    ({"data": {"text": ["a", "b"]}}, 422, "text"),
    ({"data": {"text": "a", "color": "red"}}, 422, "color"),
    ({"data": {"text": "a", "filter": "{"}}, 400, "filter"),
    ({"data": {"text": "a", "filter": '{"area": NaN}'}}, 400, "filter"),
    ({"data": {"text": "a", "filter": "[1]"}}, 422, "filter"),
    ({"data": {"text": "a", "filter": '{"nosuch": 1}'}}, 400, "filter.nosuch"),
    ({"data": {"text": "x" * 101}}, 422, "text"),
    ({"data": {"text": "a", "image": "not a file"}}, 422, "image"),
    ({"files": {"text": ("a.txt", b"a")}}, 422, "text"),
    ({"files": {"picture": ("a.png", PNG)}}, 422, "picture"),
    ({"files": [("image", ("a.png", PNG)), ("image", ("b.png", PNG))]}, 422, "image"),
    ({"files": {"image": ("a.png", b"")}}, 422, "image"),
    ({"files": {"image": ("a.png", b"GIF89a but no more")}}, 422, "image"),
    ({"files": {"image": ("a.png", NOISE)}}, 413, "image"),
    ({"files": {"image": ("a.png", b"x" * 200_000)}}, 413, "body"),
    ({"files": [("image", (f"{n}.png", PNG)) for n in range(5)]}, 400, "body"),
]


@pytest.mark.parametrize(("form", "status", "field"), FORMS, ids=lambda value: str(value)[:50])
def test_multipart(http: TestClient, form: dict[str, Any], status: int, field: str) -> None:
    # A form without files goes out urlencoded unless httpx is given one.
    files = form.get("files") or [(name, (None, each)) for name, value in form["data"].items()
                                  for each in (value if isinstance(value, list) else [value])]  # fmt: skip
    check(http.post("/v1/search", files=files), status, field)


@pytest.mark.parametrize(
    ("kind", "status"),
    [("multipart/form-data", 400), ("multipart/form-data; boundary=x", 400), ("text/plain", 415), ("", 415),
     ("application/x-www-form-urlencoded", 415), ("application/jsonp", 415)],
)  # fmt: skip
def test_content_types(http: TestClient, kind: str, status: int) -> None:
    answer = http.post("/v1/search", content=b'{"text": "a"}', headers={"Content-Type": kind})
    check(answer, status, "body" if status == 400 else "content-type")


@pytest.mark.parametrize(
    ("method", "path", "status", "field"),
    [("GET", "/nowhere", 404, None), ("GET", "/v1/search", 405, None), ("DELETE", "/v1/index", 405, None),
     ("PUT", "/v1/items/x/image", 405, None), ("GET", "/v1/items/nobody/image", 404, "id"),
     ("GET", "/v1/items/..%2f..%2fetc%2fpasswd/image", 404, "id"), ("GET", "/docs", 404, None)],
)  # fmt: skip
def test_paths_and_methods(http: TestClient, method: str, path: str, status: int, field: str | None) -> None:
    check(http.request(method, path), status, field)


def test_a_lying_content_length_does_not_lift_the_limit(http: TestClient, config: ServeConfig) -> None:
    def chunks():
        for _ in range(40):
            yield b"x" * 10_000

    # Chunked: no Content-Length at all. What is over the limit is not kept.
    answer = http.post("/v1/search", content=chunks(), headers={"Content-Type": "application/json"})
    check(answer, 413, "body")
    assert config.max_body_bytes < 400_000


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["text", "image", "k", "filter", "shape", "input", "model"]) | st.text(max_size=5),
                inner,
            )
        ),
        max_leaves=8,
    )
)
def test_no_document_makes_it_fail(http: TestClient, document: Any) -> None:
    # json and not orjson: it writes NaN and lone surrogates, as careless clients do.
    body = json.dumps(document)
    for path in ("/v1/search", "/v1/embeddings"):
        answer = http.post(path, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code < 500
        assert answer.status_code == 200 or answer.json()["error"]["message"]


class Broken(LocalEngine):
    """A real engine whose search fails with what nobody foresaw."""

    async def search(self, vectors: Any, k: int, filter: Any = None, **width: Any) -> Found:
        raise RuntimeError("secret: /somewhere/inside")


def test_the_unforeseen_is_a_500_without_details(world, config: ServeConfig, caplog: pytest.LogCaptureFixture) -> None:
    engine = Broken(world.model_uri, world.index_uri, config)
    with TestClient(create_app(engine, config), raise_server_exceptions=False) as http:
        answer = http.post("/v1/search", json={"text": "a"})
        error = check(answer, 500, None)
        assert "secret" not in answer.text
        assert http.get("/healthz").status_code == 200
        assert 'status="500"' in http.get("/metrics").text
    # The log has what the client must not see, under the id that the client has.
    assert error["request_id"] in caplog.text
    assert "secret" in caplog.text


class Slow:
    """An engine that answers when it is told to."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def describe(self) -> Description:
        return Description("v", "d" * 64, 1, 2, "inner_product", "Flat", {}, {}, [], None, [], [], {}, False)

    async def embed_texts(self, texts: Sequence[str]) -> tuple[Any, int]:
        while not self.go.is_set():
            await asyncio.sleep(0.01)
        return np.ones((1, 2), np.float32), 1

    async def embed_images(self, images: Sequence[bytes]) -> Any:
        raise NotImplementedError

    async def search(self, vectors: Any, k: int, filter: Mapping[str, Any] | None = None, **width: Any) -> Found:
        return Found(np.array([[1.0]], np.float32), np.array([[0]]), {0: {"id": "a"}})

    async def image(self, item: str) -> bytes | None:
        return None

    def hedged(self) -> dict[str, int]:
        return {}

    async def missing(self) -> list[str]:
        return []


@pytest.mark.parametrize("status", [429, 503])
def test_overload_is_refused_at_once_and_health_answers(status: int) -> None:
    engine = Slow()
    config = ServeConfig(max_ongoing_requests=2, max_queued_requests=3, overload_status=status, retry_after_s=7)
    with TestClient(create_app(engine, config)) as http, ThreadPoolExecutor(12) as pool:
        calls = [pool.submit(http.post, "/v1/search", json={"text": "a"}) for _ in range(12)]
        while sum(call.done() for call in calls) < 7:
            assert http.get("/healthz").status_code == 200
        text = http.get("/metrics").text
        engine.go.set()
        answers = [call.result() for call in calls]
    refused = [answer for answer in answers if answer.status_code != 200]
    assert len(refused) == 7
    for answer in refused:
        assert check(answer, status, None)["type"] == "overloaded"
        assert answer.headers["retry-after"] == "7"
    assert "rayemb_in_progress 2.0" in text
    assert "rayemb_waiting 3.0" in text
