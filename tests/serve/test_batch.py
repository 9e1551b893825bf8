"""POST /v1/search/batch: JSON and Arrow, the same answers as one by one; what it refuses."""

import json
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rayemb.serve.batch import ARROW, BatchResponse, write_stream
from rayemb.serve.config import ServeConfig
from tests.serve.conftest import World
from tests.serve.test_bad_requests import check

TEXTS = ["red star", "blue circle", "green"]


def vectors_of(x_ND: Any, kind: pa.DataType = pa.float32()) -> pa.RecordBatch:
    x_ND = np.asarray(x_ND)
    column = pa.FixedSizeListArray.from_arrays(pa.array(x_ND.reshape(-1), kind), x_ND.shape[1])
    return pa.record_batch([column], names=["vectors"])


def post_arrow(http: TestClient, batch: pa.RecordBatch, fields: Any) -> Any:
    return http.post("/v1/search/batch", content=write_stream(batch, fields), headers={"Content-Type": ARROW})


def table_of(answer: Any) -> tuple[dict[str, list[Any]], dict[str, Any]]:
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == ARROW
    table = pa.ipc.open_stream(answer.content).read_all()
    return table.to_pydict(), json.loads(table.schema.metadata[b"rayemb"])


@pytest.mark.parametrize("condition", [None, {"shape": "star"}, {"colour": "nothing"}])
def test_texts_give_what_they_give_one_by_one(http: TestClient, condition: Any) -> None:
    single = [http.post("/v1/search", json={"text": text, "k": 20, "filter": condition}).json() for text in TEXTS]
    body = {"texts": TEXTS, "k": 20, "filter": condition, "payload": True}
    answer = http.post("/v1/search/batch", json=body).json()
    assert answer["ids"] == [[hit["id"] for hit in each["hits"]] for each in single]
    assert answer["payload"] == [[hit["payload"] for hit in each["hits"]] for each in single]
    for scores, each in zip(answer["scores"], single, strict=True):
        np.testing.assert_allclose(scores, [hit["score"] for hit in each["hits"]], atol=1e-6)
    BatchResponse.model_validate(answer)
    plain = http.post("/v1/search/batch", json={**body, "payload": False}).json()
    assert "payload" not in plain
    assert (plain["ids"], plain["scores"]) == (answer["ids"], answer["scores"])


def test_vectors_equal_brute_force_of_any_length(http: TestClient, world: World) -> None:
    queries = np.random.default_rng(0).standard_normal((7, 32)) * np.logspace(-6, 6, 7)[:, None]
    body = {"vectors": queries.tolist(), "model": str(world.model.digest)[:12], "k": 50}
    answer = http.post("/v1/search/batch", json=body).json()
    for vector, ids, scores in zip(queries, answer["ids"], answer["scores"], strict=True):
        unit = (vector / np.linalg.norm(vector)).astype(np.float32)
        assert ids == world.expected(unit, 50)
        np.testing.assert_allclose(scores, np.sort(world.vectors @ unit)[::-1][:50], atol=1e-5)
    assert (answer["model_digest"], answer["partial"], answer["missing_shards"]) == (world.model.digest, False, [])


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64()])
@pytest.mark.parametrize("payload", [False, True])
def test_arrow_equals_json(http: TestClient, world: World, kind: pa.DataType, payload: bool) -> None:
    queries = world.vectors[:5].astype(np.float16).astype(np.float32)
    fields = {"model": world.model.digest, "k": 4, "filter": {"round": False}, "payload": payload}
    expected = http.post("/v1/search/batch", json={**fields, "vectors": queries.tolist()}).json()
    given = queries.astype(np.float16) if kind == pa.float16() else queries
    columns, about = table_of(post_arrow(http, vectors_of(given, kind), fields))
    assert columns["ids"] == expected["ids"]
    np.testing.assert_allclose(columns["scores"], expected["scores"], atol=1e-6)
    if payload:
        assert [[json.loads(row) for row in rows] for rows in columns["payload"]] == expected["payload"]
    assert set(columns) == {"ids", "scores", "payload"} - (set() if payload else {"payload"})
    assert about["index_version"] == expected["index_version"]
    assert set(about) | {"ids", "scores", "payload"} == set(BatchResponse.model_fields) - {"updates"}


