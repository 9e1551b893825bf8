"""What goes over the wire: requests and answers, strict, each field documented for /openapi.json."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue


class Strict(BaseModel):
    """What a client sends: no field too many, nothing converted."""

    # Strict: "5" and true are no integers here, though FastAPI's defaults would take them for 5 and 1.
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


# The language has its own parser, which names paths, and its own schema in /openapi.json.
Filter = dict[str, JsonValue]
Ids = Annotated[list[str], Field(max_length=100)]


class Hybrid(Strict):
    """Words beside vectors: how the two rankings become one."""

    fusion: Literal["rrf", "convex"] = Field(
        "rrf", description="rrf: by ranks, 1 / (60 + rank) added up; convex: by scores, each scaled to 0..1"
    )
    weight: float = Field(0.5, ge=0, le=1, description="convex: share of the words' score")


class SearchEffort(Strict):
    """How wide to search; each part matters to the index types that have it, and more is slower and finds more."""

    nprobe: int | None = Field(None, ge=1, le=65_536, description="IVF lists a query looks into")
    ef_search: int | None = Field(None, ge=1, le=4096, description="candidates an HNSW search keeps")
    rerank: int | None = Field(None, ge=1, le=64, description="candidates per hit that a refine stage scores again")


class SearchRequest(Strict):
    """One query: a text, an image, both (their vectors' normalised mean), or items that are like what is wanted.

    Of `diversity`, `group_by` and (`hybrid`, `rerank`) one at most.
    """

    text: str | None = Field(None, description="what to look for, in words", examples=["red heart"])
    image: str | None = Field(
        None,
        description="a picture to look for: an encoded image (PNG, JPEG, WebP, ...) in base64",
        json_schema_extra={"format": "byte"},
    )
    k: int = Field(10, ge=1, description="how many hits to give, at most")
    filter: Filter | None = Field(
        None,
        description='only items whose columns pass, as in {"source": "openmoji", "size": {"gte": 64}}; columns and '
        "types: `payload_types` of GET /v1/index",
    )
    recall: float | None = Field(
        None, gt=0, le=1, description="share of the exact answer wanted: `curve` of GET /v1/index says what it takes"
    )
    effort: SearchEffort | None = Field(None, description="instead of `recall`; what is left out is the index's own")
    min_score: float | None = Field(None, description="only items whose vector scores this much; not with `hybrid`")
    positive: Ids = Field(
        [], description="ids of items to be near to; alone, or beside text and image, which count as one more"
    )
    negative: Ids = Field([], description="ids of items to be far from: their mean is subtracted")
    diversity: float | None = Field(
        None, ge=0, le=1, description="maximal marginal relevance: 0, the nearest, to 1, the most unlike each other"
    )
    group_by: str | None = Field(
        None, description="a column; `k` of its values are found by their best items, hits of one side by side"
    )
    group_size: int = Field(1, ge=1, description="with `group_by`: most hits of one value; k * group_size <= max_k")
    hybrid: Hybrid | None = Field(None, description="the text's words count too (BM25), where the index has them")
    rerank: int | None = Field(
        None, ge=1, description="that many of the best are scored anew by reading them with the text, where served"
    )
    at_least: int | None = Field(
        None, ge=0, description="version of the live updates that has to be seen: what a write answered"
    )


class EmbeddingsRequest(Strict):
    """Texts to embed, in OpenAI's schema."""

    input: str | list[str] = Field(description="one text, or several; token arrays are not taken")
    model: str = Field("rayemb", description='"rayemb", or the digest (whole, or its first 12 characters or more)')
    encoding_format: Literal["float", "base64"] = Field(
        "float", description="float: lists of numbers; base64: little-endian float32"
    )
    dimensions: int | None = Field(None, description="if given, the model's own dimension")
    user: str | None = Field(None, description="taken for compatibility, not used")
    input_type: Literal["query", "document"] = Field(
        "query", description="of texts that look or are to be found, for models that embed the two unlike; not OpenAI's"
    )


class Hit(BaseModel):
    """One item found."""

    id: str = Field(description="the item's id in the embeddings table")
    score: float = Field(
        description="inner product of unit vectors, -1 to 1; with `hybrid` or `rerank`, of those; larger is better"
    )
    payload: dict[str, Any] = Field(description="the item's payload columns")
    image_url: str | None = Field(None, description="where the item's picture is, if the table keeps pictures")


class Timings(BaseModel):
    """Where the time went, in milliseconds."""

    embed: float = Field(description="query to vector")
    search: float = Field(description="vector to hits: all shards, the merge, the payloads")
    total: float = Field(description="the whole request inside the gateway, waiting for a free place included")


class SearchResponse(BaseModel):
    """The hits of a query, best first, and what they were computed with."""

    hits: list[Hit] = Field(description="best first; fewer than k if the index or the filter has fewer")
    collection: str = Field(description="the collection that was searched")
    version: str = Field(description="name of the version of it that answered")
    index_version: str = Field(description="version of the index that answered")
    model_digest: str = Field(description="digest of the model that embedded the query")
    partial: bool = Field(description="true if some shards did not answer: their items are missing from the hits")
    missing_shards: list[str] = Field(description="the shards that did not answer")
    strategies: list[str] = Field(
        [],
        description="how the shards were searched: index (no filter); with one: exact (over the items that pass), "
        "selector (the index skips what fails), overfetch (what fails is dropped from more hits); words (BM25)",
    )
    updates: int | None = Field(None, description="version of the live updates that were searched, if they are served")
    timings_ms: Timings
    request_id: str = Field(description="names this request in the server's log")


class Embedding(BaseModel):
    """One vector in OpenAI's schema."""

    object: Literal["embedding"] = "embedding"
    index: int = Field(description="position of the text in `input`")
    embedding: list[float] | str = Field(description="the unit vector, or its float32 bytes in base64")


class Usage(BaseModel):
    """Tokens that the model read ([CLS] included, what it cut off not)."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsResponse(BaseModel):
    """Vectors in OpenAI's schema."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str = Field(description="digest of the model")
    usage: Usage


class IndexInfo(BaseModel):
    """What is served, and which limits hold."""

    collection: str = Field("", description="name of the collection")
    version: str = Field("", description="name of the version that answers, in the catalog")
    index_version: str = Field(description="version of the index")
    model_digest: str = Field(description="digest of the model")
    rows: int = Field(description="items that can be found")
    dim: int = Field(description="dimension of the vectors")
    metric: str = Field(description="how scores are computed")
    shards: list[dict[str, Any]] = Field(description="name and rows of each shard")
    factory: str = Field(description="FAISS factory string")
    recall: dict[str, JsonValue] = Field(description="recall measured when the index was built, if it was")
    effort: dict[str, JsonValue] = Field(description="how wide a search looks unless it asks otherwise")
    curve: list[dict[str, JsonValue]] = Field(
        description="recall measured at other efforts, and milliseconds a query on one thread; cheapest first"
    )
    words: str | None = Field(description="column whose words `hybrid` goes by, if the index has any")
    payload_columns: list[str] = Field(description="columns that hits carry and filters may name")
    payload_types: dict[str, str] = Field(
        description="type of each payload column: string, integer, number, boolean, timestamp, point, list of "
        "one of these; other: no filter but null"
    )
    has_images: bool = Field(description="whether hits have an image_url")
    topology: str = Field(description="together (one process) or spread (one deployment per shard)")
    max_k: int = Field(description="most hits of one search")
    max_text_chars: int = Field(description="longest text, in characters")
    max_image_bytes: int = Field(description="largest uploaded image, in bytes")
    max_batch: int = Field(description="most texts of one request, to embed or to search")
    max_queries: int = Field(description="most vectors of one POST /v1/search/batch, most items of one write")
    live: bool = Field(False, description="whether items can be written and removed: POST /v1/items")
    updates_waiting: int | None = Field(None, description="live: updates that wait to be compacted into the index")


class ErrorBody(BaseModel):
    """What was wrong."""

    type: str = Field(description="one short word for machines")
    message: str = Field(description="what was wrong, for people")
    field: str | None = Field(None, description="the part of the request that was wrong")
    request_id: str = Field(description="names this request in the server's log")


class ErrorResponse(BaseModel):
    """Every answer other than 2xx and 304."""

    error: ErrorBody


class OpenAIErrorBody(BaseModel):
    """What was wrong, in OpenAI's names."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None
    request_id: str


class OpenAIErrorResponse(BaseModel):
    """Every answer of /v1/embeddings other than 200."""

    error: OpenAIErrorBody


class Status(BaseModel):
    """Alive, or ready."""

    status: Literal["ok", "degraded"] = Field(description="degraded: it answers, but some shards are missing")
    missing_shards: list[str] = Field(default_factory=list, description="shards that do not answer")
