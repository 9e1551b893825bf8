"""Search, pictures, health, metrics and OpenAPI over ASGI, in process."""

import base64
import re

import jsonschema
import numpy as np
import pytest
from fastapi.testclient import TestClient

from rayemb.index import load_manifest
from rayemb.serve.asgi import create_app
from rayemb.serve.config import ServeConfig
from rayemb.serve.local import LocalEngine
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


def test_image_search_finds_the_image_itself(http: TestClient, world: World) -> None:
    for number in (0, 17, 59):
        body = {"image": base64.b64encode(world.images[number]).decode(), "k": 3}
        hits = http.post("/v1/search", json=body).json()["hits"]
        assert hits[0]["id"] == world.rows[number]["id"]
        assert hits[0]["score"] == pytest.approx(1.0, abs=1e-5)


def test_a_data_url_is_an_image_too(http: TestClient, world: World) -> None:
    body = {"image": "data:image/png;base64," + base64.b64encode(world.images[5]).decode(), "k": 1}
    assert ids(http.post("/v1/search", json=body).json()) == [world.rows[5]["id"]]


def test_text_and_image_search_their_normalised_mean(http: TestClient, world: World) -> None:
    image = draw("pink", "circle", 50)
    mean = world.model.embed_texts(["blue square"])[0] + world.model.embed_images([image])[0]
    mean /= np.linalg.norm(mean)
    body = {"text": "blue square", "image": base64.b64encode(image).decode(), "k": 9}
    answer = http.post("/v1/search", json=body).json()
    assert ids(answer) == world.expected(mean, 9)
    assert answer["hits"][0]["score"] == pytest.approx(float((world.vectors @ mean).max()), abs=1e-5)


def test_multipart_equals_json(http: TestClient, world: World) -> None:
    image = draw("red", "star", 60)
    form = http.post(
        "/v1/search",
        data={"text": "red", "k": "4", "filter": '{"shape": "star"}'},
        files={"image": ("query.png", image, "image/png")},
    ).json()
    body = {"text": "red", "k": 4, "filter": {"shape": "star"}, "image": base64.b64encode(image).decode()}
    assert form["hits"] == http.post("/v1/search", json=body).json()["hits"]
    assert len(form["hits"]) == 4


def test_jpeg_and_transparent_png_are_taken(http: TestClient, world: World) -> None:
    from PIL import Image

    for image in (
        encode(Image.new("RGB", (40, 30), "red"), "JPEG"),
        encode(Image.new("RGBA", (40, 30), (0, 0, 0, 0))),
    ):
        assert http.post("/v1/search", files={"image": ("a", image)}).status_code == 200


@pytest.mark.parametrize(
    ("condition", "keep"),
    [
        ({"shape": "star"}, lambda row: row["shape"] == "star"),
        ({"size": 64, "colour": "red"}, lambda row: row["size"] == 64 and row["colour"] == "red"),
        ({"round": True}, lambda row: row["round"]),
        ({"area": 1.6}, lambda row: row["size"] == 40),
        ({"colour": "mauve"}, lambda row: False),
        ({}, lambda row: True),
    ],
)
def test_filters_equal_brute_force(http: TestClient, world: World, condition: dict, keep) -> None:
    answer = http.post("/v1/search", json={"text": "round", "k": 50, "filter": condition}).json()
    assert ids(answer) == world.expected(world.model.embed_texts(["round"])[0], 50, keep)


def test_concurrent_queries_get_their_own_answers(http: TestClient, world: World) -> None:
    from concurrent.futures import ThreadPoolExecutor

    texts = [f"{row['colour']} {row['shape']} {row['size']}" for row in world.rows]
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda text: http.post("/v1/search", json={"text": text, "k": 5}).json(), texts))
    vectors = world.model.embed_texts(texts)
    for answer, vector in zip(found, vectors, strict=True):
        np.testing.assert_allclose(
            [hit["score"] for hit in answer["hits"]], np.sort(world.vectors @ vector)[::-1][:5], atol=1e-5
        )


