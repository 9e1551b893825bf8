"""LangChain's own standard suites over a listening gateway.

The service takes no writes yet. What the vector store needs of them is spelled out by `Writable`: the real gateway
over an exact engine in memory, with the three routes that the client calls. When the service has those routes, this
class goes and the suite runs against the service.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from fastapi import FastAPI, Request

pytest.importorskip("langchain_tests", reason="langchain-tests is not installed")

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore
from langchain_tests.integration_tests import EmbeddingsIntegrationTests, VectorStoreIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests

from rayemb.models import Model
from rayemb.serve import ServeConfig, ServeError
from rayemb.serve.asgi import create_app
from rayemb.serve.client.langchain import RayembEmbeddings, RayembVectorStore
from rayemb.serve.engine import Description, Found, FoundIds, Vectors
from rayemb.serve.local import LocalEngine
from tests.serve.conftest import World
from tests.serve.live import listening

# The suites' asynchronous tests, by anyio's plugin.
pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
def url(local: LocalEngine, config: ServeConfig) -> Iterator[str]:
    with listening(create_app(local, config)) as url:
        yield url


class TestEmbeddingsUnit(EmbeddingsUnitTests):
    @property
    def embeddings_class(self) -> type[Embeddings]:
        return RayembEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"url": "http://127.0.0.1:1"}


class TestEmbeddings(EmbeddingsIntegrationTests):
    @pytest.fixture(autouse=True)
    def _service(self, url: str) -> None:
        self.url = url

    @property
    def embeddings_class(self) -> type[Embeddings]:
        return RayembEmbeddings

    @property
    def embedding_model_params(self) -> dict[str, Any]:
        return {"url": self.url}


async def test_vectors_are_the_models_in_as_many_requests_as_it_takes(url: str, world: World) -> None:
    texts = [row["text"] for row in world.rows[:21]]  # three requests of 8 texts at most
    expected = world.model.embed_texts(texts)
    model = RayembEmbeddings(url)
    np.testing.assert_allclose(model.embed_documents(texts), expected, atol=1e-6)
    np.testing.assert_allclose(await model.aembed_documents(texts), expected, atol=1e-6)
    np.testing.assert_allclose(await model.aembed_query(texts[3]), expected[3], atol=1e-6)
    assert model.embed_documents([]) == []


def test_a_served_collection_is_searched(url: str, world: World) -> None:
    store = RayembVectorStore(url)
    vector = world.model.embed_texts(["red star"])[0]
    found = store.similarity_search("red star", k=6, filter={"round": False})
    assert [document.id for document in found] == world.expected(vector, 6, lambda row: not row["round"])
    row = next(row for row in world.rows if row["id"] == found[0].id)
    assert found[0].page_content == row["text"]
    assert found[0].metadata == {"colour": row["colour"], "shape": row["shape"], "size": row["size"], "round": False,
                                 "area": pytest.approx(row["area"])}  # fmt: skip
    scored = store.similarity_search_with_score("red star", k=3)
    np.testing.assert_allclose([score for _, score in scored], np.sort(world.vectors @ vector)[::-1][:3], atol=1e-5)
    by_vector = store.similarity_search_by_vector(vector.tolist(), k=6, filter={"round": False})
    assert by_vector == found
    relevance = store.similarity_search_with_relevance_scores("red star", k=3)
    assert all(0 <= score <= 1 for _, score in relevance)


def test_writes_to_a_service_that_takes_none_are_an_error(url: str) -> None:
    store = RayembVectorStore(url)
    for write in (
        lambda: store.add_texts(["a"]),
        lambda: store.delete(["a"]),
        lambda: store.get_by_ids(["a"]),
    ):
        with pytest.raises(ServeError) as caught:
            write()
        assert caught.value.status == 404
    with pytest.raises(ServeError, match="name the documents"):
        store.delete()


class Writable:
    """An exact index in memory over a real model, and what the service is to make of writes."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._items: dict[str, tuple[Vectors, dict[str, Any]]] = {}

    def app(self) -> FastAPI:
        app = create_app(self, ServeConfig())
        app.add_api_route("/v1/items", self.upsert, methods=["POST"])
        app.add_api_route("/v1/items/delete", self.delete, methods=["POST"])
        app.add_api_route("/v1/items/get", self.get, methods=["POST"])
        return app

    async def upsert(self, request: Request) -> dict[str, Any]:
        items = (await request.json())["items"]
        vectors = self._model.embed_texts([item["text"] for item in items])
        for item, vector in zip(items, vectors, strict=True):
            self._items[item["id"]] = vector, item["payload"]
        return {"upserted": len(items)}

    async def delete(self, request: Request) -> dict[str, Any]:
        ids = (await request.json())["ids"]
        return {"deleted": sum(self._items.pop(name, None) is not None for name in ids)}

    async def get(self, request: Request) -> dict[str, Any]:
        ids = (await request.json())["ids"]
        return {"items": [{"id": name, "payload": self._items[name][1]} for name in ids if name in self._items]}

    def describe(self) -> Description:
        digest, dim = str(self._model.digest), self._model.dim
        columns = ["text", "metadata"]
        return Description("v", digest, 0, dim, "inner_product", "Flat", {}, {}, [], None, [], columns, {}, False)

    async def embed_texts(self, texts: Sequence[str]) -> tuple[Vectors, int]:
        return self._model.embed_texts(list(texts)), 0

    async def embed_images(self, images: Sequence[bytes]) -> Vectors:
        raise NotImplementedError

    async def search(self, vectors: Vectors, k: int, filter: Mapping[str, Any] | None = None, **width: Any) -> Found:
        names = list(self._items)
        rows = {key: {"id": name, **self._items[name][1]} for key, name in enumerate(names)}
        x_ND = np.stack([self._items[name][0] for name in names]) if names else np.zeros((0, vectors.shape[1]))
        scores = (vectors @ x_ND.T).astype(np.float32)
        keys = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return Found(np.take_along_axis(scores, keys, 1), keys, rows)

    async def search_ids(
        self, vectors: Vectors, k: int, filter: Mapping[str, Any] | None = None, **width: Any
    ) -> FoundIds:
        found = await self.search(vectors, k, filter)
        return FoundIds(found.scores, pa.array([found.rows[key]["id"] for key in found.keys.reshape(-1).tolist()]))

    async def image(self, item: str) -> bytes | None:
        return None

    async def missing(self) -> list[str]:
        return []


class TestVectorStore(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, world: World) -> Iterator[VectorStore]:
        with listening(Writable(world.model).app()) as url:
            yield RayembVectorStore(url, metadata_column="metadata")


def test_from_texts(world: World) -> None:
    with listening(Writable(world.model).app()) as url:
        store = RayembVectorStore.from_texts(
            ["red star", "blue"], metadatas=[{"n": 1}, {"n": 2}], ids=["a", "b"], url=url
        )
        assert store.get_by_ids(["b", "x"]) == [Document(id="b", page_content="blue", metadata={"n": 2})]
        (found,) = store.similarity_search("red star", k=1)
        assert (found.id, found.page_content, found.metadata) == ("a", "red star", {"n": 1})