def test_arrow_of_texts_and_json_answered_in_arrow(http: TestClient) -> None:
    expected = http.post("/v1/search/batch", json={"texts": TEXTS, "k": 3}).json()
    for batch in (pa.record_batch([TEXTS], names=["texts"]),
                  pa.record_batch([pa.array(TEXTS, pa.large_string())], names=["texts"])):  # fmt: skip
        assert table_of(post_arrow(http, batch, {"k": 3}))[0]["ids"] == expected["ids"]
    asked = http.post("/v1/search/batch", json={"texts": TEXTS, "k": 3}, headers={"Accept": ARROW})
    assert table_of(asked)[0]["ids"] == expected["ids"]


ROW = [0.5] * 32
BODIES = [
    ({}, 422, "texts, vectors"),
    ({"texts": None}, 422, "texts, vectors"),
    ({"texts": ["a"], "vectors": [ROW], "model": "M"}, 422, "texts, vectors"),
    ({"texts": []}, 422, "texts"),
    ({"texts": "a"}, 422, "texts"),
    ({"texts": [5]}, 422, "texts"),
    ({"texts": ["a", " "]}, 422, "texts.1"),
    ({"texts": ["a"] * 9}, 422, "texts"),
    ({"texts": ["x" * 101]}, 422, "texts.0"),
    ({"vectors": [ROW]}, 422, "model"),
    ({"vectors": [ROW], "model": "rayemb"}, 409, "model"),
    ({"vectors": [ROW], "model": "0" * 64}, 409, "model"),
    ({"vectors": [ROW], "model": ""}, 409, "model"),
    ({"vectors": [ROW], "model": 5}, 422, "model"),
    ({"vectors": [], "model": "M"}, 422, "vectors"),
    ({"vectors": [[]], "model": "M"}, 422, "vectors.0"),
    ({"vectors": [ROW, ROW[:-1]], "model": "M"}, 422, "vectors.1"),
    ({"vectors": [ROW, [*ROW, 1.0]], "model": "M"}, 422, "vectors.1"),
    ({"vectors": [ROW, [0.0] * 32], "model": "M"}, 422, "vectors.1"),
    ({"vectors": [[1e300] * 32], "model": "M"}, 422, "vectors.0"),
    ({"vectors": [["0.5"] * 32], "model": "M"}, 422, "vectors"),
    ({"vectors": [[True] * 32], "model": "M"}, 422, "vectors"),
    ({"vectors": ROW, "model": "M"}, 422, "vectors"),
    ({"vectors": [ROW] * 257, "model": "M"}, 422, "vectors"),
    ({"texts": ["a"], "k": 51}, 422, "k"),
    ({"texts": ["a"], "k": 0}, 422, "k"),
    ({"texts": ["a"], "k": -1}, 422, "k"),
    ({"texts": ["a"], "k": 10**9}, 422, "k"),
    ({"texts": ["a"], "k": "5"}, 422, "k"),
    ({"texts": ["a"], "k": True}, 422, "k"),
    ({"texts": ["a"], "payload": 1}, 422, "payload"),
    ({"texts": ["a"], "filter": {"nosuch": 1}}, 400, "filter.nosuch"),
    ({"texts": ["a"], "image": "x"}, 422, "image"),
]


