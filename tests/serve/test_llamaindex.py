"""LlamaIndex's store over a listening gateway: its own evaluation of filters as an oracle, its index and retrievers."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("llama_index.core", reason="llama-index-core is not installed")

from llama_index.core import MockEmbedding, StorageContext, VectorStoreIndex
from llama_index.core.schema import ImageNode, NodeRelationship, RelatedNodeInfo, TextNode
from llama_index.core.vector_stores.types import (
    FilterCondition,
    FilterOperator,
    MetadataFilter,
    MetadataFilters,
    VectorStoreQuery,
    VectorStoreQueryMode,
)
from llama_index.core.vector_stores.utils import build_metadata_filter_fn

from rayemb.models import Model
from rayemb.serve import Client, ServeConfig, ServeError
from rayemb.serve.asgi import create_app
from rayemb.serve.client.llamaindex import RayembVectorStore, _filter
from rayemb.serve.local import LocalEngine
from tests.serve.conftest import World, draw, tiny_model
from tests.serve.live import listening
from tests.serve.writable import KINDS, Collection, payload_of

COLUMNS = {"text": "string", "node": "string", "ref_doc_id": "string", "colour": "string", "size": "integer"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = str(tmp_path_factory.mktemp("model"))
    tiny_model(["red star", "blue circle", "colour size"], seed=1).save(folder)
    return Model.load(folder)  # with its digest


@pytest.fixture
def collection(model: Model, tmp_path: Path) -> Collection:
    return Collection(tmp_path, model, COLUMNS)


@pytest.fixture
def store(collection: Collection) -> Iterator[RayembVectorStore]:
    with listening(collection.app()) as url:
        yield RayembVectorStore(url, node_column="node")


@pytest.fixture(scope="module")
def url(local: LocalEngine, config: ServeConfig) -> Iterator[str]:
    with listening(create_app(local, config)) as url:
        yield url


def node(name: str, text: str, document: str = "d", **metadata: Any) -> TextNode:
    source = {NodeRelationship.SOURCE: RelatedNodeInfo(node_id=document)}
    return TextNode(id_=name, text=text, metadata=metadata, relationships=source)


def where(key: str, operator: str, value: Any) -> MetadataFilter:
    return MetadataFilter(key=key, operator=FilterOperator(operator), value=value)


# -- writes --------------------------------------------------------------------------------------------------


def test_nodes_come_back_as_they_were(collection: Collection, store: RayembVectorStore, model: Model) -> None:
    nodes = [node(str(i), f"red star {i}", colour="red", size=i, more=[i, None]) for i in range(10)]
    assert store.add(nodes) == [each.node_id for each in nodes]
    assert collection.uploads == [4, 4, 2]
    assert store.get_nodes(["7", "nobody", "2"]) == [nodes[7], nodes[2]]
    large = MetadataFilters(filters=[where("size", ">=", 8)])
    assert sorted(store.get_nodes(filters=large), key=lambda each: each.node_id) == nodes[8:]
    assert store.get_nodes(["1", "8"], large) == [nodes[8]]
    found = store.query(VectorStoreQuery(query_str=nodes[3].get_content("embed"), similarity_top_k=3))
    assert found.nodes[0] == nodes[3]
    assert found.ids == [each.node_id for each in found.nodes]
    # What is embedded is what LlamaIndex would embed: the text with the metadata.
    assert found.similarities[0] == pytest.approx(1, abs=1e-5)
    vectors = model.embed_texts([each.get_content("embed") for each in nodes])
    np.testing.assert_allclose(found.similarities, np.sort(vectors @ vectors[3])[::-1][:3], atol=1e-5)
    assert store.add([]) == []


def test_nodes_go_by_document_id_or_filter(store: RayembVectorStore) -> None:
    store.add([node(str(i), f"red star {i}", "ab"[i % 2], size=i) for i in range(50)])
    with pytest.raises(ServeError, match="20 items or more pass"):
        store.get_nodes()
    store.delete("a")
    store.delete_nodes(["1", "nobody"])
    store.delete_nodes(filters=MetadataFilters(filters=[where("size", ">", 9)]))
    assert {each.node_id for each in store.get_nodes()} == {"3", "5", "7", "9"}
    store.delete_nodes(["3", "5"], MetadataFilters(filters=[where("size", ">", 4)]))
    assert {each.node_id for each in store.get_nodes()} == {"3", "7", "9"}
    assert store.query(VectorStoreQuery(query_str="a", similarity_top_k=5, doc_ids=["a"])).ids == []
    assert len(store.query(VectorStoreQuery(query_str="a", similarity_top_k=5, doc_ids=["a", "b"])).ids) == 3
    with pytest.raises(ServeError, match="say which nodes"):
        store.delete_nodes()
    store.clear()
    assert store.get_nodes() == []


def test_an_index_is_built_searched_and_emptied(store: RayembVectorStore) -> None:
    context = StorageContext.from_defaults(vector_store=store)
    nodes = [node("a", "red star", "x", colour="red"), node("b", "blue circle", "y", colour="blue")]
    # Vectors that LlamaIndex makes are of no use here, and are not sent.
    index = VectorStoreIndex(nodes, storage_context=context, embed_model=MockEmbedding(embed_dim=3))
    (found,) = index.as_retriever(similarity_top_k=1).retrieve(nodes[1].get_content("embed"))
    assert (found.node.node_id, found.node.get_content(), found.node.ref_doc_id) == ("b", "blue circle", "y")
    assert found.score == pytest.approx(1, abs=1e-5)
    red = MetadataFilters(filters=[where("colour", "==", "red")])
    assert [each.node_id for each in index.as_retriever(filters=red).retrieve("blue circle")] == ["a"]
    index.delete_ref_doc("y")
    assert [each.node_id for each in store.get_nodes()] == ["a"]


def test_vectors_of_the_named_model_are_written_and_no_others(collection: Collection, model: Model) -> None:
    vector = model.embed_texts(["red star"])[0].tolist()
    with listening(collection.app()) as url:
        store = RayembVectorStore(url, node_column="node", model=str(model.digest))
        assert store.is_embedding_query
        store.add([TextNode(id_="a", text="blue circle", embedding=vector)])
        found = store.query(VectorStoreQuery(query_embedding=vector, query_str="x", similarity_top_k=1))
        assert found.similarities == [pytest.approx(1, abs=1e-5)]
        with pytest.raises(ValueError, match="embedding not set"):
            store.add([TextNode(text="b")])
        other = RayembVectorStore(url, node_column="node", model="0" * 64)
        for ask in (
            lambda: other.add([TextNode(text="b", embedding=vector)]),
            lambda: other.query(VectorStoreQuery(query_embedding=vector)),
        ):
            with pytest.raises(ServeError) as caught:
                ask()
            assert caught.value.status == 409


def test_pictures_are_embedded_as_such(collection: Collection, model: Model, tmp_path: Path) -> None:
    red, blue = draw("red", "star", 60), draw("blue", "circle", 60)
    (tmp_path / "red.png").write_bytes(red)
    pictures = {"a": {"image_path": str(tmp_path / "red.png")}, "b": {"image": base64.b64encode(blue).decode()}}
    with listening(collection.app()) as url:
        store = RayembVectorStore(url, node_column="node", model=str(model.digest))
        pictured = RayembVectorStore(url, node_column="node")
        pictured.add([ImageNode(id_=name, text="x", **picture) for name, picture in pictures.items()])
        for name, vector in zip("ab", model.embed_images([red, blue]), strict=True):
            found = store.query(VectorStoreQuery(query_embedding=vector.tolist(), similarity_top_k=1))
            assert (found.ids, found.similarities) == ([name], [pytest.approx(1, abs=1e-5)])
        with pytest.raises(ServeError, match="not an image"):
            pictured.add([ImageNode(text="a", image="cG5n")])


def test_metadata_without_a_column_need_one_for_the_node(collection: Collection) -> None:
    with listening(collection.app()) as url:
        store = RayembVectorStore(url)
        store.add([node("a", "red star", size=5)])
        (found,) = store.get_nodes()
        assert (found.node_id, found.text, found.metadata["size"]) == ("a", "red star", 5)
        with pytest.raises(ServeError, match="no such field") as caught:
            store.add([node("b", "red star", height=5)])
        assert caught.value.field == "items.0.payload.height"


@pytest.mark.anyio
@pytest.mark.parametrize("anyio_backend", ["asyncio"])
async def test_all_of_it_without_blocking(store: RayembVectorStore) -> None:
    nodes = [node(str(i), f"red star {i}", "ab"[i % 2]) for i in range(6)]
    assert await store.async_add(nodes) == [each.node_id for each in nodes]
    query = VectorStoreQuery(query_str="red star 3", similarity_top_k=4)
    assert (await store.aquery(query)).ids == store.query(query).ids
    await store.adelete("a")
    await store.adelete_nodes(["5"])
    assert {each.node_id for each in await store.aget_nodes()} == {"1", "3"}
    await store.aclear()
    assert await store.aget_nodes() == []


# -- filters -------------------------------------------------------------------------------------------------

KIND = {"colour": KINDS["string"], "size": KINDS["integer"], "tags": KINDS["strings"]}
TEXTS = st.sampled_from(["a", "b", "c"])
SIZES = st.integers(-2, 2)


def leaves() -> st.SearchStrategy[MetadataFilter]:
    # LlamaIndex finds no missing value equal to anything, nor its own evaluation a missing one among others.
    equal = ["==", "!="]
    return st.one_of(
        st.builds(where, st.just("colour"), st.sampled_from(equal), TEXTS),
        st.builds(where, st.just("size"), st.sampled_from([*equal, ">", ">=", "<", "<="]), SIZES),
        st.builds(where, st.just("size"), st.sampled_from(["in", "nin"]), st.lists(SIZES, min_size=1, max_size=3)),
        st.builds(where, st.just("tags"), st.sampled_from(["any", "all"]), st.lists(TEXTS, min_size=1, max_size=3)),
        st.builds(where, st.just("tags"), st.just("contains"), TEXTS),
        st.builds(where, st.sampled_from(sorted(KIND)), st.just("is_empty"), st.none()),
    )


ROWS = st.lists(
    st.fixed_dictionaries(
        {
            "colour": st.none() | TEXTS,
            "size": st.none() | SIZES,
            "tags": st.none() | st.lists(TEXTS, min_size=1, max_size=3),
        }
    ),
    min_size=1,
    max_size=6,
)


@settings(max_examples=100, deadline=None)
@given(rows=ROWS, parts=st.lists(leaves(), min_size=1, max_size=3), how=st.sampled_from(FilterCondition))
def test_filters_mean_what_they_mean_to_llamaindex(
    rows: list[dict[str, Any]], parts: list[MetadataFilter], how: FilterCondition
) -> None:
    filters = MetadataFilters(filters=parts, condition=how)
    by_name = {str(i): row for i, row in enumerate(rows)}
    passes = build_metadata_filter_fn(by_name.__getitem__, filters)
    payload, expected = payload_of(by_name, KIND), [passes(name) for name in by_name]
    assert payload.mask(_filter(filters)).tolist() == expected
    # LlamaIndex's evaluation knows no nesting, so its figures for the parts are put together here.
    nested = MetadataFilters(filters=[filters, where("size", ">", 0)], condition=FilterCondition.OR)
    assert payload.mask(_filter(nested)).tolist() == [
        one or (row["size"] or 0) > 0 for one, row in zip(expected, rows, strict=True)
    ]


# -- a served collection -------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_vector", [False, True])
@pytest.mark.parametrize(
    ("filters", "keep"),
    [
        (None, lambda row: True),
        (MetadataFilters(filters=[where("shape", "==", "star")]), lambda row: row["shape"] == "star"),
        (
            MetadataFilters(filters=[where("size", ">", 40), where("colour", "nin", ["red", "blue"])]),
            lambda row: row["size"] > 40 and row["colour"] not in ("red", "blue"),
        ),
    ],
)
def test_a_served_collection_is_searched(
    url: str, world: World, filters: MetadataFilters | None, keep: Any, by_vector: bool
) -> None:
    vector = world.model.embed_texts(["red star"])[0]
    if by_vector:
        store = RayembVectorStore(url, model=str(world.model.digest))
        query = VectorStoreQuery(query_embedding=vector.tolist(), similarity_top_k=6, filters=filters)
    else:
        store, query = (
            RayembVectorStore(url),
            VectorStoreQuery(query_str="red star", similarity_top_k=6, filters=filters),
        )
    found = store.query(query)
    assert found.ids == world.expected(vector, 6, keep)
    scores = np.sort([score for row, score in zip(world.rows, world.vectors @ vector, strict=True) if keep(row)])
    np.testing.assert_allclose(found.similarities, scores[::-1][:6], atol=1e-5)
    row = next(row for row in world.rows if row["id"] == found.ids[0])
    assert (found.nodes[0].node_id, found.nodes[0].get_content()) == (row["id"], row["text"])
    assert found.nodes[0].metadata == {"colour": row["colour"], "shape": row["shape"], "size": row["size"],
                                       "round": row["round"], "area": pytest.approx(row["area"])}  # fmt: skip


def test_modes_are_those_of_the_service(url: str) -> None:
    store, client = RayembVectorStore(url), Client(url)

    def ids(mode: str, **fields: Any) -> list[str]:
        query = VectorStoreQuery(query_str="yellow circle", similarity_top_k=5, mode=VectorStoreQueryMode(mode))
        for name, value in fields.items():
            setattr(query, name, value)
        return store.query(query).ids

    def asked(**more: Any) -> list[str]:
        return [hit.id for hit in client.search("yellow circle", **{"k": 5, **more}).hits]

    plain = ids("default")
    # Of vectors alone, and with nothing of diversity, the hits are the closest.
    assert plain == asked() == ids("hybrid", alpha=1.0) == ids("mmr", mmr_threshold=1.0)
    medium = MetadataFilters(filters=[where("size", "==", 64)])
    assert ids("hybrid", alpha=0.0, filters=medium)[0] == "yellow/circle 64?"
    assert ids("hybrid") == asked(hybrid={})
    assert ids("hybrid", alpha=0.3, hybrid_top_k=7) == asked(hybrid={"fusion": "convex", "weight": 0.7}, k=7)
    assert ids("mmr", mmr_threshold=0.2) == asked(diversity=0.8) != plain
    assert ids("mmr") == asked(diversity=0.5)
    with pytest.raises(ServeError, match="no mode sparse"):
        ids("sparse")


def test_retrievers_ask_the_service(url: str, world: World) -> None:
    index = VectorStoreIndex.from_vector_store(RayembVectorStore(url), embed_model=MockEmbedding(embed_dim=3))
    found = index.as_retriever(similarity_top_k=4).retrieve("red star")
    assert [each.node_id for each in found] == world.expected(world.model.embed_texts(["red star"])[0], 4)
    mmr = index.as_retriever(
        similarity_top_k=4, vector_store_query_mode="mmr", vector_store_kwargs={"mmr_threshold": 1.0}
    )
    assert [each.node_id for each in mmr.retrieve("red star")] == [each.node_id for each in found]


def test_a_store_is_kept_without_its_key(url: str) -> None:
    store = RayembVectorStore(url, key="a secret", text_column="caption", timeout_s=5)
    assert "a secret" not in store.to_json() + repr(store)
    again = RayembVectorStore.from_json(store.to_json())
    assert again.to_dict() == store.to_dict()
    assert again.client.index() == store.client.index()


def test_what_is_wrong_is_said(url: str, world: World) -> None:
    store = RayembVectorStore(url)

    def query(**fields: Any) -> Any:
        return store.query(VectorStoreQuery(**{"query_str": "a", **fields}))

    for fields, message in (
        ({"node_ids": ["a"]}, "limited to ids"),
        ({"query_str": None}, "nothing to search for"),
        ({"query_str": None, "query_embedding": world.vectors[0].tolist()}, "digest of its model"),
        ({"filters": MetadataFilters(filters=[where("text", "text_match", "red")])}, "no operator `text_match`"),
        ({"filters": MetadataFilters(filters=[where("nosuch", "==", 1)])}, "no such field"),
        ({"filters": MetadataFilters(filters=[where("size", "in", 1)])}, "takes a list"),
        ({"filters": MetadataFilters(filters=[where("size", ">", "a")])}, "number or a moment"),
        ({"filters": MetadataFilters(filters=[MetadataFilters(filters=[])])}, "a group of filters is empty"),
        ({"similarity_top_k": 51}, "k is at most 50"),
    ):
        with pytest.raises(ServeError, match=message):
            query(**fields)


def test_a_service_that_takes_no_writes_says_so(url: str) -> None:
    store = RayembVectorStore(url)
    for write in (
        lambda: store.add([node("a", "b")]),
        lambda: store.delete_nodes(["a"]),
        lambda: store.get_nodes(["a"]),
    ):
        with pytest.raises(ServeError, match="takes no writes") as caught:
            write()
        assert caught.value.status == 404
    with pytest.raises(ServeError, match="no such field"):
        store.delete("a")
