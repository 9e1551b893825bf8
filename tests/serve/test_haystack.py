"""Haystack's own suite over a listening gateway, its own filters as an oracle, and the retrievers in its pipelines."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

os.environ.setdefault("HAYSTACK_TELEMETRY_ENABLED", "False")
pytest.importorskip("haystack", reason="haystack-ai is not installed")

from haystack import Document, Pipeline
from haystack.components.embedders import OpenAITextEmbedder
from haystack.dataclasses import ByteStream
from haystack.document_stores.errors import DuplicateDocumentError
from haystack.document_stores.types import DocumentStore, DuplicatePolicy, FilterPolicy
from haystack.errors import FilterError
from haystack.testing.document_store import DeleteAllTest, DeleteByFilterTest, DocumentStoreBaseTests
from haystack.utils import Secret
from haystack.utils.filters import document_matches_filter

from rayemb.models import Model
from rayemb.serve import ServeConfig, ServeError
from rayemb.serve.asgi import create_app
from rayemb.serve.client.haystack import RayembDocumentStore, RayembEmbeddingRetriever, RayembTextRetriever
from rayemb.serve.local import LocalEngine
from tests.serve.conftest import World, draw, tiny_model
from tests.serve.live import listening
from tests.serve.writable import KINDS, Collection, payload_of

MODULES = ["rayemb.serve.client.haystack"]
COLUMNS = {
    "text": "string",
    "metadata": "string",
    "name": "string",
    "page": "string",
    "chapter": "string",
    "category": "string",
    "status": "string",
    "number": "integer",
    "year": "integer",
    "date": "timestamp",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = str(tmp_path_factory.mktemp("model"))
    tiny_model(["A Foo Document", "first doc", "name", "red star"], seed=1).save(folder)
    return Model.load(folder)  # with its digest


@pytest.fixture
def collection(model: Model, tmp_path: Path) -> Collection:
    return Collection(tmp_path, model, COLUMNS)


@pytest.fixture
def document_store(collection: Collection) -> Iterator[RayembDocumentStore]:
    with listening(collection.app()) as url:
        yield RayembDocumentStore(url, metadata_column="metadata")


@pytest.fixture(scope="module")
def url(local: LocalEngine, config: ServeConfig) -> Iterator[str]:
    with listening(create_app(local, config)) as url:
        yield url


class TestDocumentStore(DocumentStoreBaseTests, DeleteAllTest, DeleteByFilterTest):
    @pytest.fixture
    def document_store(self, collection: Collection) -> Iterator[DocumentStore]:
        with listening(collection.app()) as url:
            yield RayembDocumentStore(url, metadata_column="metadata")

    @staticmethod
    def assert_documents_are_equal(received: list[Document], expected: list[Document]) -> None:
        """The service embeds by itself and gives no vectors; a listing has no order."""

        def told(documents: list[Document]) -> list[tuple[Any, ...]]:
            return sorted((each.id, each.content, sorted(each.meta.items())) for each in documents)

        assert told(received) == told(expected)

    def test_write_documents(self, document_store: DocumentStore) -> None:
        document = Document(content="first doc")
        assert document_store.write_documents([document]) == 1
        with pytest.raises(DuplicateDocumentError, match=document.id):
            document_store.write_documents([document])


def test_requests_have_as_many_documents_as_the_service_takes(
    collection: Collection, document_store: RayembDocumentStore
) -> None:
    documents = [Document(id=str(i), content=f"first doc {i}", meta={"number": i, "more": [i]}) for i in range(10)]
    assert document_store.write_documents([*documents, documents[3]], DuplicatePolicy.SKIP) == 10
    assert collection.uploads == [4, 4, 2]
    changed = Document(id="3", content="name")
    assert document_store.write_documents([documents[3], changed], DuplicatePolicy.OVERWRITE) == 2
    condition = {"field": "content", "operator": "==", "value": "name"}
    (found,) = document_store.filter_documents(condition)
    assert (found.id, found.meta) == ("3", {})
    with pytest.raises(DuplicateDocumentError, match="'x'"):
        document_store.write_documents([Document(id="x", content="a")] * 2)
    (found,) = document_store.filter_documents({"field": "meta.number", "operator": "==", "value": 7})
    assert found == documents[7]
    assert document_store.write_documents([]) == 0
    document_store.delete_documents([])
    assert document_store.count_documents() == 10


def test_more_than_a_search_gives_is_said_and_deleted_all_the_same(document_store: RayembDocumentStore) -> None:
    document_store.write_documents([Document(id=str(i), content="a", meta={"number": i % 2}) for i in range(50)])
    with pytest.raises(ServeError, match="20 items or more pass"):
        document_store.filter_documents()
    odd = {"field": "meta.number", "operator": "==", "value": 1}
    with pytest.raises(FilterError, match="delete_all_documents"):
        document_store.delete_by_filter({})
    assert document_store.delete_by_filter(odd) == 25
    assert document_store.filter_documents(odd) == []
    assert document_store.count_documents() == 25
    document_store.delete_all_documents()
    assert document_store.count_documents() == 0


def test_embeddings_of_the_named_model_are_written_and_no_others(model: Model, collection: Collection) -> None:
    vector = model.embed_texts(["red star"])[0].tolist()
    with listening(collection.app()) as url:
        store = RayembDocumentStore(url, metadata_column="metadata", model=str(model.digest))
        store.write_documents([Document(id="a", content="name", embedding=vector)])
        (found,) = store.search_by_embedding(vector)
        assert (found.id, found.content) == ("a", "name")
        assert found.score == pytest.approx(1, abs=1e-5)
        with pytest.raises(ServeError, match="document b: it has no embedding"):
            store.write_documents([Document(id="b", content="name")])
        other = RayembDocumentStore(url, metadata_column="metadata", model="0" * 64)
        for ask in (
            lambda: other.write_documents([Document(id="c", embedding=vector)]),
            lambda: other.search_by_embedding(vector),
        ):
            with pytest.raises(ServeError) as caught:
                ask()
            assert caught.value.status == 409


def test_pictures_are_embedded_where_there_is_no_text(collection: Collection, model: Model) -> None:
    pictures = {"a": draw("red", "star", 60), "b": draw("blue", "circle", 60)}
    with listening(collection.app()) as url:
        store = RayembDocumentStore(url, metadata_column="metadata")
        store.write_documents([Document(id=name, blob=ByteStream(data)) for name, data in pictures.items()])
        searched = RayembDocumentStore(url, metadata_column="metadata", model=str(model.digest))
        for name, vector in zip(pictures, model.embed_images(list(pictures.values())), strict=True):
            (found,) = searched.search_by_embedding(vector.tolist(), top_k=1)
            assert (found.id, found.score) == (name, pytest.approx(1, abs=1e-5))
        with pytest.raises(ServeError, match="not an image"):
            store.write_documents([Document(blob=ByteStream(b"png"))])


def test_metadata_without_a_column_need_one_for_all(collection: Collection) -> None:
    with listening(collection.app()) as url:
        store = RayembDocumentStore(url)
        store.write_documents([Document(id="a", content="b", meta={"number": 5})])
        (found,) = store.filter_documents()
        assert {name: value for name, value in found.meta.items() if value is not None} == {"number": 5}
        with pytest.raises(ServeError, match="no such field") as caught:
            store.write_documents([Document(content="b", meta={"height": 5})])
        assert caught.value.field == "items.0.payload.height"


# -- filters -------------------------------------------------------------------------------------------------

MOMENTS = ("1969-07-21T20:17:40", "1972-12-11T19:54:58", "1989-11-09")
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "number": st.integers(-2, 2),
    "name": st.sampled_from(["a", "b", "c"]),
    "date": st.sampled_from(MOMENTS),
}


def comparisons() -> st.SearchStrategy[dict[str, Any]]:
    def of(column: str) -> st.SearchStrategy[dict[str, Any]]:
        value = st.none() | VALUES[column]
        equal = st.tuples(st.sampled_from(["==", "!="]), value)
        several = st.tuples(st.sampled_from(["in", "not in"]), st.lists(value, max_size=3))
        bounds = st.tuples(st.sampled_from([">", ">=", "<", "<="]), value)
        return (equal | several if column == "name" else equal | several | bounds).map(
            lambda pair: {"field": f"meta.{column}", "operator": pair[0], "value": pair[1]}
        )

    return st.sampled_from(sorted(VALUES)).flatmap(of)


FILTERS = st.recursive(
    comparisons(),
    lambda inner: st.fixed_dictionaries(
        {"operator": st.sampled_from(["AND", "OR", "NOT"]), "conditions": st.lists(inner, min_size=1, max_size=3)}
    ),
    max_leaves=5,
)
ROWS = st.lists(
    st.fixed_dictionaries({name: st.none() | value for name, value in VALUES.items()}), min_size=1, max_size=6
)


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, filters=FILTERS)
def test_filters_mean_what_they_mean_to_haystack(rows: list[dict[str, Any]], filters: dict[str, Any]) -> None:
    columns = {name: KINDS[COLUMNS[name]] for name in VALUES}
    payload = payload_of({str(i): row for i, row in enumerate(rows)}, columns)
    found = payload.mask(RayembDocumentStore()._filter(filters))
    assert found.tolist() == [document_matches_filter(filters, Document(meta=row)) for row in rows]


# -- a served collection -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("filters", "keep"),
    [
        (None, lambda row: True),
        ({"field": "meta.round", "operator": "==", "value": False}, lambda row: not row["round"]),
        (
            {
                "operator": "AND",
                "conditions": [
                    {"field": "meta.size", "operator": ">", "value": 40},
                    {"field": "meta.colour", "operator": "not in", "value": ["red", "blue"]},
                ],
            },
            lambda row: row["size"] > 40 and row["colour"] not in ("red", "blue"),
        ),
    ],
)
def test_a_served_collection_is_searched(url: str, world: World, filters: dict[str, Any] | None, keep: Any) -> None:
    store = RayembDocumentStore(url)
    assert store.count_documents() == 60
    vector = world.model.embed_texts(["red star"])[0]
    found = RayembTextRetriever(store, top_k=6).run("red star", filters)["documents"]
    assert [each.id for each in found] == world.expected(vector, 6, keep)
    row = next(row for row in world.rows if row["id"] == found[0].id)
    assert found[0].content == row["text"]
    assert found[0].meta == {"colour": row["colour"], "shape": row["shape"], "size": row["size"],
                             "round": row["round"], "area": pytest.approx(row["area"])}  # fmt: skip
    by_vector = RayembEmbeddingRetriever(store, filters).run(vector.tolist(), top_k=6)["documents"]
    assert [each.id for each in by_vector] == [each.id for each in found]
    scores = np.sort([score for row, score in zip(world.rows, world.vectors @ vector, strict=True) if keep(row)])
    np.testing.assert_allclose([each.score for each in by_vector], scores[::-1][:6], atol=1e-5)


def test_filters_of_a_run_replace_or_add(url: str, world: World) -> None:
    star = {"field": "meta.shape", "operator": "==", "value": "star"}
    large = {"field": "meta.size", "operator": "==", "value": 88}
    vector = world.model.embed_texts(["red"])[0]
    for policy, keep in (
        (FilterPolicy.REPLACE, lambda row: row["size"] == 88),
        (FilterPolicy.MERGE, lambda row: row["size"] == 88 and row["shape"] == "star"),
    ):
        retriever = RayembTextRetriever(RayembDocumentStore(url), star, 20, policy)
        found = retriever.run("red", large)["documents"]
        assert [each.id for each in found] == world.expected(vector, 20, keep)


def test_pipelines_are_kept_and_run(url: str, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYEMB_KEY", "a key")
    store = RayembDocumentStore(url, key=Secret.from_env_var("RAYEMB_KEY"))
    pipeline = Pipeline()
    embedder = OpenAITextEmbedder(Secret.from_token("none"), model="rayemb", api_base_url=f"{url}/v1")
    pipeline.add_component("embedder", embedder)
    pipeline.add_component("retriever", RayembEmbeddingRetriever(store, top_k=3))
    pipeline.connect("embedder.embedding", "retriever.query_embedding")
    found = pipeline.run({"embedder": {"text": "red star"}})["retriever"]["documents"]
    expected = world.expected(world.model.embed_texts(["red star"])[0], 3)
    assert [each.id for each in found] == expected
    plain = Pipeline()
    star = {"field": "meta.shape", "operator": "==", "value": "star"}
    plain.add_component("retriever", RayembTextRetriever(store, star, 3, FilterPolicy.MERGE, hybrid={}))
    assert "a key" not in plain.dumps()
    again = Pipeline.loads(plain.dumps(), allowed_modules=MODULES)
    assert again.to_dict() == plain.to_dict()
    asked = {"retriever": {"query": "red star"}}
    assert again.run(asked) == plain.run(asked)
    with pytest.raises(ValueError, match="token"):
        RayembDocumentStore(key=Secret.from_token("a key")).to_dict()


def test_words_count_where_they_are_asked_for(url: str) -> None:
    store = RayembDocumentStore(url)
    medium = {"field": "meta.size", "operator": "==", "value": 64}
    words = RayembTextRetriever(store, medium, top_k=4, hybrid={"fusion": "convex", "weight": 1.0})
    assert words.run("yellow circle")["documents"][0].id == "yellow/circle 64?"


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_all_of_it_without_blocking(document_store: RayembDocumentStore) -> None:
    documents = [Document(id=str(i), content=f"first doc {i}") for i in range(3)]
    assert await document_store.write_documents_async(documents) == 3
    assert await document_store.count_documents_async() == 3
    await document_store.delete_documents_async(["1"])
    assert {each.id for each in await document_store.filter_documents_async()} == {"0", "2"}
    asked = (await RayembTextRetriever(document_store).run_async("first doc 2"))["documents"]
    vector = document_store._client.embed(["first doc 2"])[0].tolist()
    assert (await RayembEmbeddingRetriever(document_store).run_async(vector))["documents"] == asked
    assert asked[0].id == "2"


def test_what_is_wrong_is_said(url: str) -> None:
    store = RayembDocumentStore(url)
    with pytest.raises(FilterError, match="no such field"):
        store.search_by_text("a", {"field": "meta.nosuch", "operator": "==", "value": 1})
    with pytest.raises(FilterError, match="no operator `like`"):
        store.search_by_text("a", {"field": "meta.text", "operator": "like", "value": "b"})
    with pytest.raises(FilterError, match="AND, OR, NOT"):
        store.filter_documents({"operator": "XOR", "conditions": [{}]})
    with pytest.raises(ServeError, match="k is at most 50"):
        store.search_by_text("a", {"field": "meta.size", "operator": "==", "value": 40}, top_k=51)
    with pytest.raises(ServeError, match="no answer"):
        RayembDocumentStore("http://127.0.0.1:1", timeout_s=1).filter_documents({"field": "id", "operator": "==",
                                                                                 "value": "a"})  # fmt: skip


def test_a_service_that_takes_no_writes_says_so(url: str) -> None:
    store = RayembDocumentStore(url)
    for write in (
        lambda: store.write_documents([Document(content="a")]),
        lambda: store.write_documents([Document(content="a")], DuplicatePolicy.OVERWRITE),
        lambda: store.delete_documents(["a"]),
        lambda: store.delete_by_filter({"field": "meta.shape", "operator": "==", "value": "star"}),
    ):
        with pytest.raises(ServeError, match="takes no writes") as caught:
            write()
        assert caught.value.status == 404
