"""Search, pictures, health, metrics and OpenAPI over ASGI, in process."""

import base64
import re

import jsonschema
import numpy as np
import pytest
from fastapi.testclient import TestClient

from rayemb.index import load_manifest
from rayemb.serve.config import ServeConfig
from rayemb.serve.engine import LocalEngine
from rayemb.serve.gateway import create_app
from tests.serve.conftest import World, draw, encode


def ids(answer: dict) -> list[str]:
    return [hit["id"] for hit in answer["hits"]]


def test_text_search_gives_what_brute_force_gives(http: TestClient, world: World) -> None:
    answer = http.post("/v1/search", json={"text": "green star", "k": 7}).json()
    vector = world.model.embed_texts(["green star"])[0]
    assert ids(answer) == world.expected(vector, 7)
    scores = [hit["score"] for hit in answer["hits"]]
    assert scores == sorted(scores, reverse=True)
    np.testing.assert_allclose(scores, np.sort(world.vectors @ vector)[::-1][:7], atol=1e-5)
    assert answer["index_version"] == load_manifest(world.index_uri).version
    assert answer["model_digest"] == world.model.digest
    assert answer["partial"] is False
    assert answer["missing_shards"] == []
    assert set(answer["timings_ms"]) == {"embed", "search", "total"}
    assert re.fullmatch(r"[0-9a-f]{32}", answer["request_id"])


def test_payload_is_the_row(http: TestClient, world: World) -> None:
    hit = http.post("/v1/search", json={"text": "x", "k": 1}).json()["hits"][0]
    row = next(row for row in world.rows if row["id"] == hit["id"])
    expected = {name: value for name, value in row.items() if name != "id"}
    assert hit["payload"] == {**expected, "area": pytest.approx(expected["area"])}
