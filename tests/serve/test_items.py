"""Items written, removed and read over HTTP, found by the next search, in both topologies; no cluster."""

import asyncio
import base64
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from rayemb.data.embeddings import EmbeddingsTable
from rayemb.index import IndexConfig, load_manifest
from rayemb.index.live.compact import fold
from rayemb.index.live.log import log_uri, updates_in
from rayemb.index.manifest import publish_manifest
from rayemb.models import ImageLimits, Model
from rayemb.serve import AsyncClient, Client
from rayemb.serve.asgi import create_app, openapi_document
from rayemb.serve.client import Item
from rayemb.serve.config import ServeConfig
from rayemb.serve.deploy import Embedder, ShardServer
from rayemb.serve.engine import Engine
from rayemb.serve.errors import ServeError
from rayemb.serve.keys import new_key
from rayemb.serve.local import LocalEngine
from rayemb.serve.spread import SpreadEngine
from tests.index.tables import build_here, write_table
from tests.serve.conftest import COLOURS, SHAPES, draw, tiny_model
from tests.serve.live import listening
from tests.serve.test_engine import Handle
from tests.serve.test_openapi import CHECKS

CONFIG = ServeConfig(
    live=True, max_k=50, max_batch=8, max_queries=16, follow_s=3600, image=ImageLimits(max_bytes=20_000)
)


@dataclass(frozen=True)
class Place:
    """A model, and an index of it that may be written to."""

    folder: Path
    model: Model

    def engine(self, topology: str, config: ServeConfig = CONFIG) -> Engine:
        model, index = str(self.folder / "model"), str(self.folder / "index")
        if topology == "together":
            return LocalEngine(model, index, config)
        manifest = load_manifest(index)
        embedder = Handle(Embedder(model, manifest.model_digest, config, "image"))
        shards = [Handle(ShardServer(index, manifest, i, config)) for i in range(len(manifest.shards))]
        return SpreadEngine(index, manifest, embedder, shards, config)

    @property
    def log(self) -> Path:
        return Path(log_uri(str(self.folder / "embeddings.lance")))


def make_place(folder: Path) -> Place:
    rows = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    images = [draw(colour, shape, 60) for colour, shape in rows]
    texts = [f"{colour} {shape}" for colour, shape in rows]
    model = tiny_model(texts, seed=1)
    model.save(str(folder / "model"))
    payload = {"text": texts, "colour": [colour for colour, _ in rows], "size": [60] * len(rows)}
    vectors, digest = model.embed_images(images), str(model.digest)
    write_table(folder / "first.lance", vectors, payload, ids=texts, images=images, digest=digest)
    return Place(folder, Model.load(str(folder / "model")))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("items"))


@pytest.fixture
def place(made: Place) -> Place:
    return emptied(made)


def emptied(made: Place) -> Place:
    """The place as it was made, its index built anew."""
    for name in ("index", "embeddings.lance", "embeddings.updates.lance"):
        shutil.rmtree(made.folder / name, ignore_errors=True)
    shutil.copytree(made.folder / "first.lance", made.folder / "embeddings.lance")
    build_here(
        str(made.folder / "embeddings.lance"),
        made.folder / "index",
        IndexConfig(factory="Flat", shards=2, words="text"),
    )
    return made


@pytest.fixture(params=["together", "spread"])
def http(place: Place, request: pytest.FixtureRequest) -> Iterator[TestClient]:
    app = create_app(place.engine(request.param), CONFIG)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def search(http: TestClient, text: str, **more: Any) -> list[str]:
    answer = http.post("/v1/search", json={"text": text, "k": 50, **more})
    assert answer.status_code == 200, answer.text
    assert not answer.json()["partial"]
    return [hit["id"] for hit in answer.json()["hits"]]


