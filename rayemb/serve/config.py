"""How an index is served."""

import ipaddress
from typing import Literal

from pydantic import Field, field_validator, model_validator

from rayemb.config import Config
from rayemb.models import ImageLimits
from rayemb.serve.versions.catalog import GateConfig
from rayemb.serve.watch.config import WatchConfig
from rayemb.storage import normalise

# JSON around the values: keys, quotes, a filter.
_ENVELOPE_BYTES = 65_536
# One character of text in JSON at its longest: a surrogate pair written as two \uXXXX escapes.
_JSON_BYTES_PER_CHAR = 12


class ServeConfig(Config):
    """Where the service listens, how it is laid out on the cluster, and what it takes from a client."""

    host: str = Field("127.0.0.1", description="address that the HTTP proxy listens on; 0.0.0.0 for every interface")
    port: int = Field(8000, ge=0, le=65535, description="HTTP port; 0 picks a free one")
    keys: str | None = Field(
        None,
        description="file of API keys (`rayemb serve key new NAME --keys FILE`); then every request but the health "
        "checks needs one; null: none is asked for",
    )
    open: bool = Field(
        False,
        description="let everybody in who reaches the address; without it, an address that other machines reach "
        "needs keys",
    )
    collection: str = Field(
        "default",
        description="name of what is served, or with a catalog the collection of requests that name none; a key may be "
        "for some collections only",
    )
    catalog: str | None = Field(
        None,
        description="file of collections and their versions (`rayemb collection`), path or URI: what is live there is "
        "served, and followed when it changes; null: one model and one index",
    )
    watch: WatchConfig = Field(WatchConfig(), description="quality while serving: recall of samples, drift of queries")
    gate: GateConfig = Field(GateConfig(), description="what a version must reach to be promoted over HTTP")
    catalog_poll_s: float = Field(1.0, gt=0, description="how often the catalog is looked at, in s")
    topology: Literal["together", "spread"] = Field(
        "together",
        description="together: model and all shards in each gateway replica (fastest where they fit in one "
        "process: a hop between deployments costs 3 to 5 ms of CPU); "
        "spread: an embedder, and one deployment per shard",
    )
    replicas: int = Field(1, ge=1, description="replicas of each deployment")
    num_cpus: float = Field(
        0.5,
        gt=0,
        description="CPUs that each replica reserves on the cluster; the index in memory is not counted",
    )
    threads: int = Field(1, ge=1, description="threads of torch and of FAISS in each replica")
    max_k: int = Field(100, ge=1, le=10_000, description="most hits of one search")
    reranker: str | None = Field(
        None, description="directory of a cross-encoder (safetensors), for searches with `rerank`; null: none"
    )
    rerank_column: str = Field("text", description="payload column that the cross-encoder reads beside the query")
    max_text_chars: int = Field(2000, ge=1, description="longest text, in characters")
    image: ImageLimits = Field(
        ImageLimits(max_bytes=5_000_000, max_pixels=25_000_000), description="what an uploaded image may be"
    )
    max_batch: int = Field(64, ge=1, description="most texts of one embeddings request, most queries embedded at once")
    max_queries: int = Field(256, ge=1, le=65_536, description="most vectors of one POST /v1/search/batch")
    deadline_s: float = Field(
        2.0,
        gt=0,
        description="spread: time that the embedder or a shard has to answer, in s; a shard that misses it "
        "is left out and named in `missing_shards`",
    )
    request_timeout_s: float = Field(
        30.0, gt=0, description="time that a whole request has, in s; its X-Request-Timeout (s) may lower it"
    )
    start_deadline_s: float = Field(120.0, gt=0, description="time that the deployments have to come up, in s")
    max_ongoing_requests: int = Field(32, ge=1, description="requests that one gateway replica works on at once")
    max_queued_requests: int = Field(
        128,
        ge=0,
        description="requests that wait in one gateway replica; more are refused with `overload_status`",
    )
    overload_status: Literal[429, 503] = Field(503, description="HTTP status of a refusal under overload")
    retry_after_s: int = Field(1, ge=1, description="what Retry-After says then, in s")
    max_buffered_bytes: int = Field(
        256_000_000,
        ge=1,
        description="bodies that one gateway replica holds at once; more are refused with `overload_status`",
    )
    access_log: str | None = Field(
        None,
        description="file that each gateway replica writes a line of JSON a request to, without payloads; -: its "
        "standard output; null: none",
    )
    tracing: str | None = Field(
        None,
        description="OTLP/HTTP collector that gets the spans of each request, such as http://localhost:4318/v1/traces "
        "(extra `tracing`); null: none",
    )

    @field_validator("keys", "catalog")
    @classmethod
    def _usable(cls, value: str | None) -> str | None:
        # Replicas run in other folders: a relative path would mean something else there.
        return None if value is None else normalise(value)

    @model_validator(mode="after")
    def _guarded(self) -> "ServeConfig":
        if self.keys is None and not self.open and not is_loopback(self.host):
            raise ValueError(
                f"{self.host} is an address that other machines reach, and there are no keys: name a file of them "
                "(serve.keys), or let everybody in (serve.open: true)"
            )
        if self.catalog is not None and self.topology != "together":
            raise ValueError("a catalog is served by topology together only: versions change inside the gateways")
        if self.max_buffered_bytes < self.max_body_bytes:
            raise ValueError(f"max_buffered_bytes is below the largest body, {self.max_body_bytes:,} bytes")
        return self

    @property
    def max_body_bytes(self) -> int:
        """Most bytes of a request body that can be valid: a base64 image, or a full batch of texts."""
        image = -(-self.image.max_bytes * 4 // 3)
        text = self.max_text_chars * _JSON_BYTES_PER_CHAR
        return max(image + text, self.max_batch * text) + _ENVELOPE_BYTES

    def cpus_needed(self, shards: int) -> float:
        """CPUs that the whole application reserves, for an index of `shards` shards."""
        deployments = 1 if self.topology == "together" else 2 + shards
        return deployments * self.replicas * self.num_cpus


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`; a name that is not `localhost` is taken for another one."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
