"""A running service as LangChain's `Embeddings` and `VectorStore` (extra `langchain`)."""

import json
import uuid
from collections.abc import Iterable, Sequence
from typing import Any

from rayemb.serve.client.aio import AsyncClient
from rayemb.serve.client.calls import Filter, Item
from rayemb.serve.client.sync import Client
from rayemb.serve.errors import ServeError

try:
    from langchain_core.documents import Document
    from langchain_core.embeddings import Embeddings
    from langchain_core.vectorstores import VectorStore
except ImportError as error:
    raise ServeError(
        f"{error.name} is not installed", where="rayemb.serve.client.langchain", fix="pip install 'rayemb[langchain]'"
    ) from error


class RayembEmbeddings(Embeddings):
    """Texts as vectors of the served model.

    Args:
        url: where the service answers.
        key: its API key, if it wants one.
        timeout_s: how long one call may take, in s.

    Raises ServeError where the service does.
    """

    def __init__(self, url: str = "http://127.0.0.1:8000", *, key: str | None = None, timeout_s: float = 30.0) -> None:
        self._options: dict[str, Any] = {"url": url, "key": key, "timeout_s": timeout_s}
        self._client = Client(**self._options)
        self._most = 0

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """A vector for each text; as many requests as the service's `max_batch` makes of them."""
        self._most = self._most or self._client.index().max_batch
        return [row for part in _parts(texts, self._most) for row in self._client.embed(part).tolist()]

    def embed_query(self, text: str) -> list[float]:
        """The vector of a query."""
        return self.embed_documents([text])[0]

    async def aembed_documents(self, texts: list[str]) -> list[list[float]]:
        """A vector for each text."""
        # A client of its own: connections belong to an event loop, and LangChain's users have several.
        async with AsyncClient(**self._options) as client:
            self._most = self._most or (await client.index()).max_batch
            return [row for part in _parts(texts, self._most) for row in (await client.embed(part)).tolist()]

    async def aembed_query(self, text: str) -> list[float]:
        """The vector of a query."""
        return (await self.aembed_documents([text]))[0]


class RayembVectorStore(VectorStore):
    """The served collection as a vector store; the service embeds, with the model that the index was built with.

    Args:
        url: where the service answers.
        key: its API key, if it wants one.
        timeout_s: how long one call may take, in s.
        text_column: payload column that has a document's text.
        metadata_column: payload column that has a document's metadata as JSON; null: the metadata are the other
            payload columns.

    Filters are the service's own. Raises ServeError where the service does.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        key: str | None = None,
        timeout_s: float = 30.0,
        text_column: str = "text",
        metadata_column: str | None = None,
    ) -> None:
        options: dict[str, Any] = {"url": url, "key": key, "timeout_s": timeout_s}
        self._client, self._embeddings = Client(**options), RayembEmbeddings(**options)
        self._text, self._metadata = text_column, metadata_column

    @property
    def embeddings(self) -> Embeddings:
        """The served model."""
        return self._embeddings

    def add_texts(
        self,
        texts: Iterable[str],
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: Sequence[str | None] | None = None,
        **kwargs: Any,
    ) -> list[str]:
        """Puts texts in, under `ids` or new ones, which it gives; one whose id is there already is replaced."""
        texts = list(texts)
        metadatas = metadatas or [{} for _ in texts]
        names = [each or str(uuid.uuid4()) for each in (ids or [None] * len(texts))]
        items = [
            Item(name, text=text, payload=self._payload(text, metadata))
            for name, text, metadata in zip(names, texts, metadatas, strict=True)
        ]
        if items:
            self._client.upsert(items)
        return names

    def delete(self, ids: list[str] | None = None, **kwargs: Any) -> bool | None:
        """Takes documents out; ids that there are not are no error."""
        if ids is None:
            raise ServeError("name the documents: all of them are not deleted at once", where="ids")
        self._client.delete(ids)
        return True

    def get_by_ids(self, ids: Sequence[str], /) -> list[Document]:
        """The documents of those ids that there are."""
        found = self._client.get(ids)
        return [self._document(name, found[name]) for name in ids if name in found]

    def similarity_search(self, query: str, k: int = 4, **kwargs: Any) -> list[Document]:
        """The k closest documents; `filter`: the service's."""
        return [document for document, _ in self.similarity_search_with_score(query, k, **kwargs)]

    def similarity_search_with_score(
        self, query: str, k: int = 4, *, filter: Filter | None = None, **kwargs: Any
    ) -> list[tuple[Document, float]]:
        """The k closest documents and their cosine, -1 to 1."""
        hits = self._client.search(query, k=k, filter=filter).hits
        return [(self._document(hit.id, hit.payload), hit.score) for hit in hits]

    def similarity_search_by_vector(
        self, embedding: list[float], k: int = 4, *, filter: Filter | None = None, **kwargs: Any
    ) -> list[Document]:
        """The k documents closest to a vector of the served model."""
        model = self._client.index().model_digest
        found = self._client.search_batch([embedding], model=model, k=k, filter=filter, payload=True)
        assert found.payload is not None  # asked for
        return [self._document(name, row) for name, row in zip(found.ids[0], found.payload[0], strict=True)]

    def _select_relevance_score_fn(self) -> Any:
        return lambda cosine: (cosine + 1) / 2

    @classmethod
    def from_texts(
        cls,
        texts: list[str],
        embedding: Embeddings | None = None,
        metadatas: list[dict[str, Any]] | None = None,
        *,
        ids: list[str] | None = None,
        **kwargs: Any,
    ) -> "RayembVectorStore":
        """A store with these texts in it; `embedding` is not used, since the service has its own model."""
        store = cls(**kwargs)
        store.add_texts(texts, metadatas, ids=ids)
        return store

    def _payload(self, text: str, metadata: dict[str, Any]) -> dict[str, Any]:
        if self._metadata is None:
            return {**metadata, self._text: text}
        return {self._text: text, self._metadata: json.dumps(metadata)}

    def _document(self, name: str, payload: dict[str, Any]) -> Document:
        rest = dict(payload)
        text = str(rest.pop(self._text, None) or "")
        metadata = json.loads(rest.get(self._metadata) or "{}") if self._metadata else rest
        return Document(id=name, page_content=text, metadata=metadata)


def _parts(texts: list[str], size: int) -> list[list[str]]:
    return [texts[start : start + size] for start in range(0, len(texts), size)]
