"""Requests and switches: nothing fails, nothing mixes, everything is closed in the end."""

import gc
import threading
import time
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from rayemb.serve.errors import ApiError
from rayemb.serve.versions import CatalogStore, changes
from rayemb.serve.versions.table import share_of
from tests.serve.live import listening
from tests.serve.versions.conftest import TEXTS, Run, Versioned

SWITCHES = 50
CLIENTS = 4


def check(answer: dict[str, Any], versions: dict[str, tuple[str, str]]) -> str:
    """The version that answered, all of it: ids, payload, index, model, links."""
    name: str = answer["version"]
    assert (answer["index_version"], answer["model_digest"]) == versions[name]
    assert answer["collection"] == "default"
    assert len(answer["hits"]) == 5
    for hit in answer["hits"]:
        assert hit["id"].startswith(f"{name}-")
        assert hit["payload"] == {"of": name}
        assert hit["image_url"].endswith(f"?v={versions[name][0]}")
    return name


class Load(threading.Thread):
    """A client that asks without a pause; keeps what went wrong and how often each version answered."""

    def __init__(self, url: str, versions: dict[str, tuple[str, str]], number: int) -> None:
        super().__init__(daemon=True)
        self.url, self.versions, self.number = url, versions, number
        self.ending = threading.Event()
        self.answers: dict[str, int] = {}
        self.changes = 0
        self.problem: BaseException | None = None

    def run(self) -> None:
        try:
            last = ""
            with httpx.Client(base_url=self.url, timeout=60) as http:
                while not self.ending.is_set():
                    name = self.ask(http)
                    self.answers[name] = self.answers.get(name, 0) + 1
                    self.changes += name != last
                    last = name
        except BaseException as error:
            self.problem = error

    def ask(self, http: httpx.Client) -> str:
        text = TEXTS[self.number % len(TEXTS)]
        if self.number % 2:
            answer = http.post("/v1/search", json={"text": text, "k": 5})
            assert answer.status_code == 200, answer.text
            name = check(answer.json(), self.versions)
            picture = http.get(answer.json()["hits"][0]["image_url"])
            # Of the version that is asked for while it is open; of another one no such id is there.
            assert picture.status_code in (200, 404), picture.text
            return name
        answer = http.post("/v1/search/batch", json={"texts": [text] * 3, "k": 5, "payload": True})
        assert answer.status_code == 200, answer.text
        document = answer.json()
        name = document["version"]
        assert (document["index_version"], document["model_digest"]) == self.versions[name]
        assert all(each.startswith(f"{name}-") for ids in document["ids"] for each in ids)
        assert all(row == {"of": name} for rows in document["payload"] for row in rows)
        return str(name)


def test_fifty_switches_under_load_fail_nothing_and_mix_nothing(
    store: CatalogStore, versioned: Versioned, run: Run
) -> None:
    versioned.fill(store)
    changes.promote(store, "default", "a")
    entries = store.read().collections["default"].versions
    versions = {name: (entry.index_version, entry.model_digest) for name, entry in entries.items()}
    with run(store) as service, listening(service.app) as url:
        load = [Load(url, versions, number) for number in range(CLIENTS)]
        for client in load:
            client.start()
        left = []
        for number in range(SWITCHES):
            wanted = "ba"[number % 2]
            left.append(service.follower.versions.routes["default"].live)

            # Without `promote`, which opens the version once more: what is under test is the service.
            def point(catalog: Any, wanted: str = wanted) -> Any:
                found = catalog.collections["default"]
                return catalog.with_collection("default", found.model_copy(update={"live": wanted}))

            service.follow(store.update(point).revision)
            before = [sum(client.answers.values()) for client in load]
            deadline = time.monotonic() + 60
            # Each client has asked under this version before the next switch.
            while any(sum(c.answers.values()) < b + 2 and not c.problem for c, b in zip(load, before, strict=True)):
                assert time.monotonic() < deadline, "the clients do not get on"
                time.sleep(0.002)
            assert not any(client.problem for client in load)
        for client in load:
            client.ending.set()
        for client in load:
            client.join(60)
            assert client.problem is None
            assert set(client.answers) == {"a", "b"}
            assert client.changes >= SWITCHES
        metrics = httpx.get(f"{url}/metrics").text
        assert f'rayemb_switches_total{{collection="default"}} {SWITCHES}.0' in metrics
        assert 'status="5' not in metrics
        for served in left:
            wait_closed(served)


def test_a_request_ends_on_the_version_that_it_began_on(store: CatalogStore, versioned: Versioned, run: Run) -> None:
    versioned.fill(store)
    changes.promote(store, "default", "a")
    with run(store) as service:
        versions = service.follower.versions
        with versions.take() as first:
            service.follow(changes.promote(store, "default", "b").revision)
            with versions.take() as second:
                assert (first.version, second.version) == ("a", "b")
                assert first.engine.describe().index_version != second.engine.describe().index_version
            # Its own version is there for its pictures, and is not handed to others.
            assert not versions.hold(first)
        wait_closed(first)
        assert versions.hold(second)
        versions.leave(second)


def wait_closed(served: Any) -> None:
    deadline = time.monotonic() + 30
    while hasattr(served, "engine"):
        assert time.monotonic() < deadline, "the version was not closed"
        time.sleep(0.01)


