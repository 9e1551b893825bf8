"""POST /v1/search/batch: many queries in, arrays out, as JSON or as an Arrow stream.

Arrow and not .npy for the binary form: ids are texts of any length, which an array of NumPy has no compact form for;
one stream holds ids, scores, payloads and what every answer says of itself; every language has a reader; and pyarrow
is what the artefacts are read with anyway.

Shape suffixes: N queries, D dimensions.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
from fastapi import Request
from numpy.typing import NDArray
from pydantic import BaseModel, Field
from starlette.responses import Response

from rayemb.index import Effort
from rayemb.serve.api import Filter, SearchEffort, Strict, Timings
from rayemb.serve.config import ServeConfig
from rayemb.serve.engine import Description, Found, FoundIds, Vectors
from rayemb.serve.envelope import JsonResponse, dumps
from rayemb.serve.errors import ApiError, ModelMismatchError
from rayemb.serve.parse import JSON, check_text, checked_effort, checked_filter, content_type, json_object, validated
from rayemb.serve.rpc import messages
from rayemb.serve.rpc.messages import MESSAGE

ARROW = "application/vnd.apache.arrow.stream"
# Key of the schema's metadata that holds the request's other fields, and the answer's, as JSON.
METADATA = b"rayemb"
# A vector whose numbers are all below has no direction worth the name.
LEAST = 1e-12
# Lengths at which no square vanishes or overflows, in float32 either; NaN is not between them.
_PLAIN = (1e-6, 1e15)
_LEAST_DIGEST = 12
_Rows = NDArray[np.floating]


class BatchRequest(Strict):
    """Several queries: texts, or vectors of the model that the index was built with."""

    texts: list[str] | None = Field(None, description="what to look for, in words", examples=[["red heart", "ship"]])
    vectors: list[list[float]] | None = Field(
        None, description="what to look for, as the model's own vectors, of any length but 0; needs `model`"
    )
    model: str | None = Field(
        None, description="digest of the model that made the vectors, whole or its first 12 characters or more"
    )
    k: int = Field(10, ge=1, description="how many hits to give for each query, at most")
    filter: Filter | None = Field(None, description="as in POST /v1/search; for all queries")
    recall: float | None = Field(None, gt=0, le=1, description="as in POST /v1/search")
    effort: SearchEffort | None = Field(None, description="as in POST /v1/search")
    at_least: int | None = Field(None, ge=0, description="as in POST /v1/search")
    payload: bool = Field(False, description="whether the answer has the payload of each hit; costs most of the time")


class BatchResponse(BaseModel):
    """The hits of each query in order, best first; lists are shorter than k where there are fewer."""

    ids: list[list[str]] = Field(description="ids of the hits of each query")
    scores: list[list[float]] = Field(description="their scores: inner product of unit vectors, larger is closer")
    payload: list[list[dict[str, Any]]] | None = Field(None, description="their payload columns, if asked for")
    collection: str = Field(description="the collection that was searched")
    version: str = Field(description="name of the version of it that answered")
    index_version: str = Field(description="version of the index that answered")
    model_digest: str = Field(description="digest of the model of the vectors")
    partial: bool = Field(description="true if some shards did not answer: their items are missing from the hits")
    missing_shards: list[str] = Field(description="the shards that did not answer")
    strategies: list[str] = Field(description="how the shards were searched, as in POST /v1/search")
    updates: int | None = Field(None, description="version of the live updates, as in POST /v1/search")
    timings_ms: Timings
    request_id: str = Field(description="names this request in the server's log")


@dataclass(frozen=True)
class Batch:
    """Queries that can be answered: unit `vectors` `(N, D)`, or else `texts`."""

    count: int
    vectors: Vectors | None
    texts: Sequence[str]
    k: int
    filter: Filter | None
    effort: Effort | None
    recall: float | None
    payload: bool
    form: str
    at_least: int | None = None


@dataclass(frozen=True)
class Answer:
    """Hits of N queries side by side: `counts` `(N,)`, then as many ids, scores and payloads as these sum to."""

    counts: NDArray[np.int64]
    ids: pa.Array
    scores: NDArray[np.float32]
    payload: list[dict[str, Any]] | None

    def response(self, about: Mapping[str, Any], form: str) -> Response:
        """The answer in full; `form`: ARROW, MESSAGE or JSON."""
        if form == MESSAGE:
            return messages.written(self._message(about))
        bounds = np.concatenate([[0], np.cumsum(self.counts)])
        if form == ARROW:
            return Response(self._stream(bounds.astype(np.int32), about), media_type=ARROW)
        parts = list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))
        ids = self.ids.to_pylist()
        document: dict[str, Any] = {
            "ids": [ids[start:stop] for start, stop in parts],
            "scores": [self.scores[start:stop] for start, stop in parts],
        }
        if self.payload is not None:
            document["payload"] = [self.payload[start:stop] for start, stop in parts]
        return JsonResponse({**document, **about})

    def _stream(self, bounds: NDArray[np.int32], about: Mapping[str, Any]) -> bytes:
        columns = {"ids": self.ids, "scores": pa.array(self.scores)}
        if self.payload is not None:
            columns["payload"] = pa.array(self._texts(), pa.string())
        lists = [pa.ListArray.from_arrays(bounds, column) for column in columns.values()]
        batch = pa.record_batch(lists, names=list(columns))
        return write_stream(batch, about)

    def _message(self, about: Mapping[str, Any]) -> Any:
        return messages.SearchBatchResponse(
            counts=self.counts.tolist(),
            ids=self.ids.to_pylist(),
            scores=messages.floats(self.scores),
            payload=self._texts(),
            **about,
        )

    def _texts(self) -> list[str]:
        return [dumps(row).decode() for row in self.payload or []]


def write_stream(batch: pa.RecordBatch, fields: Mapping[str, Any]) -> bytes:
    """An Arrow stream of one record batch, `fields` as JSON in its schema's metadata."""
    batch = batch.replace_schema_metadata({METADATA: dumps(fields)})
    out = io.BytesIO()
    with pa.ipc.new_stream(out, batch.schema) as writer:
        writer.write_batch(batch)
    return out.getvalue()


