"""A catalog behind Ray Serve: two gateway replicas, each of which changes by itself, and no request notices."""

import threading
import time
from pathlib import Path

import httpx
import pytest

from rayemb.serve import ServeConfig, ServeError
from rayemb.serve.deploy import start
from rayemb.serve.versions import CatalogStore, changes
from tests.serve.conftest import Service
from tests.serve.versions.conftest import Versioned


@pytest.mark.slow
def test_replicas_follow_the_catalog_and_no_request_fails(
    ray_cluster: str, service: Service, store: CatalogStore, versioned: Versioned, tmp_path: Path
) -> None:
    service.stop()  # of the other modules: one cluster serves one at a time
    versioned.fill(store)
    changes.promote(store, "default", "a")
    config = ServeConfig(catalog=store.uri, port=0, replicas=2, num_cpus=0.5, catalog_poll_s=0.2)
    problems: list[str] = []
    answered: dict[str, int] = {}
    ending = threading.Event()

    def ask(url: str) -> None:
        with httpx.Client(base_url=url, timeout=60) as http:
            while not ending.is_set():
                answer = http.post("/v1/search", json={"text": "red star", "k": 5})
                if answer.status_code != 200:
                    problems.append(answer.text)
                    continue
                found = answer.json()
                name = found["version"]
                if any(not hit["id"].startswith(f"{name}-") for hit in found["hits"]):
                    problems.append(f"mixed: {found}")
                answered[name] = answered.get(name, 0) + 1

    with start(config=config) as server:
        clients = [threading.Thread(target=ask, args=(server.url,), daemon=True) for _ in range(2)]
        for client in clients:
            client.start()
        for name in ("b", "a", "b", "a"):
            changes.promote(store, "default", name)
            wait_for(server.url, name)
        ending.set()
        for client in clients:
            client.join(60)
    assert not problems, problems[:3]
    assert set(answered) == {"a", "b"}


def wait_for(url: str, name: str) -> None:
    """Until 20 answers in a row are of that version: both replicas have it."""
    deadline, row = time.monotonic() + 60, 0
    while row < 20:
        found = httpx.post(f"{url}/v1/search", json={"text": "x", "k": 1}, timeout=60).json()
        row = row + 1 if found["version"] == name else 0
        assert time.monotonic() < deadline, f"version {name} is not served everywhere"


def test_what_cannot_be_served_is_said_before_anything_starts(store: CatalogStore, versioned: Versioned) -> None:
    config = ServeConfig(catalog=store.uri)
    with pytest.raises(ServeError, match="there is no catalog here"):
        start(config=config)
    versioned.fill(store, "default", "a")
    with pytest.raises(ServeError, match="nothing is live in collection 'default'"):
        start(config=config)
    with pytest.raises(ServeError, match="no room for another"):
        start(versioned.models["a"], versioned.indexes["a"], config)
    with pytest.raises(ServeError, match="nothing to serve"):
        start()