def upsert(http: TestClient, *items: dict[str, Any], **more: Any) -> dict[str, Any]:
    answer = http.post("/v1/items", json={"items": list(items), **more})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_items_are_found_by_the_next_search_and_gone_after_a_delete(http: TestClient, made: Place) -> None:
    rows = len(COLOURS) * len(SHAPES)
    assert len(search(http, "red star")) == rows
    new = draw("green", "star", 70)
    vector = made.model.embed_texts(["blue square"], kind="text")[0]
    done = upsert(
        http,
        {"id": "text", "text": "red star", "payload": {"size": 7}},
        {"id": "picture/1?", "image": base64.b64encode(new).decode(), "payload": {"colour": "green"}},
        {"id": "red circle", "vector": (vector * 5).tolist(), "payload": {"text": "a replaced zebra"}},
        model=made.model.digest[:12],
    )
    assert (done["upserted"], done["version"]) == (3, 1)
    found = http.post("/v1/search", json={"text": "red star", "k": 50, "at_least": 1}).json()
    by_id = {hit["id"]: hit for hit in found["hits"]}
    assert (len(by_id), len(found["hits"]), found["updates"]) == (rows + 2, rows + 2, 1)
    assert by_id["text"]["payload"] == {"text": "red star", "colour": None, "size": 7}
    assert by_id["text"]["score"] == pytest.approx(1, abs=1e-5)
    assert http.get(by_id["picture/1?"]["image_url"]).content == new
    assert http.get(by_id["text"]["image_url"]).status_code == 404
    assert by_id["red circle"]["payload"]["text"] == "a replaced zebra"
    assert search(http, "blue square", k=1) == ["red circle"]
    # Filters, words, examples, groups and batches see them too.
    assert search(http, "red", filter={"size": 7}) == ["text"]
    assert search(http, "zebra", hybrid={}, k=1) == ["red circle"]
    assert set(search(http, "x", group_by="size")) >= {"text"}
    like = http.post("/v1/search", json={"positive": ["text"], "k": 50}).json()["hits"]
    assert "text" not in [hit["id"] for hit in like]
    batch = {"texts": ["red star", "blue square"], "k": 30}
    answer = http.post("/v1/search/batch", json=batch).json()
    assert (answer["ids"][1][0], answer["updates"]) == ("red circle", 1)
    assert sorted(answer["ids"][0]) == sorted(by_id)
    with_payload = http.post("/v1/search/batch", json={**batch, "payload": True}).json()
    assert with_payload["ids"] == answer["ids"]

    got = http.post("/v1/items/get", json={"ids": ["nobody", "text", "blue star", "text"]}).json()["items"]
    assert [(item["id"], item["payload"]["size"]) for item in got] == [("text", 7), ("blue star", 60)]
    gone = http.post("/v1/items/delete", json={"ids": ["text", "blue star", "nobody", "text"]}).json()
    assert (gone["deleted"], gone["version"]) == (2, 2)
    assert not {"text", "blue star"} & set(search(http, "red star"))
    assert http.post("/v1/items/get", json={"ids": ["text", "blue star"]}).json()["items"] == []
    assert http.get("/v1/items/blue%20star/image").status_code == 404
    assert http.post("/v1/search", json={"positive": ["blue star"]}).status_code == 400
    metrics = http.get("/metrics").text
    assert re.search(r"^rayemb_updates{.*} 6\.0$", metrics, re.M)
    assert re.search(r"^rayemb_updates_version{.*} 2\.0$", metrics, re.M)


def test_another_replica_sees_a_write_whose_version_is_named(place: Place) -> None:
    apps = [create_app(place.engine(topology), CONFIG) for topology in ("together", "spread")]
    with TestClient(apps[0]) as one, TestClient(apps[1]) as two:
        for number, (writer, reader) in enumerate([(one, two), (two, one)], 1):
            version = upsert(writer, {"id": f"new-{number}", "text": "pink star"})["version"]
            assert f"new-{number}" not in search(reader, "pink star")
            assert f"new-{number}" in search(reader, "pink star", at_least=version)
            late = reader.post("/v1/search", json={"text": "x", "at_least": version + 1})
            assert (late.status_code, late.json()["error"]["field"]) == (422, "at_least")


