"""A service beside its catalog: what cannot be opened is told, and what was there goes on."""

import json
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from rayemb.index import load_manifest
from rayemb.serve.config import ServeConfig
from rayemb.serve.errors import ServeError
from rayemb.serve.versions import CatalogStore, changes
from rayemb.serve.versions.follow import CatalogFollower
from tests.serve.versions.conftest import Run, Versioned, build_version

QUERY = {"text": "red star", "k": 3}


def damage(index: str) -> None:
    shard = Path(index) / load_manifest(index).shards[0].file
    data = bytearray(shard.read_bytes())
    data[-9] ^= 1
    shard.write_bytes(bytes(data))


def test_a_live_version_that_was_damaged_meanwhile_does_not_become_live(
    store: CatalogStore, versioned: Versioned, run: Run, tmp_path: Path
) -> None:
    index = build_version(tmp_path, "d", versioned.models["b"])
    versioned.fill(store, "default", "a")
    changes.add(store, "default", versioned.models["b"], index, name="d")
    changes.promote(store, "default", "a")
    with run(store) as service, TestClient(service.app) as http:
        promoted = changes.promote(store, "default", "d")
        whole = (Path(index) / load_manifest(index).shards[0].file).read_bytes()
        damage(index)
        service.follow(promoted.revision)
        assert http.post("/v1/search", json=QUERY).json()["version"] == "a"
        metrics = http.get("/metrics").text
        assert 'rayemb_version_problem{what="default/d"} 1.0' in metrics
        assert "the checksum differs" in service.follower.problems["default/d"]
        service.follow(changes.rollback(store, "default").revision)
        assert "rayemb_version_problem{" not in http.get("/metrics").text
        (Path(index) / load_manifest(index).shards[0].file).write_bytes(whole)


def test_an_unreadable_catalog_leaves_what_was_there(store: CatalogStore, versioned: Versioned, run: Run) -> None:
    versioned.fill(store, "default", "a")
    changes.promote(store, "default", "a")
    with run(store, catalog_poll_s=0.01) as service, TestClient(service.app) as http:
        text = Path(store.uri).read_text()
        Path(store.uri).write_text("{")
        wait(lambda: "catalog" in service.follower.problems)
        assert http.post("/v1/search", json=QUERY).json()["version"] == "a"
        assert 'rayemb_version_problem{what="catalog"} 1.0' in http.get("/metrics").text
        Path(store.uri).write_text(text)
        wait(lambda: not service.follower.problems)


def wait(condition: object) -> None:
    import time

    deadline = time.monotonic() + 30
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it does not happen"
        time.sleep(0.005)


def test_a_collection_that_was_taken_out_goes_and_the_services_own_stays(
    store: CatalogStore, versioned: Versioned, run: Run
) -> None:
    versioned.fill(store, "default", "a")
    versioned.fill(store, "other", "b")
    changes.promote(store, "default", "a")
    changes.promote(store, "other", "b")
    with run(store) as service, TestClient(service.app) as http:
        emptied = store.update(lambda catalog: catalog.model_copy(update={"collections": {}}))
        service.follow(emptied.revision)
        assert http.post("/collections/other/v1/search", json=QUERY).status_code == 404
        assert http.post("/v1/search", json=QUERY).json()["version"] == "a"
        assert "no live version of it any more" in service.follower.problems["default"]


def test_nothing_live_is_said_at_the_start(store: CatalogStore, versioned: Versioned) -> None:
    config = ServeConfig(catalog=store.uri)
    with pytest.raises(ServeError, match="there is no catalog here"):
        CatalogFollower(config)
    versioned.fill(store, "default", "a")
    with pytest.raises(ServeError, match="collection 'default' cannot be served: no version of it is live"):
        CatalogFollower(config)
    document = json.loads(Path(store.uri).read_text())
    entry = document["collections"]["default"]
    entry["live"], entry["versions"]["a"]["model_digest"] = "a", "0" * 64
    Path(store.uri).write_text(json.dumps(document))
    with pytest.raises(ServeError, match="the version was added with 000000000000"):
        CatalogFollower(config)


def test_a_catalog_and_spread_do_not_go_together(store: CatalogStore) -> None:
    with pytest.raises(ValueError, match="topology together only"):
        ServeConfig(catalog=store.uri, topology="spread")