def names_model(name: str, digest: str) -> bool:
    """Whether `name` is the digest, or enough of its beginning."""
    return len(name) >= _LEAST_DIGEST and digest.startswith(name)


def without_payload(found: FoundIds) -> Answer:
    """The answer of ids and scores alone, without an object a hit."""
    there = np.isfinite(found.scores)
    return Answer(there.sum(axis=1), found.ids.drop_null(), found.scores[there], None)


def with_payload(found: Found) -> Answer:
    """The answer with the payload of every hit."""
    there = found.keys >= 0
    rows = [dict(found.rows[key]) for key in found.keys[there].tolist()]
    ids = pa.array([str(row.pop("id")) for row in rows], pa.string())
    return Answer(there.sum(axis=1), ids, found.scores[there], rows)


async def batch_query(request: Request, config: ServeConfig, about: Description) -> Batch:
    """The queries in the body of a request, JSON or Arrow. Raises ApiError."""
    kind = content_type(request)
    x_ND: _Rows | None = None
    if kind == ARROW:
        fields, x_ND = _read_stream(await request.body(), about.dim)
    elif kind == MESSAGE:
        fields, x_ND = messages.batch_fields(await request.body(), about.dim)
    elif kind == JSON:
        fields = await json_object(request)
    else:
        raise ApiError(
            415, "unsupported_media_type", f"send {JSON} or {ARROW}, not {kind or 'nothing'}", "content-type"
        )
    body = validated(BatchRequest, fields)
    if body.vectors is not None:
        x_ND = _matrix(body.vectors, about.dim)
    if (x_ND is None) == (body.texts is None):
        raise ApiError(422, "invalid_request", "give texts or vectors, one of the two", "texts, vectors")
    if body.k > config.max_k:
        raise ApiError(422, "invalid_request", f"k is at most {config.max_k}, got {body.k}", "k")
    vectors = None if x_ND is None else _checked(x_ND, body.model, about.model_digest, config)
    texts = _texts(body.texts or [], config) if vectors is None else []
    form = ARROW if kind == JSON and ARROW in request.headers.get("accept", "") else kind
    return Batch(
        len(texts) if vectors is None else len(vectors),
        vectors,
        texts,
        body.k,
        checked_filter(body.filter),
        checked_effort(body, about),
        body.recall,
        body.payload,
        form,
        body.at_least,
    )


def _texts(texts: list[str], config: ServeConfig) -> list[str]:
    if not texts:
        raise ApiError(422, "invalid_request", "give at least one text", "texts")
    if len(texts) > config.max_batch:
        raise ApiError(422, "invalid_request", f"at most {config.max_batch} texts, got {len(texts)}", "texts")
    for position, text in enumerate(texts):
        check_text(text, f"texts.{position}", config)
    return texts


def _checked(x_ND: _Rows, model: str | None, digest: str, config: ServeConfig) -> Vectors:
    """`x_ND` as unit vectors, if they are of the model with this digest and can be searched."""
    _check_model(model, digest)
    if not len(x_ND):
        raise ApiError(422, "invalid_request", "give at least one vector", "vectors")
    if len(x_ND) > config.max_queries:
        raise ApiError(422, "invalid_request", f"at most {config.max_queries} vectors, got {len(x_ND)}", "vectors")
    return _unit(x_ND, [f"vectors.{i}" for i in range(len(x_ND))])


