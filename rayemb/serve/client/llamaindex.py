"""A running service as LlamaIndex's vector store (extra `llamaindex`)."""

import asyncio
import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rayemb.serve.client.calls import Item
from rayemb.serve.client.stores import Filter, condition, joined, passing, put, remove, remove_passing, take
from rayemb.serve.client.sync import Client
from rayemb.serve.errors import ServeError

try:
    from llama_index.core.bridge.pydantic import Field, PrivateAttr
    from llama_index.core.schema import BaseNode, ImageNode, MetadataMode, TextNode
    from llama_index.core.vector_stores.types import (
        BasePydanticVectorStore,
        FilterCondition,
        FilterOperator,
        MetadataFilter,
        MetadataFilters,
        VectorStoreQuery,
        VectorStoreQueryMode,
        VectorStoreQueryResult,
    )
    from llama_index.core.vector_stores.utils import metadata_dict_to_node, node_to_metadata_dict
except ImportError as error:
    raise ServeError(
        f"{error.name} is not installed", where="rayemb.serve.client.llamaindex", fix="pip install 'rayemb[llamaindex]'"
    ) from error

_REF = "ref_doc_id"


class RayembVectorStore(BasePydanticVectorStore):
    """The served collection as a vector store; the service embeds nodes and queries with the collection's model.

    Nodes are found by their ids and read from any collection. Their metadata go to the payload columns of the same
    names, by which queries can filter; `node_column` keeps the rest, relationships too. `delete` wants a column
    `ref_doc_id`.

    Args:
        url: where the service answers.
        key: its API key, if it wants one. It is not serialised.
        timeout_s: how long one call may take, in s.
        text_column: payload column that has a node's text.
        node_column: payload column that has the whole node as JSON; null: all metadata need columns of their own.
        model: digest of the model by which LlamaIndex embeds (`embed_model`), if it is to: nodes and queries then come
            as vectors, refused by a service that has another model. Null: the service embeds.

    Nodes with a picture (`image`, `image_path`) are embedded by it. `is_empty` finds missing values, not empty lists.
    Modes of queries: default, and of texts hybrid (`alpha`: share of the vectors; none: fused by ranks) and mmr.
    Raises ServeError where the service does, and for what it does not have.
    """

    stores_text: bool = True
    is_embedding_query: bool = False
    url: str = Field(description="where the service answers")
    timeout_s: float = Field(description="how long one call may take, in s")
    text_column: str = Field(description="payload column that has a node's text")
    node_column: str | None = Field(description="payload column that has the whole node as JSON")
    model: str | None = Field(description="digest of the model by which LlamaIndex embeds; null: the service embeds")
    _client: Client = PrivateAttr()

    def __init__(
        self,
        url: str = "http://127.0.0.1:8000",
        *,
        key: str | None = None,
        timeout_s: float = 30.0,
        text_column: str = "text",
        node_column: str | None = None,
        model: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            stores_text=True,
            url=url,
            timeout_s=timeout_s,
            text_column=text_column,
            node_column=node_column,
            model=model,
            is_embedding_query=model is not None,
        )
        self._client = Client(url, timeout_s, key=key)

    @classmethod
    def class_name(cls) -> str:
        """The name that a serialised store has."""
        return "RayembVectorStore"

    @property
    def client(self) -> Client:
        """The client of the service."""
        return self._client

    def add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """Puts nodes in, in place of those with their ids, which it gives."""
        columns = self._client.index().payload_types if nodes else {}
        put(self._client, [self._item(node, columns) for node in nodes], self.model)
        return [node.node_id for node in nodes]

    def delete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """Takes the nodes of a document out."""
        remove_passing(self._client, {_REF: ref_doc_id})

    def delete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """Takes nodes out: those of the ids, those that pass, or if both are given those that are both."""
        if node_ids is None and filters is None:
            raise ServeError("say which nodes", where="node_ids, filters", fix="clear() takes all of them out")
        if node_ids is None:
            remove_passing(self._client, _filter(filters))
        else:
            passed = node_ids if filters is None else [node.node_id for node in self.get_nodes(node_ids, filters)]
            remove(self._client, passed)

    def clear(self) -> None:
        """Takes all items out of the collection."""
        remove_passing(self._client, None)

    def get_nodes(self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None) -> list[BaseNode]:
        """The nodes of the ids that there are, those that pass (fewer than the service's `max_k`), or both."""
        if node_ids is None or filters is not None:
            found: Mapping[str, dict[str, Any]] = passing(self._client, _filter(filters))
        else:
            found = take(self._client, node_ids)
        names = list(found) if node_ids is None else [name for name in node_ids if name in found]
        return [self._node(name, found[name]) for name in names]

    def query(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """The closest nodes and their scores; vectors only by `model`."""
        if query.node_ids:  # LlamaIndex gives an empty list for all
            raise ServeError("a search cannot be limited to ids", where="node_ids", fix="filter by a payload column")
        k, more = _kind(query, kwargs)
        filter = _filter(query.filters, query.doc_ids)
        if self.model is not None and query.query_embedding is not None and not more:
            found = self._client.search_batch(
                [query.query_embedding], model=self.model, k=k, filter=filter, payload=True
            )
            assert found.payload is not None  # asked for
            ids, scores, rows = found.ids[0], found.scores[0].tolist(), found.payload[0]
        elif query.query_str:
            hits = self._client.search(query.query_str, k=k, filter=filter, **more).hits
            ids, scores = [hit.id for hit in hits], [hit.score for hit in hits]
            rows = [hit.payload for hit in hits]
        else:
            fix = "give query_str, or for a vector the digest of its model (model=...) and mode default"
            raise ServeError("there is nothing to search for", where="query", fix=fix)
        nodes = [self._node(name, row) for name, row in zip(ids, rows, strict=True)]
        return VectorStoreQueryResult(nodes=nodes, similarities=scores, ids=ids)

    # In threads, which may share the client: one for asyncio would belong to one event loop.

    async def async_add(self, nodes: Sequence[BaseNode], **kwargs: Any) -> list[str]:
        """As `add`."""
        return await asyncio.to_thread(self.add, nodes, **kwargs)

    async def adelete(self, ref_doc_id: str, **delete_kwargs: Any) -> None:
        """As `delete`."""
        await asyncio.to_thread(self.delete, ref_doc_id, **delete_kwargs)

    async def adelete_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None, **delete_kwargs: Any
    ) -> None:
        """As `delete_nodes`."""
        await asyncio.to_thread(self.delete_nodes, node_ids, filters)

    async def aclear(self) -> None:
        """As `clear`."""
        await asyncio.to_thread(self.clear)

    async def aget_nodes(
        self, node_ids: list[str] | None = None, filters: MetadataFilters | None = None
    ) -> list[BaseNode]:
        """As `get_nodes`."""
        return await asyncio.to_thread(self.get_nodes, node_ids, filters)

    async def aquery(self, query: VectorStoreQuery, **kwargs: Any) -> VectorStoreQueryResult:
        """As `query`."""
        return await asyncio.to_thread(self.query, query, **kwargs)

    def _item(self, node: BaseNode, columns: Mapping[str, str]) -> Item:
        metadata, payload = node.metadata, {self.text_column: node.get_content(MetadataMode.NONE)}
        if self.node_column is not None:
            payload[self.node_column] = node_to_metadata_dict(node, remove_text=True)["_node_content"]
            metadata = {name: value for name, value in metadata.items() if name in columns}
        if _REF in columns:
            metadata = {**metadata, _REF: node.ref_doc_id}
        payload = {**metadata, **payload}
        if self.model is not None:
            return Item(node.node_id, vector=node.get_embedding(), payload=payload)
        if picture := _picture(node):
            return Item(node.node_id, image=picture, payload=payload)
        return Item(node.node_id, text=node.get_content(MetadataMode.EMBED), payload=payload)

    def _node(self, name: str, payload: Mapping[str, Any]) -> BaseNode:
        rest = dict(payload)
        text, whole = str(rest.pop(self.text_column, None) or ""), rest.get(self.node_column or "")
        if not whole:
            return TextNode(id_=name, text=text, metadata={key: value for key, value in rest.items() if key != _REF})
        about = {"_node_content": whole, "_node_type": json.loads(whole)["class_name"]}
        return metadata_dict_to_node(about, text)


