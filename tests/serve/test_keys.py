"""API keys: the file, the commands, who is let in, and that no key is ever written down."""

import asyncio
import base64
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from pydantic import ValidationError
from typer.testing import CliRunner

from rayemb.cli import app
from rayemb.serve import ServeConfig, ServeError
from rayemb.serve.asgi import create_app
from rayemb.serve.keys import KeyRing, TokenBucket, new_key, read_keys, revoke_key
from rayemb.serve.local import LocalEngine
from tests.serve.test_bad_requests import check

QUERY = {"text": "red star", "k": 1}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture
def uri(tmp_path: Path) -> str:
    return str(tmp_path / "keys.json")


def client(local: LocalEngine, config: ServeConfig, **changes: Any) -> TestClient:
    return TestClient(create_app(local, config.model_copy(update=changes)))


def test_the_file_has_digests_alone(uri: str) -> None:
    secret = new_key(uri, "ann", collections=("icons",), per_second=2.5, max_body_bytes=1000)
    other = new_key(uri, "bob")
    text = Path(uri).read_text()
    assert secret not in text
    assert secret != other
    assert len(base64.urlsafe_b64decode(secret.removeprefix("rayemb-") + "=")) == 32
    ann, bob = read_keys(uri)
    assert ann.sha256 == hashlib.sha256(secret.encode()).hexdigest()
    assert (ann.name, ann.collections, ann.per_second, ann.max_body_bytes) == ("ann", ("icons",), 2.5, 1000)
    assert (bob.collections, bob.per_second, bob.max_body_bytes, bob.revoked) == (None, None, None, None)


def test_names_are_free_again_after_a_revocation(uri: str) -> None:
    new_key(uri, "ann")
    with pytest.raises(ServeError, match="there is a key 'ann' already"):
        new_key(uri, "ann")
    revoke_key(uri, "ann")
    with pytest.raises(ServeError, match="no live key 'ann'"):
        revoke_key(uri, "ann")
    new_key(uri, "ann")
    assert [key.revoked is None for key in read_keys(uri)] == [False, True]


@pytest.mark.parametrize("name", ["", "a b", "../x", "a\nb", "x" * 65])
def test_a_name_cannot_break_a_log(uri: str, name: str) -> None:
    with pytest.raises(ServeError, match="name"):
        new_key(uri, name)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 2, "keys": []}', '{"keys": [{"name": "a"}]}'])
def test_a_damaged_file_is_refused_without_quoting_it(uri: str, content: str) -> None:
    Path(uri).write_text(content)
    with pytest.raises(ServeError, match="no file of keys") as caught:
        read_keys(uri)
    assert caught.value.where == uri
    with pytest.raises(ServeError, match="there is no file of keys"):
        read_keys(uri + "x")


def test_the_commands(uri: str) -> None:
    runner = CliRunner()
    made = runner.invoke(app, ["serve", "key", "new", "ann", "--keys", uri, "--per-second", "3", "--collection", "a"])
    assert made.exit_code == 0
    secret = made.stdout.strip()
    assert read_keys(uri)[0].sha256 == hashlib.sha256(secret.encode()).hexdigest()
    listed = runner.invoke(app, ["serve", "key", "list", "--keys", uri, "--json"])
    assert json.loads(listed.stdout)[0]["name"] == "ann"
    assert read_keys(uri)[0].sha256 not in listed.stdout
    assert "ann" in runner.invoke(app, ["serve", "key", "list", "--keys", uri]).stdout
    assert runner.invoke(app, ["serve", "key", "revoke", "ann", "--keys", uri]).exit_code == 0
    assert read_keys(uri)[0].revoked


def test_only_a_live_key_opens(local: LocalEngine, config: ServeConfig, uri: str) -> None:
    secret = new_key(uri, "ann")
    new_key(uri, "bob")
    with client(local, config, keys=uri) as http:
        for headers in (
            {},
            bearer("wrong"),
            bearer(""),
            bearer(secret[:-1]),
            bearer(f"{secret} x"),
            {"Authorization": secret},
            {"Authorization": "Basic !!!"},
            {"Authorization": "Bearer \xff\xfe".encode("latin-1")},
        ):
            for path in ("/v1/search", "/nowhere"):
                answer = http.post(path, json=QUERY, headers=headers)
                check(answer, 401, "authorization")
                assert answer.headers["www-authenticate"].startswith("Basic ")
        for path in ("/", "/v1/index", "/metrics", "/openapi.json"):
            assert http.get(path).status_code == 401
            assert http.get(path, headers=bearer(secret)).status_code == 200
        # What a browser sends after it has asked: any name, the key as the password.
        assert http.get("/", auth=("anybody", secret)).status_code == 200
        assert http.get("/", auth=(secret, "")).status_code == 401
        for path in ("/healthz", "/readyz"):
            assert http.get(path).status_code == 200
        assert http.post("/v1/search", json=QUERY, headers=bearer(secret)).status_code == 200
        error = http.post("/v1/embeddings", json={"input": "a"}).json()["error"]
        assert (error["code"], error["param"]) == ("unauthorized", "authorization")
        metrics = http.get("/metrics", headers=bearer(secret)).text
    assert 'rayemb_key_requests_total{key="ann",status="200"} 6.0' in metrics
    assert secret not in metrics
    assert "bob" not in metrics


