"""What each call sends, how its answer is read, and when it is tried again; nothing here touches a network."""

import base64
import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from rayemb.serve.api import IndexInfo, SearchResponse
from rayemb.serve.errors import ServeError

T = TypeVar("T")
FilterValue = str | int | float | bool
# The language of `rayemb.index.filters`.
Filter = Mapping[str, Any]

JSON, ARROW = "application/json", "application/vnd.apache.arrow.stream"
_METADATA = b"rayemb"
# Worth another try: refused for now, or by a proxy whose backend was away. Not 504: the time is spent.
_PASSING = (429, 502, 503)
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 5.0
_PARSERS: dict[str, Callable[[str], FilterValue]] = {
    "integer": int,
    "number": float,
    "boolean": lambda text: {"true": True, "false": False}[text.lower()],
}


@dataclass(frozen=True)
class Item:
    """What is put into the collection: `id`, and what its vector is made of: text, image (encoded bytes), or itself.

    `vector` `(D,)` is one of the served model's. An item whose id is there already replaces it.
    """

    id: str
    text: str | None = None
    image: bytes | None = None
    vector: ArrayLike | None = None
    payload: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class BatchHits:
    """Hits of N queries, best first: `ids` and `scores` (float32) of each, `payload` if it was asked for."""

    ids: list[list[str]]
    scores: list[NDArray[np.float32]]
    payload: list[list[dict[str, Any]]] | None
    index_version: str
    model_digest: str
    partial: bool
    missing_shards: list[str]
    strategies: list[str]
    timings_ms: dict[str, float]
    request_id: str
    updates: int | None = None
    collection: str = ""
    version: str = ""


@dataclass(frozen=True)
class Call(Generic[T]):
    """A request and how its answer is read. All calls can be repeated: searches change nothing, writes name ids."""

    method: str
    path: str
    read: Callable[[bytes], T]
    content: bytes | None = None
    kind: str = JSON

    def headers(self, left_s: float) -> dict[str, str]:
        """What the request says beside its body; the server gives up when this client does."""
        kind = {} if self.content is None else {"Content-Type": self.kind}
        return {"X-Request-Timeout": f"{left_s:.3f}", **kind}


def search(
    text: str | None,
    image: bytes | str | Path | None,
    k: int,
    filter: Filter | None,
    more: Mapping[str, Any],
) -> Call[SearchResponse]:
    """POST /v1/search; `more` are other fields of its body."""
    body: dict[str, Any] = {"k": k, **more}
    if text is not None:
        body["text"] = text
    if image is not None:
        data = image if isinstance(image, bytes) else Path(image).read_bytes()
        body["image"] = base64.b64encode(data).decode()
    if filter is not None:
        body["filter"] = dict(filter)
    return Call("POST", "/v1/search", SearchResponse.model_validate_json, json_of(body))


def search_batch(
    queries: Sequence[str] | ArrayLike,
    model: str | None,
    k: int,
    filter: Filter | None,
    payload: bool,
    more: Mapping[str, Any],
) -> Call[BatchHits]:
    """POST /v1/search/batch, as an Arrow stream: texts, or vectors `(N, D)` of `model`; `more` are other fields."""
    fields: dict[str, Any] = {"k": k, "payload": payload, **more}
    if filter is not None:
        fields["filter"] = dict(filter)
    texts, x_ND = vectors_or_texts(queries, model)
    if x_ND is None:
        column, name = pa.array(texts, pa.string()), "texts"
    else:
        column, name = pa.FixedSizeListArray.from_arrays(pa.array(x_ND.reshape(-1)), x_ND.shape[1]), "vectors"
        fields["model"] = model
    batch = pa.record_batch([column], names=[name]).replace_schema_metadata({_METADATA: json_of(fields)})
    out = pa.BufferOutputStream()
    with pa.ipc.new_stream(out, batch.schema) as writer:
        writer.write_batch(batch)
    return Call("POST", "/v1/search/batch", _batch_hits, out.getvalue().to_pybytes(), ARROW)


def vectors_or_texts(
    queries: Sequence[str] | ArrayLike, model: str | None
) -> tuple[list[str], NDArray[np.float32] | None]:
    """The queries as texts, or as vectors `(N, D)` float32. Raises ServeError for what is neither, or of no `model`."""
    if isinstance(queries, Sequence) and queries and all(isinstance(query, str) for query in queries):
        return list(queries), None
    x_ND = np.ascontiguousarray(queries, np.float32)
    if x_ND.ndim != 2:
        raise ServeError(f"expected texts, or vectors (N, D), got an array {x_ND.shape}", where="queries")
    if model is None:
        raise ServeError("vectors need the digest of their model", where="model", fix="index().model_digest")
    return [], x_ND


def embed(texts: Sequence[str], kind: Literal["query", "document"] = "query") -> Call[NDArray[np.float32]]:
    """POST /v1/embeddings."""
    body = {"input": list(texts), "encoding_format": "base64", "input_type": kind}
    return Call("POST", "/v1/embeddings", _vectors, json_of(body))