def _picture(node: BaseNode) -> bytes | None:
    if isinstance(node, ImageNode) and node.image:
        return base64.b64decode(node.image)
    return Path(node.image_path).read_bytes() if isinstance(node, ImageNode) and node.image_path else None


def _kind(query: VectorStoreQuery, kwargs: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """How many hits, and the fields of the request that the mode of the query asks for."""
    if query.mode == VectorStoreQueryMode.DEFAULT:
        return query.similarity_top_k, {}
    if query.mode == VectorStoreQueryMode.MMR:
        threshold = kwargs.get("mmr_threshold", query.mmr_threshold)
        return query.similarity_top_k, {"diversity": 0.5 if threshold is None else 1 - threshold}
    if query.mode == VectorStoreQueryMode.HYBRID:
        weights = {} if query.alpha is None else {"fusion": "convex", "weight": 1 - query.alpha}
        return query.hybrid_top_k or query.similarity_top_k, {"hybrid": weights}
    raise ServeError(f"the service has no mode {query.mode.value}", where="mode", fix="modes: default, hybrid, mmr")


def _filter(filters: MetadataFilters | None, doc_ids: list[str] | None = None) -> Filter | None:
    parts = [_joined(filters)] if filters is not None and filters.filters else []
    if doc_ids is not None:
        parts.append({_REF: {"in": doc_ids}})
    return joined("and", parts) if parts else None


def _joined(filters: MetadataFilters) -> Filter:
    parts = [_joined(each) if isinstance(each, MetadataFilters) else _condition(each) for each in filters.filters]
    if not parts:
        raise ServeError("a group of filters is empty", where="filters")
    if filters.condition == FilterCondition.NOT:  # none of them
        return {"not": joined("or", parts)}
    return joined("or" if filters.condition == FilterCondition.OR else "and", parts)


def _condition(each: MetadataFilter) -> Filter:
    column, value, operator = each.key, each.value, each.operator
    if operator == FilterOperator.IS_EMPTY:
        return {column: None}
    # Of a list column, the service asks whether one element meets a condition.
    if operator == FilterOperator.ANY:
        return condition(column, "in", value)
    if operator == FilterOperator.CONTAINS:
        return condition(column, "==", value)
    if operator == FilterOperator.ALL:
        if not isinstance(value, list) or not value:
            raise ServeError(f"`all` takes a list of one or more values, got {value!r}", where=column)
        return joined("and", [condition(column, "==", one) for one in value])
    return condition(column, operator.value, value)