def test_a_key_is_for_its_collections(local: LocalEngine, config: ServeConfig, uri: str) -> None:
    secrets = {name: new_key(uri, name, collections=(name, "both")) for name in ("icons", "texts")}
    for served, opened in (("icons", {"icons"}), ("texts", {"texts"}), ("both", {"icons", "texts"}), ("none", set())):
        with client(local, config, keys=uri, collection=served) as http:
            for name, secret in secrets.items():
                answer = http.post("/v1/search", json=QUERY, headers=bearer(secret))
                if name in opened:
                    assert answer.status_code == 200
                else:
                    check(answer, 403, "authorization")


def test_a_key_has_its_rate_and_its_size(local: LocalEngine, config: ServeConfig, uri: str) -> None:
    slow, small = new_key(uri, "slow", per_second=0.01), new_key(uri, "small", max_body_bytes=50)
    with client(local, config, keys=uri) as http:
        assert http.post("/v1/search", json=QUERY, headers=bearer(slow)).status_code == 200
        refused = http.post("/v1/search", json=QUERY, headers=bearer(slow))
        check(refused, 429, "authorization")
        assert 90 <= int(refused.headers["retry-after"]) <= 100
        assert http.post("/v1/search", json=QUERY, headers=bearer(small)).status_code == 200
        check(http.post("/v1/search", json={"text": "x" * 60}, headers=bearer(small)), 413, "body")
        metrics = http.get("/metrics", headers=bearer(small)).text
    assert 'rayemb_refused_total{reason="rate"} 1.0' in metrics
    assert 'rayemb_refused_total{reason="size"} 1.0' in metrics


def test_a_bucket_gives_its_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("rayemb.serve.keys.time.monotonic", lambda: now)
    bucket = TokenBucket(4.0)
    taken = []
    for step in range(400):  # ten seconds of asking every 25 ms
        now = 100.0 + step * 0.025
        wait = bucket.take()
        if wait == 0.0:
            taken.append(now)
        else:
            assert 0 < wait <= 0.25 + 1e-9
    # A second's worth at once, then four a second.
    assert 4 + 9.975 * 4 - 1 <= len(taken) <= 4 + 9.975 * 4
    now = 1000.0
    assert [bucket.take() == 0.0 for _ in range(5)] == [True] * 4 + [False]
    slow = TokenBucket(0.5)
    assert slow.take() == 0.0
    assert slow.take() == pytest.approx(2.0)


def test_a_revoked_key_ends_while_the_gateway_runs(uri: str, caplog: pytest.LogCaptureFixture) -> None:
    secret = new_key(uri, "ann")

    async def settled(ring: KeyRing) -> None:
        await asyncio.sleep(0.01)
        ring.find("")  # reads the file again, beside
        assert ring._reading is not None
        await ring._reading

    async def main() -> None:
        ring = KeyRing(uri, refresh_s=0.0)
        assert ring.find(secret) is not None
        Path(uri).rename(uri + ".away")
        with caplog.at_level(logging.WARNING):
            await settled(ring)
        assert ring.find(secret) is not None  # those known stay
        assert "could not be read again" in caplog.text
        Path(uri + ".away").rename(uri)
        revoke_key(uri, "ann")
        later = new_key(uri, "bob")
        await settled(ring)
        assert ring.find(secret) is None
        assert ring.find(later) is not None

    asyncio.run(main())
    assert secret not in caplog.text


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "example.org", ""])
def test_an_address_that_others_reach_needs_keys(host: str) -> None:
    with pytest.raises(ValidationError, match="there are no keys"):
        ServeConfig(host=host)
    assert ServeConfig(host=host, open=True).keys is None
    assert ServeConfig(host=host, keys="keys.json").keys == str(Path("keys.json").resolve())


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.9.1", "::1", "localhost"])
def test_loopback_needs_none(host: str) -> None:
    assert not ServeConfig(host=host).open


def test_a_gateway_without_its_file_does_not_start(local: LocalEngine, config: ServeConfig, uri: str) -> None:
    with pytest.raises(ServeError, match="no file of keys"):
        client(local, config, keys=uri)


def test_the_document_says_that_a_key_is_needed(local: LocalEngine, config: ServeConfig, uri: str) -> None:
    secret = new_key(uri, "ann")
    with client(local, config, keys=uri) as http:
        document = http.get("/openapi.json", headers=bearer(secret)).json()
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    assert document["paths"]["/v1/search"]["post"]["security"] == [{"key": []}]
    assert document["paths"]["/healthz"]["get"]["security"] == []
