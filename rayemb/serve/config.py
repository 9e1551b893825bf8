"""How an index is served."""

from typing import Literal

from pydantic import Field

from rayemb.config import Config
from rayemb.models import ImageLimits

# JSON around the values: keys, quotes, a filter.
_ENVELOPE_BYTES = 65_536
# One character of text in JSON at its longest: a surrogate pair written as two \uXXXX escapes.
_JSON_BYTES_PER_CHAR = 12


class ServeConfig(Config):
    """Where the service listens, how it is laid out on the cluster, and what it takes from a client."""

    host: str = Field("127.0.0.1", description="address that the HTTP proxy listens on; 0.0.0.0 for every interface")
    port: int = Field(8000, ge=0, le=65535, description="HTTP port; 0 picks a free one")
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
    deadline_s: float = Field(
        2.0,
        gt=0,
        description="spread: time that the embedder or a shard has to answer, in s; a shard that misses it "
        "is left out and named in `missing_shards`",
    )
    request_timeout_s: float = Field(30.0, gt=0, description="time that a whole request has, in s")
    start_deadline_s: float = Field(120.0, gt=0, description="time that the deployments have to come up, in s")
    max_ongoing_requests: int = Field(32, ge=1, description="requests that one gateway replica works on at once")
    max_queued_requests: int = Field(
        128,
        ge=0,
        description="requests that wait in one gateway replica; more are refused with `overload_status`",
    )
    overload_status: Literal[429, 503] = Field(503, description="HTTP status of a refusal under overload")
    retry_after_s: int = Field(1, ge=1, description="what Retry-After says then, in s")

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
