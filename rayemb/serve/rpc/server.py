"""Who listens: a gRPC server of this process, or Serve's gRPC proxies, which hand the calls to the gateways."""

import ipaddress
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import unquote

import grpc
from grpc_reflection.v1alpha import reflection
from starlette.types import ASGIApp

from rayemb.serve.config import ServeConfig, is_loopback
from rayemb.serve.errors import ServeError
from rayemb.serve.rpc.bridge import METHODS, REQUEST_ID, Answer, call, refusal, within
from rayemb.serve.rpc.messages import SERVICE

# What `grpc_servicer_functions` of a Serve config names.
SERVICER = "rayemb.serve.rpc.server.add_servicer"
_GRACE_S = 5.0


@asynccontextmanager
async def listening(app: ASGIApp, config: ServeConfig) -> AsyncIterator[int]:
    """A gRPC server that asks `app`, on `config.host` and `config.grpc`, to the end of the block; gives its port.

    Raises ServeError if it cannot listen there.
    """
    server = grpc.aio.server(
        # As over HTTP more than the app admits, which refuses with more words.
        maximum_concurrent_rpcs=config.max_ongoing_requests + config.max_queued_requests + 64,
        options=[
            ("grpc.max_receive_message_length", config.max_body_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),  # else a port that is taken would be shared
        ],
    )
    server.add_generic_rpc_handlers((_Handler(partial(_answered, app)),))
    reflection.enable_server_reflection((SERVICE, reflection.SERVICE_NAME), server)
    port = _bound(server, config)
    await server.start()
    try:
        yield port
    finally:
        await server.stop(_GRACE_S)


def _bound(server: Any, config: ServeConfig) -> int:
    assert config.grpc is not None
    host = config.host or "::"
    shown = f"[{host}]" if ":" in host else host
    try:
        return int(server.add_insecure_port(f"{shown}:{config.grpc.port}"))
    except RuntimeError as error:
        raise ServeError(
            f"gRPC cannot listen on {host}, port {config.grpc.port}",
            where="serve.grpc.port",
            fix="choose another port, or 0 for any that is free",
        ) from error


async def _answered(app: ASGIApp, name: str, message: bytes, context: Any) -> bytes:
    found = await call(app, name, message, context.invocation_metadata(), context.time_remaining())
    return _tell(found, context)


def _tell(found: Answer, context: Any) -> bytes:
    """Tells code, details and metadata of an answer; the message."""
    context.set_trailing_metadata(list(found.trailing))  # Serve adds it to a list
    if found.code is not grpc.StatusCode.OK:
        context.set_code(found.code)
        context.set_details(found.details)
    return found.message


class _Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
    """The service's methods, by hand: messages stay bytes on their way in and out."""

    def __init__(self, answer: Callable[[str, bytes, Any], Any] | None) -> None:
        # By this name: Serve's proxy puts its own callables there.
        self._method_handlers: Mapping[str, Any] = {
            f"/{SERVICE}/{name}": grpc.unary_unary_rpc_method_handler(answer and partial(answer, name))
            for name in METHODS
        }

    def service(self, details: Any) -> Any:
        """The handler of a call."""
        return self._method_handlers.get(details.method)


class _Proxied(_Handler):
    """In Serve's proxy: what it hands on says how long the call has left, of which it keeps the time to itself."""

    def service(self, details: Any) -> Any:
        """The handler of a call."""
        found = super().service(details)
        return None if found is None else found._replace(unary_unary=partial(_timed, found.unary_unary))


async def _timed(hand_on: Callable[[bytes, Any], Any], message: bytes, context: Any) -> bytes:
    return bytes(await hand_on(message, _Timed(context)))


class _Timed:
    """The context of a call whose metadata has its deadline too."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def invocation_metadata(self) -> Any:
        """What came with the call."""
        return within(self._context.invocation_metadata(), self._context.time_remaining())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)


def add_servicer(servicer: Any, server: Any) -> None:
    """Adds the service to Serve's gRPC proxy; `servicer` is Serve's stand-in, which is not used."""
    server.add_generic_rpc_handlers((_Proxied(None),))


@dataclass(frozen=True)
class _Message:
    """Bytes with the one method that Serve asks of a message."""

    content: bytes

    def SerializeToString(self) -> bytes:
        """They."""
        return self.content


class Called:
    """What a deployment needs to be called by Serve's gRPC proxies: a method for each of the service's.

    Serve's proxies listen on every interface whatever they are told; where `config.host` is this machine's alone, calls
    of others are refused here.
    """

    _app: ASGIApp
    _config: ServeConfig

    async def Search(self, message: bytes, grpc_context: Any) -> Any:
        """As the .proto says."""
        return await self._called("Search", message, grpc_context)

    async def SearchBatch(self, message: bytes, grpc_context: Any) -> Any:
        """As the .proto says."""
        return await self._called("SearchBatch", message, grpc_context)

    async def Embed(self, message: bytes, grpc_context: Any) -> Any:
        """As the .proto says."""
        return await self._called("Embed", message, grpc_context)

    async def Index(self, message: bytes, grpc_context: Any) -> Any:
        """As the .proto says."""
        return await self._called("Index", message, grpc_context)

    async def Health(self, message: bytes, grpc_context: Any) -> Any:
        """As the .proto says."""
        return await self._called("Health", message, grpc_context)

    async def _called(self, name: str, message: bytes, context: Any) -> _Message:
        metadata = context.invocation_metadata()
        if is_loopback(self._config.host) and not is_local(context.peer()):
            told = "this service answers calls from its own machine only"
            found = refusal(403, {"type": "forbidden", "message": told}, dict(metadata).get(REQUEST_ID, ""))
        else:
            found = await call(self._app, name, message, metadata, None)
        # Not raised: what is raised Serve logs as the replica's failure.
        return _Message(_tell(found, context))


def is_local(peer: str) -> bool:
    """Whether gRPC's name of a peer, such as `ipv4:127.0.0.1:5000`, is of this machine."""
    kind, _, address = unquote(peer).partition(":")
    if kind not in ("ipv4", "ipv6"):
        return kind == "unix"
    try:
        host = ipaddress.ip_address(address.rpartition(":")[0].strip("[]"))
    except ValueError:
        return False
    return (getattr(host, "ipv4_mapped", None) or host).is_loopback