def checked_vectors(
    rows: Sequence[Sequence[float]], names: Sequence[str], model: str | None, about: Description
) -> Vectors:
    """Vectors of a JSON body as unit vectors `(N, D)`, if they are of the served model. Raises ApiError by `names`."""
    _check_model(model, about.model_digest)
    for row, name in zip(rows, names, strict=True):
        if len(row) != about.dim:
            raise ApiError(422, "invalid_request", f"expected {about.dim} numbers, got {len(row)}", name)
    return _unit(np.array(rows, np.float64).reshape(len(rows), about.dim), names)


def _check_model(model: str | None, digest: str) -> None:
    if model is None:
        raise ApiError(422, "invalid_request", "name the model that made the vectors: its digest", "model")
    if not names_model(model, digest):
        raise ModelMismatchError(model, digest)


def _unit(x_ND: _Rows, names: Sequence[str]) -> Vectors:
    norms = np.sqrt(np.einsum("nd,nd->n", x_ND, x_ND))
    if ((norms > _PLAIN[0]) & (norms < _PLAIN[1])).all():
        return np.ascontiguousarray(x_ND / norms[:, None], np.float32)
    largest = np.abs(x_ND).max(axis=1)
    bad = np.flatnonzero(~(largest <= np.finfo(np.float32).max) | (largest < LEAST))
    if len(bad):
        what = "is zero" if largest[bad[0]] < LEAST else "holds NaN, infinity, or what is too large for float32"
        raise ApiError(422, "invalid_request", f"the vector {what}", names[int(bad[0])])
    scaled = x_ND / largest[:, None]  # else the squares of what is tiny would vanish
    return np.ascontiguousarray(scaled / np.linalg.norm(scaled, axis=1, keepdims=True), np.float32)


def _matrix(rows: list[list[float]], dim: int) -> _Rows:
    for position, row in enumerate(rows):
        if len(row) != dim:
            raise ApiError(422, "invalid_request", f"expected {dim} numbers, got {len(row)}", f"vectors.{position}")
    return np.array(rows, np.float64).reshape(len(rows), dim)


def _read_stream(data: bytes, dim: int) -> tuple[dict[str, Any], _Rows | None]:
    """The fields of a request and its vectors `(N, D)`, if it has a column of them."""
    try:
        # Metadata and columns that a stream claims are checked, not trusted: its offsets are a stranger's.
        table = pa.ipc.open_stream(data).read_all()
        table.validate(full=True)
        fields = orjson.loads((table.schema.metadata or {}).get(METADATA, b"{}"))
    except (pa.ArrowException, orjson.JSONDecodeError, OSError, ValueError) as error:
        told = " ".join(str(error).split())[:200]
        raise ApiError(
            400, "malformed_arrow", f"the body is not an Arrow stream with a request: {told}", "body"
        ) from error
    if not isinstance(fields, dict):
        raise ApiError(422, "invalid_request", "the metadata `rayemb` is a JSON object", "body")
    names = table.schema.names
    if len(names) != 1 or names[0] not in ("texts", "vectors") or names[0] in fields:
        raise ApiError(422, "invalid_request", "a stream has one column, `texts` or `vectors`", "body")
    column = table.column(0).combine_chunks() if table.num_rows else pa.array([], table.schema.field(0).type)
    if column.null_count:
        raise ApiError(422, "invalid_request", "there are nulls", names[0])
    if names[0] == "texts":
        if not pa.types.is_string(column.type) and not pa.types.is_large_string(column.type):
            raise ApiError(422, "invalid_request", f"expected strings, got {column.type}", "texts")
        return {**fields, "texts": column.to_pylist()}, None
    return fields, _column(column, dim)


def _column(column: pa.Array, dim: int) -> _Rows:
    kind = column.type
    if not pa.types.is_fixed_size_list(kind) or not pa.types.is_floating(kind.value_type):
        raise ApiError(422, "invalid_request", f"expected lists of {dim} floats of fixed size, got {kind}", "vectors")
    if kind.list_size != dim:
        raise ApiError(422, "invalid_request", f"expected {dim} numbers, got {kind.list_size}", "vectors")
    values = column.flatten()
    if values.null_count:
        raise ApiError(422, "invalid_request", "there are nulls", "vectors")
    floats: NDArray[np.floating] = values.to_numpy(zero_copy_only=False)
    # Not in halves: their squares would overflow.
    return floats.astype(np.promote_types(floats.dtype, np.float32)).reshape(-1, dim)
