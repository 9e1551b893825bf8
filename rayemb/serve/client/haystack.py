"""A running service as Haystack's document store, and its retrievers (extra `haystack`).

A pipeline with them is loaded by `Pipeline.loads(text, allowed_modules=["rayemb.serve.client.haystack"])`.
"""

import asyncio
import contextlib
import json
from collections.abc import Iterator, Mapping
from typing import Any

from rayemb.serve.client.calls import Item
from rayemb.serve.client.stores import Filter, condition, joined, passing, put, remove, remove_passing, take
from rayemb.serve.client.sync import Client
from rayemb.serve.errors import ServeError

try:
    from haystack import Document, component, default_from_dict, default_to_dict
    from haystack.document_stores.errors import DuplicateDocumentError
    from haystack.document_stores.types import DuplicatePolicy, FilterPolicy, apply_filter_policy
    from haystack.errors import FilterError
    from haystack.utils import Secret
except ImportError as error:
    raise ServeError(
        f"{error.name} is not installed", where="rayemb.serve.client.haystack", fix="pip install 'rayemb[haystack]'"
    ) from error

_LOGIC = ("AND", "OR", "NOT")


class RayembDocumentStore:
    """The served collection as a document store; the service embeds documents with the collection's model.

    Metadata go to the payload columns of the same names, by which can be filtered; `metadata_column` keeps the rest.
    Documents come back without embeddings and blobs.

    Args:
        url: where the service answers.
        key: its API key, if it wants one.
        timeout_s: how long one call may take, in s.
        text_column: payload column that has a document's content.
        metadata_column: payload column that has all metadata as JSON; null: they are the other payload columns.
        model: digest of the model of documents' and queries' embeddings, refused by a service that has another model.
            Null: the service embeds documents by their content, or else the picture in their blob; queries'
            embeddings are taken to be of its model, as those by its OpenAI-compatible route are.

    Raises ServeError where the service does, FilterError for a filter that it does not take.
    """

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        key: Secret | None = None,
        timeout_s: float = 30.0,
        text_column: str = "text",
        metadata_column: str | None = None,
        model: str | None = None,
    ) -> None:
        self.url, self.key, self.timeout_s, self.model = url, key, timeout_s, model
        self.text_column, self.metadata_column = text_column, metadata_column
        self._client = Client(url, timeout_s, key=key.resolve_value() if key else None)

    def to_dict(self) -> dict[str, Any]:
        """The store as a dictionary, without what it stores; a key that is no environment variable is refused."""
        return default_to_dict(
            self,
            url=self.url,
            key=self.key,
            timeout_s=self.timeout_s,
            text_column=self.text_column,
            metadata_column=self.metadata_column,
            model=self.model,
        )

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "RayembDocumentStore":
        """The store that `to_dict` made a dictionary of."""
        return default_from_dict(cls, data)

    def count_documents(self) -> int:
        """The items of the collection."""
        return self._client.index().rows

    def filter_documents(self, filters: dict[str, Any] | None = None) -> list[Document]:
        """All documents that pass, in no order: fewer than the service's `max_k`, or it is an error."""
        with _told():
            found = passing(self._client, self._filter(filters))
        return [self._document(name, payload) for name, payload in found.items()]

    def write_documents(self, documents: list[Document], policy: DuplicatePolicy = DuplicatePolicy.NONE) -> int:
        """Puts documents in; the number of those that were written.

        Without a policy, an id that is there already is refused, as with FAIL. FAIL and SKIP look before they write:
        what another client writes in between is overwritten.
        """
        if not isinstance(documents, list) or not all(isinstance(each, Document) for each in documents):
            raise ValueError("expected a list of Documents")
        if policy == DuplicatePolicy.OVERWRITE:
            chosen = {each.id: each for each in documents}
            count = len(documents)
        else:
            there: set[str] = set(take(self._client, [each.id for each in documents]))
            chosen = {}
            for each in documents:
                if each.id not in there:
                    chosen[each.id] = each
                elif policy != DuplicatePolicy.SKIP:
                    raise DuplicateDocumentError(f"there is a document with the id {each.id!r}")
                there.add(each.id)
            count = len(chosen)
        columns = self._client.index().payload_types if chosen else {}
        put(self._client, [self._item(each, columns) for each in chosen.values()], self.model)
        return count

    def delete_documents(self, document_ids: list[str]) -> None:
        """Takes documents out; ids that there are not are no error."""
        remove(self._client, document_ids)

    def delete_by_filter(self, filters: dict[str, Any]) -> int:
        """Takes all documents out that pass; their number."""
        if not filters:
            raise FilterError("an empty filter lets all pass: delete_all_documents() takes all of them out")
        with _told():
            return remove_passing(self._client, self._filter(filters))

    def delete_all_documents(self) -> None:
        """Takes all items out of the collection."""
        remove_passing(self._client, None)

    def search_by_embedding(
        self, query_embedding: list[float], filters: dict[str, Any] | None = None, top_k: int = 10
    ) -> list[Document]:
        """The documents closest to a vector of the served model, scored by the cosine."""
        with _told():
            model = self.model or self._client.index().model_digest
            found = self._client.search_batch(
                [query_embedding], model=model, k=top_k, filter=self._filter(filters), payload=True
            )
        assert found.payload is not None  # asked for
        hits = zip(found.ids[0], found.payload[0], found.scores[0].tolist(), strict=True)
        return [self._document(*hit) for hit in hits]

    def search_by_text(
        self,
        query: str,
        filters: dict[str, Any] | None = None,
        top_k: int = 10,
        hybrid: Mapping[str, Any] | None = None,
    ) -> list[Document]:
        """The documents closest to a text, which the service embeds; `hybrid`: that of POST /v1/search."""
        more: dict[str, Any] = {} if hybrid is None else {"hybrid": dict(hybrid)}
        with _told():
            hits = self._client.search(query, k=top_k, filter=self._filter(filters), **more).hits
        return [self._document(hit.id, hit.payload, hit.score) for hit in hits]

    # In threads, which may share the client: one for asyncio would belong to one event loop.

    async def count_documents_async(self) -> int:
        """As `count_documents`."""
        return await asyncio.to_thread(self.count_documents)

    async def filter_documents_async(self, filters: dict[str, Any] | None = None) -> list[Document]:
        """As `filter_documents`."""
        return await asyncio.to_thread(self.filter_documents, filters)

    async def write_documents_async(
        self, documents: list[Document], policy: DuplicatePolicy = DuplicatePolicy.NONE
    ) -> int:
        """As `write_documents`."""
        return await asyncio.to_thread(self.write_documents, documents, policy)

    async def delete_documents_async(self, document_ids: list[str]) -> None:
        """As `delete_documents`."""
        await asyncio.to_thread(self.delete_documents, document_ids)

    def _item(self, document: Document, columns: Mapping[str, str]) -> Item:
        meta, payload = document.meta, {self.text_column: document.content}
        if self.metadata_column is not None:
            payload[self.metadata_column] = json.dumps(meta)
            meta = {name: value for name, value in meta.items() if name in columns}
        payload = {**meta, **payload}
        if self.model is not None:
            if document.embedding is None:
                raise ServeError("it has no embedding", where=f"document {document.id}", fix="embed it, or model=None")
            return Item(document.id, vector=document.embedding, payload=payload)
        if document.content is None and document.blob is not None:
            return Item(document.id, image=document.blob.data, payload=payload)
        return Item(document.id, text=document.content, payload=payload)

    def _document(self, name: str, payload: Mapping[str, Any], score: float | None = None) -> Document:
        rest = dict(payload)
        content = rest.pop(self.text_column, None)
        if self.metadata_column is not None:
            rest = json.loads(rest.get(self.metadata_column) or "{}")
        return Document(id=name, content=content, meta=rest, score=score)

    def _filter(self, filters: dict[str, Any] | None) -> Filter | None:
        try:
            return self._condition(filters) if filters else None
        except ServeError as error:
            raise FilterError(str(error)) from error

    def _condition(self, filters: dict[str, Any]) -> Filter:
        needed = ("operator", "value") if "field" in filters else ("operator", "conditions")
        for name in needed:
            if name not in filters:
                raise FilterError(f"{name!r} is missing in {filters}")
        operator = filters["operator"]
        if "field" in filters:
            column = filters["field"].removeprefix("meta.")
            column = self.text_column if filters["field"] == "content" else column
            return condition(column, "nin" if operator == "not in" else operator, filters["value"])
        if operator not in _LOGIC or not filters["conditions"]:
            raise FilterError(f"expected {', '.join(_LOGIC)} of one or more conditions, got {filters}")
        parts = [self._condition(each) for each in filters["conditions"]]
        # NOT: not all of them.
        return {"not": joined("and", parts)} if operator == "NOT" else joined(operator.lower(), parts)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Raises FilterError where the service found a filter wrong."""
    try:
        yield
    except ServeError as error:
        if error.field.startswith("filter"):
            raise FilterError(str(error)) from error
        raise


class _Retriever:
    """What the retrievers share: their settings, and how a pipeline keeps them."""

    def __init__(
        self,
        document_store: RayembDocumentStore,
        filters: dict[str, Any] | None = None,
        top_k: int = 10,
        filter_policy: FilterPolicy = FilterPolicy.REPLACE,
    ) -> None:
        self.document_store, self.filters, self.top_k, self.filter_policy = (
            document_store,
            filters,
            top_k,
            filter_policy,
        )

    def to_dict(self) -> dict[str, Any]:
        """The component as a dictionary."""
        settings = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        return default_to_dict(self, **{**settings, "filter_policy": self.filter_policy.value})

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Any:
        """The component that `to_dict` made a dictionary of."""
        settings = dict(data["init_parameters"])
        # Here and not by Haystack, which asks the user for leave to import a module that is not its own.
        settings["document_store"] = RayembDocumentStore.from_dict(settings["document_store"])
        settings["filter_policy"] = FilterPolicy.from_str(settings["filter_policy"])
        return default_from_dict(cls, {**data, "init_parameters": settings})

    def _wanted(self, filters: dict[str, Any] | None, top_k: int | None) -> tuple[dict[str, Any] | None, int]:
        return apply_filter_policy(self.filter_policy, self.filters, filters), self.top_k if top_k is None else top_k


@component
class RayembEmbeddingRetriever(_Retriever):
    """The documents closest to a query's embedding.

    Embed the query with the collection's model: Haystack's `OpenAITextEmbedder(model="rayemb", api_base_url=URL/v1)`
    asks the service for it.

    Args:
        document_store: where to search.
        filters: only documents that pass.
        top_k: how many, at most.
        filter_policy: whether filters of a run replace `filters` or add to them.
    """

    @component.output_types(documents=list[Document])
    def run(
        self, query_embedding: list[float], filters: dict[str, Any] | None = None, top_k: int | None = None
    ) -> dict[str, list[Document]]:
        """The documents, the closest first."""
        wanted = self._wanted(filters, top_k)
        return {"documents": self.document_store.search_by_embedding(query_embedding, *wanted)}

    @component.output_types(documents=list[Document])
    async def run_async(
        self, query_embedding: list[float], filters: dict[str, Any] | None = None, top_k: int | None = None
    ) -> dict[str, list[Document]]:
        """As `run`."""
        return await asyncio.to_thread(self.run, query_embedding, filters, top_k)


@component
class RayembTextRetriever(_Retriever):
    """The documents closest to a query's text, which the service embeds.

    Args:
        document_store: where to search.
        filters: only documents that pass.
        top_k: how many, at most.
        filter_policy: whether filters of a run replace `filters` or add to them.
        hybrid: `hybrid` of POST /v1/search, to have words count beside vectors: {}, or fusion and weight.
    """

    def __init__(
        self,
        document_store: RayembDocumentStore,
        filters: dict[str, Any] | None = None,
        top_k: int = 10,
        filter_policy: FilterPolicy = FilterPolicy.REPLACE,
        hybrid: dict[str, Any] | None = None,
    ) -> None:
        # Not super(): the decorator makes the class anew.
        _Retriever.__init__(self, document_store, filters, top_k, filter_policy)
        self.hybrid = hybrid

    @component.output_types(documents=list[Document])
    def run(
        self, query: str, filters: dict[str, Any] | None = None, top_k: int | None = None
    ) -> dict[str, list[Document]]:
        """The documents, the closest first."""
        wanted = self._wanted(filters, top_k)
        return {"documents": self.document_store.search_by_text(query, *wanted, self.hybrid)}

    @component.output_types(documents=list[Document])
    async def run_async(
        self, query: str, filters: dict[str, Any] | None = None, top_k: int | None = None
    ) -> dict[str, list[Document]]:
        """As `run`."""
        return await asyncio.to_thread(self.run, query, filters, top_k)
