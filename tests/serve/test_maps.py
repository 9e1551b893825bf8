"""GET /v1/map: the map of the index that answers and of no other, in both topologies; no cluster."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from rayemb.index import MapConfig, build_map, load_manifest
from rayemb.index.manifest import publish_manifest
from rayemb.index.map import map_uri
from rayemb.serve.asgi import create_app
from rayemb.serve.local import LocalEngine
from tests.serve.test_items import CONFIG, Place, emptied, make_place

PCA = MapConfig(method="pca")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("maps"))


@pytest.fixture
def place(made: Place) -> Place:
    return emptied(made)


@pytest.fixture(params=["together", "spread"])
def http(place: Place, request: pytest.FixtureRequest) -> Iterator[TestClient]:
    with TestClient(create_app(place.engine(request.param), CONFIG), raise_server_exceptions=False) as client:
        yield client


def test_a_map_is_there_once_it_is_made(http: TestClient, place: Place) -> None:
    index = str(place.folder / "index")
    manifest = load_manifest(index)
    missing = http.get("/v1/map")
    assert (missing.status_code, missing.json()["error"]["type"]) == (404, "not_found")
    assert missing.json()["error"]["message"] == (
        f"no map of index version {manifest.version} was made: run `rayemb index map`"
    )
    made = build_map(index, PCA)
    for path in ("/v1/map", "/collections/default/v1/map"):
        answer = http.get(path)
        assert answer.status_code == 200, answer.text
        assert answer.json() == {
            **made.model_dump(),
            "collection": "default",
            "version": http.get("/v1/index").json()["version"],
        }
    assert len(answer.json()["columns"]["colour"]) == len(answer.json()["ids"]) == manifest.embeddings.rows
    # Items of the map are searched by, and their pictures are there.
    item = answer.json()["ids"][3]
    assert http.post("/v1/search", json={"positive": [item], "k": 3}).status_code == 200
    path = Path(map_uri(index, manifest))
    path.write_text("{")
    assert "cannot be shown: it is no map" in http.get("/v1/map").json()["error"]["message"]
    path.unlink()
    path.mkdir()  # a store that does not give the file
    away = http.get("/v1/map")
    assert (away.status_code, away.json()["error"]["type"]) == (503, "storage_unavailable")
    assert "Retry-After" in away.headers
    path.rmdir()


def test_the_map_of_the_last_index_is_not_shown_for_the_next(place: Place) -> None:
    engine, index = place.engine("together"), str(place.folder / "index")
    assert isinstance(engine, LocalEngine)
    with TestClient(create_app(engine, CONFIG)) as http:
        build_map(index, PCA)
        assert http.get("/v1/map").status_code == 200
        manifest = load_manifest(index)
        publish_manifest(index, manifest.model_copy(update={"created": "2026-01-02T00:00:00+00:00"}))
        later = load_manifest(index)
        # It goes with the index that answers, not with the one that lies there.
        assert http.get("/v1/map").json()["index_version"] == manifest.version
        engine.catch_up()
        assert http.get("/v1/index").json()["index_version"] == later.version
        assert http.get("/v1/map").status_code == 404
        build_map(index, PCA)
        assert http.get("/v1/map").json()["index_version"] == later.version
