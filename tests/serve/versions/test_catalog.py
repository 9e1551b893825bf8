"""The document: what it may say, how it is changed by several at once, what promotion refuses."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from rayemb.errors import RayembError
from rayemb.index import load_manifest
from rayemb.models import Model
from rayemb.serve.config import ServeConfig
from rayemb.serve.errors import ServeError
from rayemb.serve.versions import (
    Canary,
    Catalog,
    CatalogError,
    CatalogStore,
    Collection,
    ConflictError,
    Version,
    changes,
)
from rayemb.serve.versions.catalog import GateConfig
from rayemb.serve.versions.gate import read_labels
from rayemb.serve.versions.opening import Opener, new_version
from rayemb.serve.versions.query_map import QueryMap
from tests.serve.versions.conftest import TEXTS, Versioned, build_version

VERSION = Version(model="m", model_digest="d", index="i", index_version="v", dim=2, rows=1, added="")


def live(store: CatalogStore, collection: str = "default") -> str | None:
    return store.read().collections[collection].live


def test_a_document_that_contradicts_itself_is_none() -> None:
    with pytest.raises(ValidationError, match="live names version 'a'"):
        Collection(live="a")
    with pytest.raises(ValidationError, match="stand beside a live version"):
        Collection(versions={"a": VERSION}, shadow=Canary(version="a", percent=1))
    with pytest.raises(ValidationError):
        Catalog.model_validate({"format": 2})
    with pytest.raises(ValidationError):
        Canary(version="a", percent=101)


@pytest.mark.parametrize("text", ["", "{", '{"format": 1, "collection": {}}', '{"collections": {"../x": {}}}'])
def test_what_is_no_catalog_is_said_and_never_overwritten(store: CatalogStore, text: str) -> None:
    Path(store.uri).write_text(text)
    with pytest.raises(CatalogError, match="no catalog"):
        store.read()
    with pytest.raises(CatalogError, match="no catalog"):
        store.update(lambda catalog: catalog)
    assert Path(store.uri).read_text() == text


def _many(uri: str, number: int) -> None:
    def change(catalog: Catalog) -> Catalog:
        return catalog.with_collection(f"c{number}-{len(catalog.collections)}", Collection())

    for _ in range(10):
        CatalogStore(uri).update(change)


def test_concurrent_writers_lose_nothing(store: CatalogStore) -> None:
    # Threads: each opens the lock for itself, as processes do.
    with ThreadPoolExecutor(3) as pool:
        for each in [pool.submit(_many, store.uri, number) for number in range(3)]:
            each.result()
    catalog = store.read()
    assert catalog.revision == 30
    # Each saw all changes before its own: the names count them.
    assert sorted(int(name.split("-")[1]) for name in catalog.collections) == list(range(30))


def test_a_change_in_view_of_an_older_revision_is_refused(store: CatalogStore) -> None:
    first = store.update(lambda catalog: catalog.with_collection("x", Collection()))
    store.update(lambda catalog: catalog.with_collection("y", Collection()))
    with pytest.raises(ConflictError, match="at revision 2, and the change was for 1"):
        store.update(lambda catalog: Catalog(), revision=first.revision)
    assert set(store.read().collections) == {"x", "y"}


def test_promote_roll_back_and_remove(store: CatalogStore, versioned: Versioned) -> None:
    versioned.fill(store, "default", "a", "b", "c")
    for name in "abc":
        changes.promote(store, "default", name)
    with pytest.raises(CatalogError, match="'c' is in use: live"):
        changes.remove(store, "default", "c")
    changes.rollback(store, "default")
    assert live(store) == "b"
    changes.rollback(store, "default")
    assert live(store) == "a"
    with pytest.raises(CatalogError, match="no version of 'default' was live before 'a'"):
        changes.rollback(store, "default")
    changes.remove(store, "default", "c")
    found = store.read().collections["default"]
    assert set(found.versions) == {"a", "b"}
    assert [(event.action, event.version) for event in found.history[3:]] == [
        ("promote", "a"),
        ("promote", "b"),
        ("promote", "c"),
        ("rollback", "b"),
        ("rollback", "a"),
        ("remove", "c"),
    ]
    with pytest.raises(CatalogError, match=r"no version 'c'.*there are: a, b"):
        changes.promote(store, "default", "c")
    with pytest.raises(CatalogError, match=r"no collection 'nobody'.*there are: default"):
        changes.promote(store, "nobody", "a")


def test_promotion_ends_the_canary_that_it_was(store: CatalogStore, versioned: Versioned) -> None:
    versioned.fill(store)
    changes.promote(store, "default", "a")
    with pytest.raises(CatalogError, match="'a' is the live one"):
        changes.set_canary(store, "default", "a", 5)
    changes.set_canary(store, "default", "b", 5)
    changes.set_shadow(store, "default", "b", 50)
    changes.promote(store, "default", "b")
    assert store.read().collections["default"].roles == {"live": "b"}


def test_a_model_and_an_index_of_another_are_no_version(store: CatalogStore, versioned: Versioned) -> None:
    with pytest.raises(RayembError, match="their vectors do not compare"):
        changes.add(store, "default", versioned.models["a"], versioned.indexes["b"])
    assert not Path(store.uri).exists()
    name = changes.add(store, "default", versioned.models["a"], versioned.indexes["a"])
    assert name == load_manifest(versioned.indexes["a"]).version
    with pytest.raises(CatalogError, match="already"):
        changes.add(store, "default", versioned.models["a"], versioned.indexes["a"])
    with pytest.raises(CatalogError, match="cannot be the name"):
        changes.add(store, "a/b", versioned.models["a"], versioned.indexes["a"])


def test_a_damaged_version_is_never_promoted(store: CatalogStore, versioned: Versioned, tmp_path: Path) -> None:
    index = Path(build_version(tmp_path, "d", versioned.models["a"]))
    changes.add(store, "default", versioned.models["a"], str(index), name="d")
    shard = index / load_manifest(str(index)).shards[1].file
    data = bytearray(shard.read_bytes())
    data[-9] ^= 1
    shard.write_bytes(bytes(data))
    with pytest.raises(RayembError, match="the checksum differs"):
        changes.promote(store, "default", "d", force=True)
    assert live(store) is None
    index.joinpath("manifest.json").unlink()
    with pytest.raises(RayembError, match="no index here"):
        changes.promote(store, "default", "d", force=True)


def test_an_index_that_was_built_anew_in_its_place_is_another(
    store: CatalogStore, versioned: Versioned, tmp_path: Path
) -> None:
    index = build_version(tmp_path, "d", versioned.models["a"])
    changes.add(store, "default", versioned.models["a"], index, name="d")
    build_version(tmp_path, "d", versioned.models["a"], rows=30)
    with pytest.raises(ServeError, match="the version was added with"):
        changes.promote(store, "default", "d")


def test_the_gate_asks_for_recall_and_says_when_it_was_overruled(store: CatalogStore, versioned: Versioned) -> None:
    versioned.fill(store, "default", "a")
    recall = load_manifest(versioned.indexes["a"]).recall
    assert recall is not None
    with pytest.raises(CatalogError, match=r"recall@5 is 1\.000, below 1\.1"):
        changes.promote(store, "default", "a", GateConfig.model_construct(min_recall=1.1, k=10, margin=0.02))
    gate = GateConfig.model_construct(min_recall=1.1, k=10, margin=0.02)
    changes.promote(store, "default", "a", gate, force=True)
    event = store.read().collections["default"].history[-1]
    assert event.forced == "the index's recall@5 is 1.000, below 1.1"
    assert event.figures == {"recall@5": 1.0}


def test_the_gate_compares_labelled_queries(store: CatalogStore, versioned: Versioned, tmp_path: Path) -> None:
    labels = tmp_path / "labels.jsonl"
    model = Model.load(versioned.models["a"])
    texts = [f"{text} {i}" for i, text in enumerate(TEXTS)]
    # What version a finds first, by its own model: right for it, never for b, whose ids are others.
    table = model.embed_texts([f"{TEXTS[i % len(TEXTS)]} {i}" for i in range(60)])
    best = (model.embed_texts(texts, kind="text") @ table.T).argmax(axis=1)
    lines = [json.dumps({"text": text, "relevant": [f"a-{i}"]}) for text, i in zip(texts, best, strict=True)]
    labels.write_text("\n".join(lines))
    versioned.fill(store, "default", "a")
    changes.add(store, "default", versioned.models["b"], versioned.indexes["b"], name="b", labels=str(labels))
    changes.promote(store, "default", "a")
    with pytest.raises(CatalogError, match="over the margin"):
        changes.promote(store, "default", "b", GateConfig(k=1))
    assert live(store) == "a"
    changes.promote(store, "default", "b", GateConfig(k=1), force=True)
    figures = store.read().collections["default"].history[-1].figures
    assert figures["labelled@1"] == 0.0
    assert figures["live labelled@1"] == 1.0
    assert figures["labelled queries"] == len(TEXTS)
    assert figures["difference low"] == figures["difference high"] == -1.0
    labels.write_text('{"text": "x"}')
    with pytest.raises(ServeError, match=r"labels\.jsonl:1"):
        read_labels(str(labels))


def rotation(dim: int) -> np.ndarray:
    q, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(dim, dim)))
    return q.astype(np.float32)


def test_a_query_map_is_of_two_models_and_no_others(store: CatalogStore, versioned: Versioned, tmp_path: Path) -> None:
    a, b = Model.load(versioned.models["a"]), Model.load(versioned.models["b"])
    weight, uri = rotation(a.dim), str(tmp_path / "map.safetensors")
    ref = QueryMap(weight, np.zeros(a.dim, np.float32), str(b.digest), str(a.digest)).save(uri)
    changes.add(store, "default", versioned.models["b"], versioned.indexes["a"], name="mapped", query_map=uri)
    engine = Opener(ServeConfig()).open(store.read().collections["default"].versions["mapped"])
    x = b.embed_texts(["red star"])
    hits = engine.index.search((x @ weight.T) / np.linalg.norm(x @ weight.T), 5)
    found = asyncio.run(engine.search(x, 5))
    assert found.keys.tolist() == hits.keys.tolist()
    np.testing.assert_allclose(found.scores, hits.scores, atol=1e-6)
    vectors, _ = asyncio.run(engine.embed_texts(["red star"]))
    assert engine.describe().model_digest == b.digest, "clients get and send vectors of the model"
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    engine.close()
    with pytest.raises(ServeError, match="the query map is from model"):
        new_version(versioned.models["a"], versioned.indexes["b"], query_map=uri)
    Path(uri).write_bytes(Path(uri).read_bytes()[:-1] + b"x")
    with pytest.raises(ServeError, match="the checksum differs"):
        QueryMap.load(ref)
    QueryMap(weight[:, 1:], np.zeros(a.dim, np.float32), str(b.digest), str(a.digest)).save(uri)
    with pytest.raises(ServeError, match="takes 31 dimensions"):
        new_version(versioned.models["b"], versioned.indexes["a"], query_map=uri)