WRONG: list[tuple[dict[str, Any], int, str]] = [
    ({"items": []}, 422, "items"),
    ({"items": [{"id": "a"}]}, 422, "items.0"),
    ({"items": [{"id": "a", "text": "x", "vector": [1.0] * 32}]}, 422, "items.0"),
    ({"items": [{"id": "", "text": "x"}]}, 422, "items.0.id"),
    ({"items": [{"id": "x" * 513, "text": "x"}]}, 422, "items.0.id"),
    ({"items": [{"id": "ä" * 400, "text": "x"}]}, 422, "items.0.id"),
    ({"items": [{"id": 5, "text": "x"}]}, 422, "items.0.id"),
    ({"items": [{"id": "a", "text": "x"}, {"id": "b", "text": " "}]}, 422, "items.1.text"),
    ({"items": [{"id": "a", "text": "x", "payload": {"nobody": 1}}]}, 422, "items.0.payload.nobody"),
    ({"items": [{"id": "a", "text": "x", "payload": {"size": "5"}}]}, 422, "items.0.payload.size"),
    ({"items": [{"id": "a", "text": "x", "payload": {"size": 2**63}}]}, 422, "items.0.payload.size"),
    ({"items": [{"id": "a", "text": "x", "payload": {"colour": 5}}]}, 422, "items.0.payload.colour"),
    ({"items": [{"id": "a", "image": "!"}]}, 422, "items.0.image"),
    ({"items": [{"id": "a", "image": "AAAA"}]}, 422, "items.0.image"),
    ({"items": [{"id": "a", "vector": [1.0] * 31}], "model": "served"}, 422, "items.0.vector"),
    ({"items": [{"id": "a", "vector": [0.0] * 32}], "model": "served"}, 422, "items.0.vector"),
    ({"items": [{"id": "a", "vector": [1.0] * 32}]}, 422, "model"),
    ({"items": [{"id": "a", "vector": [1.0] * 32}], "model": "f" * 64}, 409, "model"),
    ({"items": [{"id": str(i), "text": "x"} for i in range(17)]}, 422, "items"),
    ({"items": [{"id": "a", "text": "x", "more": 1}]}, 422, "items.0.more"),
    ({"items": "a"}, 422, "items"),
]


def test_what_is_wrong_is_named_and_nothing_is_written(place: Place) -> None:
    with TestClient(create_app(place.engine("together"), CONFIG)) as http:
        for body, status, field in WRONG:
            named = {"model": place.model.digest} if body.get("model") == "served" else {}
            answer = http.post("/v1/items", json={**body, **named})
            assert (answer.status_code, answer.json()["error"]["field"]) == (status, field), (body, answer.text)
        for data in (b'{"items": [{"id": "\\ud800", "text": "x"}]}', b'{"items": [{"id": "a", "vector": [NaN]}]}'):
            assert http.post("/v1/items", content=data, headers={"Content-Type": "application/json"}).status_code == 400
        for path in ("/v1/items/delete", "/v1/items/get"):
            for ids in ([], [""], [5], ["a"] * 17, "a"):
                assert http.post(path, json={"ids": ids}).status_code == 422
        assert not place.log.exists()


def test_a_full_log_and_a_store_that_went_away_refuse_writes_and_answer_searches(place: Place) -> None:
    config = CONFIG.model_copy(update={"max_updates": 2})
    with TestClient(create_app(place.engine("together", config), config)) as http:
        upsert(http, {"id": "a", "text": "red star"}, {"id": "b", "text": "red star"})
        full = http.post("/v1/items", json={"items": [{"id": "c", "text": "x"}]})
        assert (full.status_code, full.json()["error"]["type"]) == (503, "updates_full")
        assert "Retry-After" in full.headers
    with TestClient(create_app(place.engine("together"), CONFIG)) as http:
        before = search(http, "red star")
        place.log.rename(place.folder / "away")
        for path, body in (("/v1/items", {"items": [{"id": "c", "text": "x"}]}), ("/v1/items/delete", {"ids": ["a"]})):
            answer = http.post(path, json=body)
            assert (answer.status_code, answer.json()["error"]["type"]) == (503, "storage_unavailable")
        assert search(http, "red star") == before
        (place.folder / "away").rename(place.log)
        assert http.post("/v1/items/delete", json={"ids": ["a"]}).json()["deleted"] == 1