@pytest.mark.parametrize(("body", "status", "field"), BODIES, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_named(http: TestClient, world: World, body: dict, status: int, field: str) -> None:
    if body.get("model") == "M":
        body = {**body, "model": world.model.digest}
    check(http.post("/v1/search/batch", json=body), status, field)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_what_is_no_number_is_refused(http: TestClient, world: World, number: str) -> None:
    row = ", ".join(["0.5"] * 31)
    body = f'{{"vectors": [[{row}, {number}]], "model": "{world.model.digest}"}}'
    check(http.post("/v1/search/batch", content=body, headers={"Content-Type": "application/json"}), 400, "body")


def test_streams_that_are_wrong(http: TestClient, world: World) -> None:
    digest = str(world.model.digest)
    fine = vectors_of(world.vectors[:2])
    fields = {"model": digest}
    nan = world.vectors[:2].copy()
    nan[1, 3] = np.nan
    with_null = pa.FixedSizeListArray.from_arrays(pa.array([0.5] * 31 + [None] + [0.5] * 32, pa.float32()), 32)
    for batch, sent, status, field in (
        (vectors_of(nan), fields, 422, "vectors.1"),
        (vectors_of(np.zeros((2, 32), np.float32)), fields, 422, "vectors.0"),
        (vectors_of(np.ones((2, 31), np.float32)), fields, 422, "vectors"),
        (vectors_of(np.ones((2, 32), np.int64), pa.int64()), fields, 422, "vectors"),
        (pa.record_batch([with_null], names=["vectors"]), fields, 422, "vectors"),
        (pa.record_batch([pa.array([[0.5] * 32])], names=["vectors"]), fields, 422, "vectors"),
        (pa.record_batch([pa.array([None, "a"])], names=["texts"]), {}, 422, "texts"),
        (pa.record_batch([pa.array([1, 2])], names=["texts"]), {}, 422, "texts"),
        (pa.record_batch([pa.array(["a"])], names=["words"]), {}, 422, "body"),
        (pa.record_batch([pa.array(["a"]), pa.array(["a"])], names=["texts", "vectors"]), {}, 422, "body"),
        (fine.slice(0, 0), fields, 422, "vectors"),
        (fine, {}, 422, "model"),
        (fine, {**fields, "k": 51}, 422, "k"),
        (fine, {**fields, "texts": ["a"]}, 422, "texts, vectors"),
        (fine, [1], 422, "body"),
    ):
        check(post_arrow(http, batch, sent), status, field)
    whole = write_stream(fine, fields)
    for data in (b"", b"no", whole[:-200], whole[:100], b"\xff\xff\xff\xff" + b"\xff" * 100):
        answer = http.post("/v1/search/batch", content=data, headers={"Content-Type": ARROW})
        check(answer, 400, "body")
    check(http.post("/v1/search/batch", content=whole, headers={"Content-Type": "text/plain"}), 415, "content-type")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 10**6), st.integers(0, 255), st.integers(0, 10**6))
def test_a_damaged_stream_harms_nobody(http: TestClient, world: World, at: int, value: int, cut: int) -> None:
    data = bytearray(write_stream(vectors_of(world.vectors[:2]), {"model": world.model.digest}))
    data[at % len(data)] = value
    data = data[: len(data) - cut % 50]
    answer = http.post("/v1/search/batch", content=bytes(data), headers={"Content-Type": ARROW})
    assert answer.status_code in (200, 400, 409, 422), answer.text


def test_a_batch_is_filtered_and_as_wide_as_asked(http: TestClient, world: World) -> None:
    wanted = {"or": [{"shape": "star"}, {"size": {"gt": 80}}]}
    body = {"texts": ["red", "blue"], "k": 9, "filter": wanted, "recall": 0.5}
    answer = http.post("/v1/search/batch", json=body).json()
    for text, found in zip(body["texts"], answer["ids"], strict=True):
        vector = world.model.embed_texts([text])[0]
        assert found == world.expected(vector, 9, lambda row: row["shape"] == "star" or row["size"] > 80)
    assert set(answer["strategies"]) <= {"exact", "selector"}
    for fields, field in (
        ({"effort": {"nprobe": 0}}, "effort.nprobe"),
        ({"effort": {"nprobe": 1}, "recall": 0.5}, "effort"),
        ({"filter": {"size": {"eq": 5}}}, "filter.size.eq"),
        ({"recall": 2.0}, "recall"),
    ):
        check(http.post("/v1/search/batch", json={**body, **fields}), 422, field)


def test_limits_are_told(http: TestClient, config: ServeConfig) -> None:
    about = http.get("/v1/index").json()
    assert (about["max_batch"], about["max_queries"]) == (config.max_batch, config.max_queries)
