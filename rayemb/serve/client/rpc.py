"""A client of the service over gRPC (`serve.grpc`): what `Client` gives, with messages instead of JSON and Arrow."""

import contextlib
import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import grpc
import numpy as np
import orjson
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RequestInfo, RetryInfo
from google.rpc.status_pb2 import Status
from numpy.typing import ArrayLike, NDArray

from rayemb.serve.api import IndexInfo, SearchResponse
from rayemb.serve.client import calls
from rayemb.serve.client.calls import BatchHits, Filter
from rayemb.serve.errors import ServeError
from rayemb.serve.rpc import messages
from rayemb.serve.rpc.bridge import COLLECTION, DETAILS

# What is not told by the service itself but by gRPC, or by a proxy in between.
_STATUSES = {
    grpc.StatusCode.UNAVAILABLE: 0,  # no answer
    grpc.StatusCode.RESOURCE_EXHAUSTED: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.UNIMPLEMENTED: 404,
}


class GrpcClient:
    """Asks a running service over gRPC. Threads may share one; it keeps its connection until `close`.

    Worth it for batches of vectors, and where HTTP is not at hand; the answers are `Client`'s. Writes, pictures and the
    catalog are `Client`'s alone.

    Args:
        address: where it answers, such as `127.0.0.1:9000`.
        timeout_s: how long a call may take with all its attempts, in s; the server is told, and gives up then too.
        key: the API key, if the service wants one.
        retries: how often a call is tried again that was refused for now or got no answer.
        collection: the one that is asked; default: the service's own.

    Every method raises ServeError with the server's own message, or if no server answers.
    """

    def __init__(
        self,
        address: str,
        timeout_s: float = 30.0,
        *,
        key: str | None = None,
        retries: int = 2,
        collection: str | None = None,
    ) -> None:
        self.address, self.timeout_s, self.retries = address, timeout_s, retries
        self._metadata = [(name.lower(), value) for name, value in calls.authorization(key).items()]
        if collection is not None:
            self._metadata.append((COLLECTION, collection))
        options = [("grpc.max_receive_message_length", -1), ("grpc.enable_retries", 0), ("grpc.enable_http_proxy", 0)]
        self._channel = grpc.insecure_channel(address, options)
        self._methods: dict[str, Any] = {}

    def search(
        self,
        text: str | None = None,
        image: bytes | str | Path | None = None,
        k: int = 10,
        filter: Filter | None = None,
        **more: Any,
    ) -> SearchResponse:
        """The k best items for a text, an image (encoded bytes, or the path of a file), or both.

        `more`: other fields of a SearchRequest, such as `recall`, `positive` or `group_by`.
        """
        if image is not None and not isinstance(image, bytes):
            image = Path(image).read_bytes()
        request = _message(messages.SearchRequest, text=text, image=image, k=k, filter=_json(filter), **more)
        answer = self._do("Search", request, messages.SearchResponse)
        hits = [_fields(hit) | {"payload": orjson.loads(hit.payload)} for hit in answer.hits]
        return SearchResponse.model_validate({**_fields(answer), "hits": hits})

    def search_batch(
        self,
        queries: Sequence[str] | ArrayLike,
        *,
        model: str | None = None,
        k: int = 10,
        filter: Filter | None = None,
        payload: bool = False,
        **more: Any,
    ) -> BatchHits:
        """The k best for each of several texts, or vectors `(N, D)` of the model with the digest `model`.

        `more`: other fields of a SearchBatchRequest, such as `recall`.
        """
        asked: dict[str, Any] = {"k": k, "filter": _json(filter), "payload": payload, **more}
        texts, x_ND = calls.vectors_or_texts(queries, model)
        if x_ND is None:
            asked["texts"] = texts
        else:
            asked |= {"vectors": messages.floats(x_ND), "dim": x_ND.shape[1], "model": model}
        request = _message(messages.SearchBatchRequest, **asked)
        answer = self._do("SearchBatch", request, messages.SearchBatchResponse)
        about = {name: value for name, value in _fields(answer).items() if name not in ("counts", "payload")}
        ends = np.cumsum(np.array(answer.counts, np.int64))[:-1]
        rows = [orjson.loads(row) for row in answer.payload] if payload else []
        return BatchHits(
            **about
            | {
                "ids": _parts(list(answer.ids), ends),
                "scores": np.split(messages.numbers(answer.scores), ends),
                "payload": _parts(rows, ends) if payload else None,
            }
        )

    def embed(self, texts: Sequence[str], *, kind: Literal["query", "document"] = "query") -> NDArray[np.float32]:
        """Unit vectors `(n, D)` float32 of `texts`; at most `index().max_batch` of them.

        `kind`: whether they look or are to be found, for models that embed the two unlike.
        """
        request = _message(messages.EmbedRequest, input=list(texts), input_type=kind)
        answer = self._do("Embed", request, messages.EmbedResponse)
        return messages.numbers(answer.vectors, answer.dim)

    def index(self) -> IndexInfo:
        """What is served."""
        answer = self._do("Index", messages.IndexRequest(), messages.IndexResponse)
        return IndexInfo.model_validate_json(answer.document)

    def close(self) -> None:
        """Closes the connection."""
        self._channel.close()

    def __enter__(self) -> "GrpcClient":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _do(self, name: str, request: Any, answer: Any) -> Any:
        method = self._methods.get(name)
        if method is None:
            method = self._methods[name] = self._channel.unary_unary(
                f"/{messages.SERVICE}/{name}", type(request).SerializeToString, answer.FromString
            )
        deadline, attempt = time.monotonic() + self.timeout_s, 0
        while True:
            left = max(0.001, deadline - time.monotonic())
            try:
                return method(request, timeout=left, metadata=self._metadata)
            except grpc.RpcError as error:
                problem, retry_after = self._refusal(error)
                wait = calls.wait_before(
                    attempt, self.retries, problem.status, retry_after, deadline - time.monotonic()
                )
                if wait is None:
                    raise problem from error
            time.sleep(wait)
            attempt += 1

    def _refusal(self, error: Any) -> tuple[ServeError, str]:
        """The server's own words as an error, and its Retry-After."""
        told = next((value for key, value in error.trailing_metadata() or () if key == DETAILS), None)
        status = _STATUSES.get(error.code(), 500)
        if told is None:
            if status == 0:
                return calls.unanswered(RuntimeError(error.details()), self.address), ""
            return ServeError(f"{error.code().name}: {error.details()}", where=self.address, status=status), ""
        whole = Status.FromString(told)
        message, field, request_id, retry_after = whole.message, "", "", ""
        for packed in whole.details:
            info, request, bad, retry = ErrorInfo(), RequestInfo(), BadRequest(), RetryInfo()
            if packed.Unpack(info):
                with contextlib.suppress(ValueError):
                    status = int(info.metadata["http_status"])
            elif packed.Unpack(request):
                request_id = request.request_id
            elif packed.Unpack(bad) and bad.field_violations:
                field, message = bad.field_violations[0].field, bad.field_violations[0].description
            elif packed.Unpack(retry):
                retry_after = str(retry.retry_delay.seconds)
        where = field or self.address
        return ServeError(message, where=where, status=status, field=field, request_id=request_id), retry_after


def _message(kind: Any, **fields: Any) -> Any:
    """A request of the fields that are not None. Raises ServeError for one that is none of its, or of another type."""
    try:
        return kind(**{name: value for name, value in fields.items() if value is not None})
    except (TypeError, ValueError) as error:
        raise ServeError(f"this is no {kind.DESCRIPTOR.name}: {error}", where="request") from error


def _fields(message: Any) -> dict[str, Any]:
    """Every field of an answer, those at their default too, without optional ones that are not set."""
    found: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        if field.has_presence and not message.HasField(field.name):
            continue
        value = getattr(message, field.name)
        if field.message_type is not None:
            found[field.name] = _fields(value) if field.has_presence else value
        else:
            found[field.name] = value if isinstance(value, str | bytes | int | float) else list(value)
    return found


def _parts(values: list[Any], ends: NDArray[np.int64]) -> list[list[Any]]:
    bounds = [0, *ends.tolist(), len(values)]
    return [values[start:stop] for start, stop in pairwise(bounds)]


def _json(filter: Filter | Mapping[str, Any] | None) -> str | None:
    return None if filter is None else calls.json_of(dict(filter)).decode()