def test_a_compacted_index_is_taken_over_and_nothing_is_missed(place: Place) -> None:
    engine = place.engine("together")
    assert isinstance(engine, LocalEngine)
    with TestClient(create_app(engine, CONFIG)) as http:
        upsert(http, {"id": "a", "text": "red star"}, {"id": "blue star", "text": "pink moon"})
        before = http.post("/v1/search", json={"text": "red star", "k": 50}).json()
        table = fold(EmbeddingsTable.open(str(place.folder / "embeddings.lance")))
        upsert(http, {"id": "meanwhile", "text": "red star"})
        uri = str(place.folder / "index")
        manifest = build_here(table.uri, uri, IndexConfig(factory="Flat", shards=2, words="text"))
        published = publish_manifest(uri, manifest.model_copy(update={"updates": updates_in(table)}))
        upsert(http, {"id": "later", "text": "red star"})
        engine.catch_up()
        after = http.post("/v1/search", json={"text": "red star", "k": 50}).json()
        assert after["index_version"] == published.version != before["index_version"]
        assert after["updates"] == 3
        new = {"meanwhile", "later"}
        ids = [hit["id"] for hit in after["hits"]]
        assert new < set(ids)
        assert [each for each in ids if each not in new] == [hit["id"] for hit in before["hits"]]
        assert upsert(http, {"id": "more", "text": "x"})["index_version"] == published.version
        assert http.get("/v1/index").json()["rows"] == len(COLOURS) * len(SHAPES) + 4
        metrics = http.get("/metrics").text
        assert re.search(r"^rayemb_updates{.*} 3\.0$", metrics, re.M)
        assert f'index_version="{published.version}"' in metrics
        # Of what it answered as the earlier one, the counters stay.
        assert f'index_version="{before["index_version"]}"' not in metrics


def test_only_keys_that_may_write_write(place: Place, tmp_path: Path) -> None:
    keys = str(tmp_path / "keys.json")
    reader, writer = new_key(keys, "reader"), new_key(keys, "writer", write=True)
    config = CONFIG.model_copy(update={"keys": keys})
    with TestClient(create_app(place.engine("together", config), config)) as http:
        for key, status in ((reader, 403), (writer, 200)):
            headers = {"Authorization": f"Bearer {key}"}
            body = {"items": [{"id": "a", "text": "x"}]}
            assert http.post("/v1/items", json=body, headers=headers).status_code == status
            assert http.post("/v1/items/delete", json={"ids": ["b"]}, headers=headers).status_code == status
            assert http.post("/v1/items/get", json={"ids": ["a"]}, headers=headers).status_code == 200


def test_a_service_without_live_updates_has_no_such_routes() -> None:
    paths = set(openapi_document(ServeConfig(live=True))["paths"]) - set(openapi_document(ServeConfig())["paths"])
    assert paths == {"/v1/items", "/v1/items/delete", "/v1/items/get"}


def test_clients_write_and_read(place: Place) -> None:
    async def later(url: str) -> None:
        async with AsyncClient(url) as client:
            assert await client.delete(["a", "c"]) == 1
            with pytest.raises(ServeError, match="no such field"):
                await client.upsert([Item("a", text="x", payload={"nobody": 1})])

    with listening(create_app(place.engine("together"), CONFIG)) as url, Client(url) as client:
        items = [Item("a", text="red star", payload={"size": 1}), Item("b", vector=np.eye(32)[3])]
        assert client.upsert(items, model=client.index().model_digest) == 2
        assert client.get(["a", "b", "c"])["a"] == {"text": "red star", "colour": None, "size": 1}
        asyncio.run(later(url))
        assert set(client.get(["a", "b"])) == {"b"}


def test_langchain_stores_and_deletes(place: Place) -> None:
    pytest.importorskip("langchain_core")
    from rayemb.serve.client.langchain import RayembVectorStore

    with listening(create_app(place.engine("together"), CONFIG)) as url:
        store = RayembVectorStore(url)
        (name,) = store.add_texts(["a purple whale"], [{"size": 3}])
        assert store.get_by_ids([name])[0].page_content == "a purple whale"
        assert store.similarity_search("a purple whale", k=1)[0].id == name
        store.delete([name])
        assert store.get_by_ids([name]) == []


def test_every_answer_about_items_is_as_described(place: Place, tmp_path: Path) -> None:
    with listening(create_app(place.engine("together"), CONFIG)) as url:
        program = str(Path(sys.executable).with_name("schemathesis"))
        paths = "--include-path-regex=^/v1/items(/(delete|get))?$"
        config = Path(__file__).with_name("schemathesis_items.toml")
        command = [program, f"--config-file={config}", "run", *CHECKS, paths, f"{url}/openapi.json"]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "No issues found" in done.stdout, done.stdout[-6000:]
