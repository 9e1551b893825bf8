"""The messages of `rayemb.v1`: their classes, made from the compiled .proto, and what is read from and written to them.

Compiled to a descriptor set and not to Python: generated code is tied to a release of protobuf, descriptors are not.
    python -m grpc_tools.protoc -I rayemb/serve/rpc/proto \
        --descriptor_set_out=rayemb/serve/rpc/proto/rayemb/v1/search.binpb rayemb/v1/search.proto

Shape suffixes: N queries, D dimensions.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import orjson
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message
from numpy.typing import NDArray
from starlette.responses import Response

from rayemb.serve.errors import ApiError

M = TypeVar("M", bound=Message)

SERVICE = "rayemb.v1.Search"
# Media type of a body that is a message: what the app is told that a call has.
MESSAGE = "application/protobuf"
PROTO = Path(__file__).parent / "proto" / "rayemb" / "v1" / "search.proto"
_FLOAT = np.dtype("<f4")


def _classes() -> dict[str, Any]:
    described = descriptor_pb2.FileDescriptorSet.FromString(PROTO.with_suffix(".binpb").read_bytes())
    (file,) = described.file
    # The default pool: reflection, Serve's too, answers from it.
    pool = descriptor_pool.Default()
    pool.AddSerializedFile(file.SerializeToString())
    names = [each.name for each in file.message_type]
    return {
        name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{file.package}.{name}")) for name in names
    }


_made = _classes()
SearchRequest, SearchResponse = _made["SearchRequest"], _made["SearchResponse"]
SearchBatchRequest, SearchBatchResponse = _made["SearchBatchRequest"], _made["SearchBatchResponse"]
EmbedRequest, EmbedResponse = _made["EmbedRequest"], _made["EmbedResponse"]
IndexRequest, IndexResponse = _made["IndexRequest"], _made["IndexResponse"]
HealthRequest, HealthResponse = _made["HealthRequest"], _made["HealthResponse"]


def read(kind: type[M], data: bytes) -> M:
    """The message in `data`. Raises ApiError."""
    try:
        message: M = kind.FromString(data)
        return message
    except DecodeError as error:
        raise ApiError(400, "malformed_message", f"the body is no {kind.DESCRIPTOR.full_name}", "body") from error


def fields_of(message: Message) -> dict[str, Any]:
    """What is set in a message, as the same request in JSON has it. Raises ApiError for a filter that is none."""
    fields: dict[str, Any] = {}
    for field, value in message.ListFields():
        if field.message_type is not None:
            fields[field.name] = fields_of(value)
        elif field.name == "filter":
            fields[field.name] = filter_of(value)
        else:
            one = isinstance(value, str | bytes) or not isinstance(value, Sequence)
            fields[field.name] = value if one else list(value)
    return fields


def filter_of(text: str) -> Any:
    """The filter in a text, as JSON; None for an empty one. Raises ApiError."""
    if not text.strip():
        return None
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise ApiError(400, "malformed_json", f"filter is not JSON: {error}", "filter") from error


def batch_fields(data: bytes, dim: int) -> tuple[dict[str, Any], NDArray[np.float32] | None]:
    """The fields of a SearchBatchRequest, and its vectors `(N, D)` float32 if it has any. Raises ApiError."""
    fields = fields_of(read(SearchBatchRequest, data))
    vectors, given = fields.pop("vectors", None), fields.pop("dim", None)
    if vectors is None:
        return fields, None
    if given != dim:
        told = "say in dim how many numbers a vector has" if given is None else f"expected {dim} numbers, got {given}"
        raise ApiError(422, "invalid_request", told, "dim")
    if len(vectors) % (dim * _FLOAT.itemsize):
        told = f"{len(vectors):,} bytes are no whole number of vectors of {dim} float32"
        raise ApiError(422, "invalid_request", told, "vectors")
    return fields, np.frombuffer(vectors, _FLOAT).reshape(-1, dim)


def floats(values: NDArray[np.float32]) -> bytes:
    """Numbers as they are in a message: float32, little-endian."""
    return np.ascontiguousarray(values, _FLOAT).tobytes()


def numbers(data: bytes, dim: int | None = None) -> NDArray[np.float32]:
    """What `floats` wrote, `(n,)`, or with `dim` `(N, D)`; may be written to."""
    found = np.frombuffer(data, _FLOAT).astype(np.float32)
    return found if dim is None else found.reshape(-1, dim)


def index_answer(document: bytes) -> bytes:
    """The IndexResponse of what GET /v1/index says."""
    about = orjson.loads(document)
    named = IndexResponse.DESCRIPTOR.fields_by_name
    some = {name: value for name, value in about.items() if name in named}
    return bytes(IndexResponse(document=document.decode(), **some).SerializeToString())


def health_answer(document: bytes) -> bytes:
    """The HealthResponse of what GET /readyz says."""
    return bytes(HealthResponse(**orjson.loads(document)).SerializeToString())


def written(message: Message) -> Response:
    """A message as the answer to a call."""
    return Response(message.SerializeToString(), media_type=MESSAGE)
