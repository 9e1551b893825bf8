"""A shadow: compared, never answering, never in the way."""

import time
from pathlib import Path
from typing import Any

from fastapi.testclient import TestClient

from rayemb.serve.versions import CatalogStore, changes
from tests.serve.versions.conftest import TEXTS, Run, Versioned, build_version


def figures(http: TestClient, name: str, queries: int) -> dict[str, Any]:
    deadline = time.monotonic() + 30
    while True:
        found = http.get("/v1/collections").json()["collections"]["default"]["compared"].get(name, {})
        if sum(found.get(outcome, 0) for outcome in ("queries", "failed", "dropped")) >= queries:
            return dict(found)
        assert time.monotonic() < deadline, found
        time.sleep(0.01)


def test_the_same_answers_overlap_and_others_do_not(
    store: CatalogStore, versioned: Versioned, run: Run, tmp_path: Path
) -> None:
    # The same model, vectors and ids, in an index of its own.
    same = build_version(tmp_path, "a", versioned.models["a"])
    changes.add(store, "default", versioned.models["a"], versioned.indexes["a"], name="a")
    changes.add(store, "default", versioned.models["a"], same, name="same")
    changes.add(store, "default", versioned.models["b"], versioned.indexes["b"], name="b")
    changes.promote(store, "default", "a")
    with run(store) as service, TestClient(service.app) as http:
        for name, overlap in (("same", 1.0), ("b", 0.0)):
            service.follow(changes.set_shadow(store, "default", name, 100).revision)
            for text in TEXTS[:5]:
                assert http.post("/v1/search", json={"text": text, "k": 4}).json()["version"] == "a"
            found = figures(http, name, 5)
            assert found["queries"] + found["dropped"] == 5
            assert found["queries"] >= 1
            assert found["overlap"] == overlap
            assert found["shadow_ms"] > 0
        metrics = http.get("/metrics").text
        assert 'rayemb_shadow_total{collection="default",outcome="asked",version="same"}' in metrics
        assert 'rayemb_shadow_seconds_count{collection="default",side="live",version="b"}' in metrics


def test_a_shadow_that_cannot_answer_fails_alone(
    store: CatalogStore, versioned: Versioned, run: Run, tmp_path: Path
) -> None:
    versioned.fill(store)
    changes.promote(store, "default", "a")
    changes.set_shadow(store, "default", "b", 100)
    with run(store) as service, TestClient(service.app) as http:
        # Examples by id: b has no such item.
        answer = http.post("/v1/search", json={"positive": ["a-3"], "k": 4})
        assert answer.status_code == 200
        assert figures(http, "b", 1)["failed"] == 1
        held = service.follower.versions.routes["default"].shadow[0].holders
        assert held == 0, "the shadow is let go"
