"""The catalog by command line and over HTTP: the same changes, and who may make them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from rayemb.cli import app
from rayemb.errors import RayembError
from rayemb.serve import Client
from rayemb.serve.keys import new_key
from rayemb.serve.versions import CatalogStore, changes
from tests.serve.live import listening
from tests.serve.versions.conftest import Run, Versioned


def command(*words: str) -> Any:
    done = CliRunner(env={"COLUMNS": "300"}).invoke(app, ["collection", *words])
    if done.exception and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_commands_make_the_changes(versioned: Versioned, store: CatalogStore) -> None:
    at = ("--catalog", store.uri)
    for name in ("a", "b"):
        paths = ("--model", versioned.models[name], "--index", versioned.indexes[name])
        assert f"added version {name}" in command("add", "shop", *paths, "--name", name, *at)
    assert json.loads(command("promote", "shop", "a", *at, "--json"))["collection"]["live"] == "a"
    assert "version b gets 5 %" in command("canary", "shop", "b", "5", *at)
    assert "asked 50 %" in command("shadow", "shop", "b", "50", *at)
    shown = command("list", *at)
    assert "live" in shown
    assert "canary 5 %, shadow 50 %" in shown
    command("promote", "shop", "b", *at)
    assert "version a is live again" in command("rollback", "shop", *at)
    command("remove", "shop", "b", *at)
    document = json.loads(command("list", *at, "--json"))
    assert set(document["collections"]["shop"]["versions"]) == {"a"}
    with pytest.raises(RayembError, match="no version 'b'"):
        command("promote", "shop", "b", *at)


@pytest.mark.parametrize("name", ["list", "add", "promote", "canary", "shadow", "rollback", "remove", "status"])
def test_each_command_explains_itself(name: str) -> None:
    assert "Usage" in command(name, "--help")


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    uri = str(tmp_path / "keys.json")
    return {
        "uri": uri,
        "admin": new_key(uri, "ann", admin=True),
        "user": new_key(uri, "bob"),
        "one": new_key(uri, "cat", collections=("default",), admin=True),
    }


Ask = Any


@pytest.fixture
def ask(store: CatalogStore, versioned: Versioned, run: Run, keys: dict[str, str]) -> Iterator[Ask]:
    versioned.fill(store, "default", "a")
    versioned.fill(store, "other", "b")
    changes.promote(store, "default", "a")
    changes.promote(store, "other", "b")
    with run(store, keys=keys["uri"]) as service, TestClient(service.app) as http:

        def asked(method: str, path: str, key: str = "admin", body: Any = None, expect: int = 200) -> Any:
            headers = {"Authorization": f"Bearer {keys[key]}"}
            answer = http.request(method, path, json=body, headers=headers)
            assert answer.status_code == expect, answer.text
            return answer.json()

        yield asked


def test_changes_over_http_are_served_when_they_are_answered(ask: Ask, versioned: Versioned) -> None:
    one = "/v1/collections/default"
    new = {"model": versioned.models["b"], "index": versioned.indexes["b"], "name": "b"}
    assert ask("POST", one + "/versions", body=new)["version"] == "b"
    changed = ask("POST", one + "/promote", body={"version": "b"})
    assert changed["applied"] is True
    assert changed["collection"]["live"] == "b"
    assert ask("POST", "/v1/search", "user", {"text": "x"})["version"] == "b"
    ask("POST", one + "/canary", body={"version": "a", "percent": 100})
    assert ask("POST", "/v1/search", "user", {"text": "x"})["version"] == "a"
    ask("POST", one + "/canary", body={"version": "a", "percent": 0})
    ask("POST", one + "/rollback", body={})
    assert ask("POST", "/v1/search", "user", {"text": "x"})["version"] == "a"
    ask("DELETE", one + "/versions/b")
    listed = ask("GET", "/v1/collections", "user")
    assert set(listed["collections"]["default"]["versions"]) == {"a"}
    assert listed["collections"]["other"]["serving"]["live"]["version"] == "b"
    assert listed["problems"] == {}


def test_what_is_refused_over_http_says_why(ask: Ask, versioned: Versioned) -> None:
    one = "/v1/collections/default"
    told = ask("POST", one + "/promote", body={"version": "z"}, expect=409)["error"]["message"]
    assert told == "there is no version 'z'; there are: a"
    ask("POST", "/v1/collections/nobody/rollback", body={}, expect=409)
    asked = {"version": "a", "require": ["ndcg@10>=0.5"]}
    told = ask("POST", one + "/promote", body=asked, expect=409)["error"]["message"]
    assert "there are no labelled queries to show ndcg@10>=0.5 on" in told
    for wrong in (["ndcg@10"], ["hole@10<1"], "ndcg@10>=0.5"):
        body = {"version": "a", "require": wrong}
        assert ask("POST", one + "/promote", body=body, expect=422)["error"]["field"] == "require"
    ask("DELETE", one + "/versions/a", expect=409)
    mixed = {"model": versioned.models["a"], "index": versioned.indexes["b"]}
    assert "do not compare" in ask("POST", one + "/versions", body=mixed, expect=422)["error"]["message"]
    wrong = (
        {"version": "a", "percent": 101},
        {"version": "a"},
        {"version": "../a", "percent": 1},
        {"versions": 1},
    )
    for body in wrong:
        ask("POST", one + "/canary", body=body, expect=422)
    assert ask("POST", one + "/rollback", body=[], expect=422)["error"]["field"] == "body"


def test_only_keys_that_may_change_what_they_open(ask: Ask) -> None:
    promote = {"version": "a"}
    ask("POST", "/v1/collections/default/promote", "user", promote, 403)
    ask("POST", "/v1/collections/other/promote", "one", {"version": "b"}, 403)
    ask("POST", "/v1/collections/default/promote", "one", promote)
    assert set(ask("GET", "/v1/collections", "one")["collections"]) == {"default"}
    ask("POST", "/collections/other/v1/search", "one", {"text": "x"}, 403)
    assert ask("POST", "/collections/other/v1/search", "user", {"text": "x"})["version"] == "b"


def test_without_keys_nobody_changes_anything(store: CatalogStore, versioned: Versioned, run: Run) -> None:
    versioned.fill(store, "default", "a")
    changes.promote(store, "default", "a")
    with run(store) as service, TestClient(service.app) as http:
        answer = http.post("/v1/collections/default/promote", json={"version": "a"})
        assert (answer.status_code, answer.json()["error"]["type"]) == (403, "forbidden")
        assert http.get("/v1/collections").status_code == 200


def test_the_status_of_a_running_service(store: CatalogStore, versioned: Versioned, run: Run) -> None:
    versioned.fill(store)
    changes.promote(store, "default", "a")
    changes.set_canary(store, "default", "b", 10)
    with run(store) as service, listening(service.app) as url:
        shown = command("status", "--url", url)
        assert "canary" in shown
        document = json.loads(command("status", "--url", url, "--json"))
        assert document["collections"]["default"]["serving"]["canary"]["version"] == "b"
        with Client(url + "/collections/default") as client:
            assert client.search("x", k=2).version in ("a", "b")
