"""An index that answers over HTTP and gRPC: gateway, embedder, shards, web page, client.

Importing this package imports neither Ray nor an HTTP client: each name is fetched when it is first used. The
deployments are in `rayemb.serve.deploy`; `rayemb.serve:app` builds them, for `serve run` and RayService.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rayemb.serve.config import ServeConfig
from rayemb.serve.errors import ServeError

if TYPE_CHECKING:
    from rayemb.serve.api import Hit, IndexInfo, SearchResponse
    from rayemb.serve.client import AsyncClient, BatchHits, Client, Item
    from rayemb.serve.client.rpc import GrpcClient
    from rayemb.serve.deploy import build as app

__all__ = [
    "AsyncClient",
    "BatchHits",
    "Client",
    "GrpcClient",
    "Hit",
    "IndexInfo",
    "Item",
    "SearchResponse",
    "ServeConfig",
    "ServeError",
    "app",
]

_HOMES = {
    **dict.fromkeys(("Hit", "IndexInfo", "SearchResponse"), "rayemb.serve.api"),
    **dict.fromkeys(("AsyncClient", "BatchHits", "Client", "Item"), "rayemb.serve.client"),
    "GrpcClient": "rayemb.serve.client.rpc",
}


def __getattr__(name: str) -> Any:
    if name == "app":
        return import_module("rayemb.serve.deploy").build
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