def test_pictures_come_as_they_were_embedded(http: TestClient, world: World) -> None:
    hit = http.post("/v1/search", json={"text": "star", "k": 1}).json()["hits"][0]
    answer = http.get(hit["image_url"])
    number = [row["id"] for row in world.rows].index(hit["id"])
    assert answer.content == world.images[number]
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "max-age" in answer.headers["cache-control"]
    again = http.get(hit["image_url"], headers={"If-None-Match": answer.headers["etag"]})
    assert again.status_code == 304
    assert again.content == b""


def test_index_describes_what_is_served(http: TestClient, world: World, config: ServeConfig) -> None:
    about = http.get("/v1/index").json()
    manifest = load_manifest(world.index_uri)
    assert about["rows"] == sum(shard["rows"] for shard in about["shards"]) == len(world.rows)
    assert [shard["name"] for shard in about["shards"]] == ["shard-0", "shard-1"]
    assert about["payload_columns"] == ["text", "colour", "shape", "size", "area", "round"]
    assert about["payload_types"]["size"] == "integer"
    assert (about["factory"], about["dim"], about["max_k"]) == ("Flat", 32, config.max_k)
    assert about["recall"]["recall"] == manifest.recall.recall == 1.0
    assert about["index_version"] == manifest.version


def test_health_readiness_and_request_ids(http: TestClient) -> None:
    for path in ("/healthz", "/readyz"):
        assert http.get(path).json() == {"status": "ok", "missing_shards": []}
    assert http.get("/healthz", headers={"X-Request-ID": "mine-1"}).headers["x-request-id"] == "mine-1"
    # What could forge a line of a log is replaced.
    assert http.get("/healthz", headers={"X-Request-ID": "a b\tc"}).headers["x-request-id"] != "a b\tc"


def test_metrics_count_by_route_and_status(local: LocalEngine, config: ServeConfig) -> None:
    with TestClient(create_app(local, config)) as http:
        for _ in range(3):
            http.post("/v1/search", json={"text": "red"})
        http.post("/v1/search", json={"text": ""})
        http.get("/v1/items/nobody/image")
        http.get("/random/1")
        http.get("/random/2")
        text = http.get("/metrics").text
    assert 'rayemb_requests_total{method="POST",route="/v1/search",status="200"} 3.0' in text
    assert 'rayemb_requests_total{method="POST",route="/v1/search",status="422"} 1.0' in text
    assert 'route="/v1/items/{item:path}/image",status="404"} 1.0' in text
    assert 'route="unmatched",status="404"} 2.0' in text
    assert 'rayemb_stage_seconds_count{stage="search"} 3.0' in text
    assert "rayemb_hits_sum 30.0" in text


def test_page_is_one_file_under_a_policy(http: TestClient) -> None:
    answer = http.get("/")
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "sha256-" in policy
    # Nothing from another server, and no way for data to become markup.
    assert not re.findall(r'(?:src|href)="https?:', answer.text)
    assert not re.findall(r"\.(?:innerHTML|outerHTML|insertAdjacentHTML)|document\.write|eval\(", answer.text)
    assert not re.findall(r'\son[a-z]+="|\sstyle="', answer.text)


def test_openapi_describes_the_answers_that_come(http: TestClient) -> None:
    document = http.get("/openapi.json").json()
    search = document["paths"]["/v1/search"]["post"]
    assert set(search["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
    assert {"200", "400", "413", "415", "422", "429", "503"} <= set(search["responses"])
    examples = {
        ("/v1/search", "post", "200"): http.post("/v1/search", json={"text": "red"}),
        ("/v1/search", "post", "422"): http.post("/v1/search", json={}),
        ("/v1/embeddings", "post", "200"): http.post("/v1/embeddings", json={"input": "red"}),
        ("/v1/embeddings", "post", "400"): http.post("/v1/embeddings", json={"input": [1, 2]}),
        ("/v1/index", "get", "200"): http.get("/v1/index"),
    }
    for (path, method, status), answer in examples.items():
        assert str(answer.status_code) == status
        schema = document["paths"][path][method]["responses"][status]["content"]["application/json"]["schema"]
        jsonschema.validate(answer.json(), {**schema, "components": document["components"]})
