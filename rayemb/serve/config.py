"""How an index is served."""

import ipaddress
from typing import Literal

from pydantic import Field, field_validator, model_validator

from rayemb.config import Config
from rayemb.models import ImageLimits
from rayemb.serve.versions.catalog import GateConfig
from rayemb.serve.watch.config import WatchConfig
from rayemb.storage import normalise

Part = Literal["gateway", "embedder", "shards"]
# JSON around the values: keys, quotes, a filter.
_ENVELOPE_BYTES = 65_536
# One character of text in JSON at its longest: a surrogate pair written as two \uXXXX escapes.
_JSON_BYTES_PER_CHAR = 12


class Scaling(Config):
    """Between how many replicas a part goes up and down with its load."""

    min_replicas: int = Field(1, ge=1, description="replicas when it is quiet")
    max_replicas: int = Field(..., ge=1, description="replicas at most")
    target_ongoing: float = Field(
        1.0,
        gt=0,
        description="requests under way at each replica that are aimed at; of embedder and shards, calls: each carries "
        "the queries that waited",
    )

    @model_validator(mode="after")
    def _ordered(self) -> "Scaling":
        if self.min_replicas > self.max_replicas:
            raise ValueError(f"min_replicas ({self.min_replicas}) is above max_replicas ({self.max_replicas})")
        return self


class SpreadConfig(Config):
    """How gateways call the embedder and the shards, in the `spread` topology."""

    calls: int = Field(
        1,
        ge=1,
        description="calls of a gateway under way to each replica of a part; what comes meanwhile goes together",
    )
    call_queries: int = Field(256, ge=1, description="queries that one call carries at most; 1: a call for each query")
    hedge: float = Field(
        0.05,
        ge=0,
        le=1,
        description="calls that may be made a second time, to another replica, because the first is late (longer than "
        "95 % of the recent ones): this share of all at most; 0: none",
    )
    hedge_floor_s: float = Field(0.02, gt=0, description="no call is late before this time, in s")


class GrpcConfig(Config):
    """The service over gRPC, beside HTTP and on the same address (`rayemb serve proto` prints the .proto)."""

    port: int = Field(9000, ge=0, le=65535, description="gRPC port; 0 picks a free one")


class ServeConfig(Config):
    """Where the service listens, how it is laid out on the cluster, and what it takes from a client."""

    host: str = Field("127.0.0.1", description="address that the HTTP proxy listens on; 0.0.0.0 for every interface")
    port: int = Field(8000, ge=0, le=65535, description="HTTP port; 0 picks a free one")
    grpc: GrpcConfig | None = Field(
        None, description="answer gRPC too, such as {port: 9000}, with the same keys, limits and log; null: HTTP alone"
    )
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
    spread: SpreadConfig = Field(SpreadConfig(), description="how the parts of the spread topology are called")
    replicas: int = Field(1, ge=1, description="replicas of each deployment that `scaling` does not name")
    scaling: dict[Part, Scaling] = Field(
        {}, description="parts that Serve scales with their load, such as {shards: {max_replicas: 4}}"
    )
    num_cpus: float = Field(
        0.5,
        gt=0,
        description="CPUs that each replica reserves on the cluster; the index in memory is not counted",
    )
    threads: int = Field(1, ge=1, description="threads of torch and of FAISS in each replica")
    mapped: bool = Field(
        True,
        description="map shards into memory: they open at once, may be larger than memory, and replicas of a machine "
        "share them; false: read them whole, so that no first query waits for the disk",
    )
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
    max_batch_tokens: int = Field(
        16_384,
        ge=1,
        description="most texts embedded at once, counted in tokens: their number times the longest one's",
    )
    max_queries: int = Field(256, ge=1, le=65_536, description="most vectors of one POST /v1/search/batch")
    live: bool = Field(
        False,
        description="search the live updates too, and take writes (POST /v1/items); with keys, of those that may write",
    )
    max_updates: int = Field(
        100_000,
        ge=1,
        description="live updates that may wait for `rayemb index compact`; more are refused with 503",
    )
    follow_s: float = Field(
        1.0, gt=0, description="how often a replica looks for updates that were written elsewhere, in s"
    )
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
        """CPUs that the whole application reserves at the start, for an index of `shards` shards."""
        parts: dict[Part, int] = {"gateway": 1}
        if self.topology == "spread":
            parts |= {"embedder": 1, "shards": shards}
        return sum(count * self.least(part) for part, count in parts.items()) * self.num_cpus

    def least(self, part: Part) -> int:
        """Replicas of a deployment when it is quiet."""
        return self.scaling[part].min_replicas if part in self.scaling else self.replicas

    def most(self, part: Part) -> int:
        """Replicas of a deployment under load."""
        return self.scaling[part].max_replicas if part in self.scaling else self.replicas


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`; a name that is not `localhost` is taken for another one."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
