"""The service over gRPC and HTTP at once, in this process, on real sockets; and a client that is gRPC's own."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RequestInfo, RetryInfo
from google.rpc.status_pb2 import Status

from rayemb.serve.asgi import create_app
from rayemb.serve.config import GrpcConfig, ServeConfig
from rayemb.serve.local import LocalEngine
from rayemb.serve.rpc import messages
from tests.serve.live import listening


@dataclass(frozen=True)
class Both:
    """Where one app answers."""

    url: str
    address: str
    app: Any

    @contextlib.contextmanager
    def stub(self) -> Iterator["Stub"]:
        with grpc.insecure_channel(self.address) as channel:
            yield Stub(channel)


class Stub:
    """What protoc makes of the .proto, in short."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel

    def __call__(self, name: str, message: Any = None, **options: Any) -> Any:
        return self.method(name)(self._request(name) if message is None else message, **options)

    def method(self, name: str) -> Any:
        answer = getattr(messages, f"{name}Response")
        return self._channel.unary_unary(f"/{messages.SERVICE}/{name}", _bytes, answer.FromString)

    def refused(self, name: str, message: Any = None, **options: Any) -> "Refused":
        with pytest.raises(grpc.RpcError) as caught:
            self(name, message, **options)
        return Refused.of(caught.value)

    @staticmethod
    def _request(name: str) -> Any:
        return getattr(messages, f"{name}Request")()


@dataclass(frozen=True)
class Refused:
    """What a client can read of a refusal."""

    code: Any
    text: str
    status: int
    reason: str
    field: str
    request_id: str
    retry_s: int | None
    trailing: dict[str, Any]

    @classmethod
    def of(cls, error: Any) -> "Refused":
        trailing = dict(error.trailing_metadata() or ())
        told = Status.FromString(trailing.get("grpc-status-details-bin", b""))
        parts: dict[type, Any] = {}
        for kind in (ErrorInfo, RequestInfo, BadRequest, RetryInfo):
            for packed in told.details:
                found = kind()
                if packed.Unpack(found):
                    parts[kind] = found
        if told.details:
            assert (told.code, told.message) == (error.code().value[0], error.details())
            assert parts[ErrorInfo].domain == "rayemb"
        bad, info, retry = parts.get(BadRequest), parts.get(ErrorInfo), parts.get(RetryInfo)
        return cls(
            error.code(),
            error.details(),
            int(info.metadata["http_status"]) if info else 0,
            info.reason if info else "",
            bad.field_violations[0].field if bad else "",
            parts[RequestInfo].request_id if info else "",
            retry.retry_delay.seconds if retry else None,
            trailing,
        )


def _bytes(message: Any) -> bytes:
    return message if isinstance(message, bytes) else message.SerializeToString()


@contextlib.contextmanager
def serving(engine: Any, config: ServeConfig | None = None) -> Iterator[Both]:
    """An engine over both, to the end of the block."""
    config = (config or ServeConfig()).model_copy(update={"grpc": GrpcConfig(port=0)})
    app = create_app(engine, config)
    with listening(app) as url:
        yield Both(url, f"127.0.0.1:{app.state.grpc_port}", app)


@pytest.fixture(scope="module")
def both(local: LocalEngine, config: ServeConfig) -> Iterator[Both]:
    with serving(local, config) as both:
        yield both


@pytest.fixture(scope="module")
def stub(both: Both) -> Iterator[Stub]:
    with both.stub() as stub:
        yield stub
