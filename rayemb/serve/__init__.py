"""An index that answers over HTTP: gateway, embedder, shards, web page, client.

Importing this package does not import Ray; the deployments are in `rayemb.serve.deploy`.
"""

from rayemb.serve.api import Hit, IndexInfo, SearchResponse
from rayemb.serve.client import Client
from rayemb.serve.config import ServeConfig
from rayemb.serve.errors import ServeError

__all__ = ["Client", "Hit", "IndexInfo", "SearchResponse", "ServeConfig", "ServeError"]
