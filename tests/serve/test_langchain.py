"""LangChain's own standard suites over a listening gateway."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("langchain_tests", reason="langchain-tests is not installed")

from langchain_core.documents import Document
from langchain_core.embeddings import Embeddings
from langchain_core.vectorstores import VectorStore
from langchain_tests.integration_tests import EmbeddingsIntegrationTests, VectorStoreIntegrationTests
from langchain_tests.unit_tests import EmbeddingsUnitTests

from rayemb.serve import ServeConfig, ServeError
from rayemb.serve.asgi import create_app
from rayemb.serve.client.langchain import RayembEmbeddings, RayembVectorStore
from rayemb.serve.local import LocalEngine
from tests.serve.conftest import World
from tests.serve.live import listening
from tests.serve.writable import Collection

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


class TestVectorStore(VectorStoreIntegrationTests):
    @pytest.fixture
    def vectorstore(self, world: World, tmp_path: Path) -> Iterator[VectorStore]:
        with listening(Collection(tmp_path, world.model, {"text": "string", "metadata": "string"}).app()) as url:
            yield RayembVectorStore(url, metadata_column="metadata")


def test_from_texts(world: World, tmp_path: Path) -> None:
    with listening(Collection(tmp_path, world.model, {"text": "string", "n": "integer"}).app()) as url:
        store = RayembVectorStore.from_texts(
            ["red star", "blue"], metadatas=[{"n": 1}, {"n": 2}], ids=["a", "b"], url=url
        )
        assert store.get_by_ids(["b", "x"]) == [Document(id="b", page_content="blue", metadata={"n": 2})]
        (found,) = store.similarity_search("red star", k=1)
        assert (found.id, found.page_content, found.metadata) == ("a", "red star", {"n": 1})