def test_metrics_can_be_read_while_a_version_closes(store: CatalogStore, versioned: Versioned, run: Run) -> None:
    versioned.fill(store, "default", "a")
    changes.promote(store, "default", "a")
    with run(store) as service, TestClient(service.app) as http:
        versions = service.follower.versions
        with versions.held() as table:
            served = table["default"].live
            versions.set({})  # as at a switch, before the metrics are told
            assert hasattr(served, "engine"), "it is held"
        wait_closed(served)
        assert "rayemb_index_rows{" not in http.get("/metrics").text


def test_versions_of_one_model_share_it(store: CatalogStore, versioned: Versioned, run: Run) -> None:
    versioned.fill(store, "default", "a", "b", "c")
    changes.promote(store, "default", "a")
    changes.set_canary(store, "default", "c", 10)
    with run(store) as service:
        routes = service.follower.versions.routes["default"]
        models = [each.engine._encoder._model for each in routes.roles.values()]
        assert models[0] is models[1]
        del routes, models
        gc.collect()


def test_collections_have_addresses_of_their_own(store: CatalogStore, versioned: Versioned, run: Run) -> None:
    versioned.fill(store, "default", "a")
    versioned.fill(store, "other", "b")
    changes.promote(store, "default", "a")
    changes.promote(store, "other", "b")
    with run(store) as service, TestClient(service.app) as http:
        body = {"text": "red star", "k": 3}
        answers = [http.post(f"{at}/v1/search", json=body).json() for at in ("", "/collections/other")]
        assert [(each["collection"], each["version"]) for each in answers] == [("default", "a"), ("other", "b")]
        link = answers[1]["hits"][0]["image_url"]
        assert link.startswith("/collections/other/v1/items/b-")
        assert http.get(link).status_code == 200
        assert http.get("/collections/other/v1/index").json()["version"] == "b"
        assert http.get("/collections/other/").status_code == 200
        unknown = http.post("/collections/nobody/v1/search", json=body)
        assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "collection_not_found")
        wrong = http.post("/collections/other/v1/embeddings", json={"input": []}).json()
        assert set(wrong["error"]) == {"message", "type", "param", "code", "request_id"}, "OpenAI's shape there too"


def test_a_canary_gets_its_share_and_a_client_keeps_its_version(
    store: CatalogStore, versioned: Versioned, run: Run
) -> None:
    versioned.fill(store)
    changes.promote(store, "default", "a")
    changes.set_canary(store, "default", "b", 30)
    with run(store) as service, TestClient(service.app) as http:

        def asked(client: str) -> str:
            answer = http.post("/v1/search", json={"text": "x", "k": 5}, headers={"X-Rayemb-Client": client})
            return str(answer.json()["version"])

        clients = [f"client-{i}" for i in range(60)]
        first = {client: asked(client) for client in clients}
        assert first == {client: asked(client) for client in clients}
        assert first == {c: "b" if share_of(c, "default", "b") < 0.3 else "a" for c in clients}
        assert set(first.values()) == {"a", "b"}
        service.follow(changes.set_canary(store, "default", "b", 60).revision)
        more = {client: asked(client) for client in clients}
        assert all(more[client] == "b" for client in clients if first[client] == "b"), "nobody goes back"
        service.follow(changes.set_canary(store, "default", "b", 0).revision)
        assert {asked(client) for client in clients} == {"a"}


def test_vectors_go_to_the_version_that_they_are_of(store: CatalogStore, versioned: Versioned, run: Run) -> None:
    versioned.fill(store)
    changes.promote(store, "default", "a")
    changes.set_canary(store, "default", "b", 50)
    digests = {name: each.model_digest for name, each in store.read().collections["default"].versions.items()}
    with run(store) as service, TestClient(service.app) as http:
        for name in ("a", "b") * 4:
            body = {"input": ["red star"], "model": digests[name]}
            made = http.post("/v1/embeddings", json=body).json()
            assert made["model"] == digests[name]
            batch = {"vectors": [made["data"][0]["embedding"]], "model": made["model"], "k": 2}
            answer = http.post("/v1/search/batch", json=batch)
            assert answer.status_code == 200, answer.text
            assert answer.json()["version"] == name
        wrong = http.post("/v1/search/batch", json={**batch, "model": "0" * 64})
        assert (wrong.status_code, wrong.json()["error"]["type"]) == (409, "model_mismatch")


def test_shares_are_even() -> None:
    shares = [share_of(f"client {i}", "c", "v") for i in range(4000)]
    # Kolmogorov's bound at 1e-6: a tail of 2 exp(-2 n d^2).
    worst = max(abs(i / len(shares) - share) for i, share in enumerate(sorted(shares)))
    assert worst < 0.0427
    assert share_of("", "c", "v") != share_of("", "c", "v"), "nobody in particular: by chance"


def test_an_unknown_collection_is_said(store: CatalogStore, versioned: Versioned, run: Run) -> None:
    versioned.fill(store, "default", "a")
    changes.promote(store, "default", "a")
    with run(store) as service, pytest.raises(ApiError, match="nobody"), service.follower.versions.take("nobody"):
        pass