def index() -> Call[IndexInfo]:
    """GET /v1/index."""
    return Call("GET", "/v1/index", IndexInfo.model_validate_json)


def collections() -> Call[dict[str, Any]]:
    """GET /v1/collections."""
    return Call("GET", "/v1/collections", json.loads)


def image(image_url: str) -> Call[bytes]:
    """The picture behind a hit's `image_url`."""
    return Call("GET", image_url, bytes)


def upsert(items: Sequence[Item], model: str | None) -> Call[int]:
    """POST /v1/items."""
    body: dict[str, Any] = {"items": [_item(item) for item in items]}
    if model is not None:
        body["model"] = model
    return Call("POST", "/v1/items", _count("upserted"), json_of(body))


def delete(ids: Sequence[str]) -> Call[int]:
    """POST /v1/items/delete."""
    return Call("POST", "/v1/items/delete", _count("deleted"), json_of({"ids": list(ids)}))


def get(ids: Sequence[str]) -> Call[dict[str, dict[str, Any]]]:
    """POST /v1/items/get."""

    def read(data: bytes) -> dict[str, dict[str, Any]]:
        return {item["id"]: item["payload"] for item in json.loads(data)["items"]}

    return Call("POST", "/v1/items/get", read, json_of({"ids": list(ids)}))


def parsed_filter(types: Mapping[str, str], texts: Mapping[str, str]) -> dict[str, FilterValue]:
    """A filter whose values have the types of the columns. Raises ServeError for a text that is no such value."""
    chosen: dict[str, FilterValue] = {}
    for column, text in texts.items():
        kind = types.get(column, "string")
        try:
            chosen[column] = _PARSERS.get(kind, str)(text)
        except (KeyError, ValueError) as error:
            raise ServeError(f"{text!r} is no {kind}", where=f"filter.{column}", field=column) from error
    return chosen


def wait_before(attempt: int, retries: int, status: int, retry_after: str, left_s: float) -> float | None:
    """The seconds to wait before the next attempt, or None to give up.

    Exponential with full jitter, so that clients that were refused together do not come back together; not before
    Retry-After says. `status` 0: no answer came. `attempt` counts from 0.
    """
    if attempt >= retries or (status and status not in _PASSING):
        return None
    wait = random.uniform(0, min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2**attempt))
    wait = max(wait, _seconds(retry_after))
    return wait if wait < left_s else None


def refusal(status: int, content: bytes, url: str) -> ServeError:
    """The server's own words as an error."""
    text = content.decode("utf-8", "replace")
    try:
        told = json.loads(text)["error"]
        message = str(told["message"])
        field = told.get("field") or told.get("param") or ""
        name = told.get("request_id") or ""
    except (ValueError, KeyError, TypeError, AttributeError):
        # From a proxy in between rather than from the gateway.
        message, field, name = f"HTTP {status}: {text[:200]}", "", ""
    return ServeError(message, where=field or url, status=status, field=field, request_id=name)


def unanswered(error: Exception, url: str) -> ServeError:
    """No answer came."""
    told = str(error) or type(error).__name__
    return ServeError(f"no answer ({told})", where=url, fix="start the service with `rayemb serve`")


def authorization(key: str | None) -> dict[str, str]:
    """The header that has the key."""
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def _seconds(retry_after: str) -> float:
    if not retry_after:
        return 0.0
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        from datetime import UTC, datetime

        return max(0.0, (parsedate_to_datetime(retry_after) - datetime.now(UTC)).total_seconds())
    except (ValueError, TypeError):
        return 0.0


def json_of(body: Mapping[str, Any]) -> bytes:
    """JSON without NaN and infinity. Raises ServeError for them, and for what has no form there."""
    try:
        return json.dumps(body, allow_nan=False).encode()
    except ValueError as error:
        raise ServeError(f"a value that JSON has no form for ({error})", where="request") from error


def _item(item: Item) -> dict[str, Any]:
    body: dict[str, Any] = {"id": item.id, "payload": dict(item.payload or {})}
    if item.text is not None:
        body["text"] = item.text
    if item.image is not None:
        body["image"] = base64.b64encode(item.image).decode()
    if item.vector is not None:
        body["vector"] = np.asarray(item.vector, np.float32).tolist()
    return body


def _count(name: str) -> Callable[[bytes], int]:
    return lambda data: int(json.loads(data)[name])


def _vectors(data: bytes) -> NDArray[np.float32]:
    ordered = sorted(json.loads(data)["data"], key=lambda item: item["index"])
    rows = [np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in ordered]
    return np.stack(rows).astype(np.float32)


def _batch_hits(data: bytes) -> BatchHits:
    table = pa.ipc.open_stream(data).read_all()
    about = json.loads(table.schema.metadata[_METADATA])
    scores = table.column("scores").combine_chunks()
    bounds, values = scores.offsets.to_numpy(), scores.values.to_numpy()
    payload = None
    if "payload" in table.schema.names:
        payload = [[json.loads(row) for row in rows] for rows in table.column("payload").to_pylist()]
    return BatchHits(
        ids=table.column("ids").to_pylist(), scores=np.split(values, bounds[1:-1]), payload=payload, **about
    )
