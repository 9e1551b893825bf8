"""Clients of the service: one that waits, one for asyncio. LangChain's classes: `rayemb.serve.client.langchain`."""

from rayemb.serve.client.aio import AsyncClient
from rayemb.serve.client.calls import BatchHits, Item
from rayemb.serve.client.encoder import EndpointEncoder
from rayemb.serve.client.sync import Client

__all__ = ["AsyncClient", "BatchHits", "Client", "EndpointEncoder", "Item"]
