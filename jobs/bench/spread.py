"""Batches between gateways, embedder and shards against a call for each query, over HTTP (topology `spread`).

    .venv/bin/python jobs/bench/spread.py                                    # a private cluster: 3 minutes
    python cluster/local.py --nodes 3 --cpus 8 -- python jobs/bench/spread.py    # shards on several Ray nodes

Three applications on one cluster, asked in turn, in rounds: one that does nothing (the floor of Serve's proxy), the
naive graph (every query is a call to the embedder and one to each shard) and rayemb's. One replica of each part, tiny
model, texts in, ten hits with payloads out. CPU is that of Serve's processes, the proxy's included. Prints a section of
Markdown.
"""

import argparse
import asyncio
import contextlib
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import aiohttp
import lance
import numpy as np
import psutil
import pyarrow as pa
from faiss.contrib.datasets import SyntheticDataset
from ray import serve
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.schema import LoggingConfig
from starlette.requests import Request
from starlette.responses import Response

from rayemb.cluster import ClusterConfig, connect
from rayemb.data.embeddings import ID, VECTOR, embeddings_schema
from rayemb.index import IndexConfig, build_index
from rayemb.models import ConvNetConfig, Model, TextTokenizer, TextTransformerConfig, TokenizerConfig, TwoTowerConfig
from rayemb.serve.config import ServeConfig, SpreadConfig
from rayemb.serve.deploy import application, cluster_environment

DIM, WORDS = 128, [f"{a}{b}{c}" for a in "kstpm" for b in "aeiou" for c in "lrnd"]
CLIENTS = (1, 8, 32)
CONFIGS = {
    "naive": SpreadConfig(call_queries=1, hedge=0),
    "batched": SpreadConfig(),
}


class Noop:
    """Answers, and does nothing else."""

    async def __call__(self, request: Request) -> Response:
        """An answer of the usual size."""
        await request.body()
        return Response(b"x" * 1500)


@dataclass
class Phase:
    """What some clients got in some seconds."""

    qps: float
    p50_ms: float
    p99_ms: float
    cpu_ms: float
    failed: int


def texts(count: int, seed: int) -> list[str]:
    """Queries of a few words."""
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(WORDS, random.integers(1, 6))) for _ in range(count)]


def world(folder: str, rows: int, shards: int) -> tuple[str, str]:
    """An untrained model, and an index over synthetic vectors as if it had made them."""
    tokens = TokenizerConfig(vocab_size=512, max_length=16)
    config = TwoTowerConfig(
        dim=DIM,
        image=ConvNetConfig(image_size=32, widths=(16, 32), depths=(1, 1)),
        text=TextTransformerConfig(width=64, depth=2, heads=2),
        tokenizer=tokens,
    )
    model = Model.create(config, TextTokenizer.train(texts(1000, 1), tokens), 0)
    model.save(f"{folder}/model")
    x = SyntheticDataset(DIM, 0, rows, 0).get_database()
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    schema = embeddings_schema([pa.field("text", pa.string())], DIM, str(model.digest), images=False)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), DIM)
    data = {ID: pa.array([f"id-{i}" for i in range(rows)]), VECTOR: vectors, "text": pa.array(texts(rows, 2))}
    lance.write_dataset(pa.table(data, schema=schema), f"{folder}/embeddings")
    index = IndexConfig(factory="IVF256,Flat", nprobe=8, shards=shards, recall_queries=0)
    build_index(f"{folder}/embeddings", f"{folder}/index", index)
    return f"{folder}/model", f"{folder}/index"


def cpu_s() -> float:
    """CPU time of the cluster's Serve processes so far."""
    own = psutil.Process()
    # Under `cluster/local.py` the nodes are its children.
    root = own.parent() if os.environ.get("RAY_ADDRESS") else own
    total = 0.0
    for process in (root or own).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            command = " ".join(process.cmdline())  # empty once it has ended
            if "Serve" in command or "Proxy" in command:
                total += process.cpu_times().user + process.cpu_times().system
    return total


async def phase(session: aiohttp.ClientSession, url: str, clients: int, seconds: float) -> Phase:
    """As many clients as told, each with one request after another."""
    took: list[float] = []
    failed = 0
    queries = texts(500, clients)
    until = time.perf_counter() + seconds

    async def client(number: int) -> None:
        nonlocal failed
        i = number
        while time.perf_counter() < until:
            begin = time.perf_counter()
            i += 1
            async with session.post(url, json={"text": queries[i % len(queries)], "k": 10}) as answer:
                body = await answer.read()
                failed += answer.status != 200 or b'"partial":true' in body
            took.append(time.perf_counter() - begin)

    before, begin = cpu_s(), time.perf_counter()
    await asyncio.gather(*map(client, range(clients)))
    wall, cpu = time.perf_counter() - begin, cpu_s() - before
    p50, p99 = np.percentile(took, [50, 99]) * 1000
    return Phase(len(took) / wall, float(p50), float(p99), cpu / len(took) * 1000, failed)


async def measure(port: int, rounds: int, seconds: float) -> dict[tuple[str, int], list[Phase]]:
    """All phases, interleaved."""
    base = f"http://127.0.0.1:{port}"
    paths = {"no-op": "/noop", **{name: f"/{name}/v1/search" for name in CONFIGS}}
    found: dict[tuple[str, int], list[Phase]] = {}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(60)) as session:
        for path in paths.values():
            await phase(session, base + path, 8, 2.0)  # first calls set up what later ones use
        for _ in range(rounds):
            for clients in CLIENTS:
                for name, path in paths.items():
                    found.setdefault((name, clients), []).append(await phase(session, base + path, clients, seconds))
    return found


def deploy(folder: str, rows: int, shards: int, port: int) -> None:
    """The three applications, running."""
    model, index = world(folder, rows, shards)
    options = HTTPOptions(host="127.0.0.1", port=port)
    quiet = LoggingConfig(enable_access_log=False, log_level="WARNING")
    serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=options, logging_config=quiet)
    noop: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0.1}, "max_ongoing_requests": 1000}
    targets = [serve.RunTarget(serve.deployment(Noop).options(**noop).bind(), "noop", "/noop", quiet)]
    for name, spread in CONFIGS.items():
        config = ServeConfig(topology="spread", spread=spread, num_cpus=0.2, max_ongoing_requests=64, open=True)
        targets.append(serve.RunTarget(application(model, index, config), name, f"/{name}", quiet))
    # It would make handles, for which the optimised settings want an event loop.
    serve.run_many(targets, wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)
    while (states := {app.status.value for app in serve.status().applications.values()}) != {"RUNNING"}:
        if "DEPLOY_FAILED" in states:
            sys.exit(str(serve.status()))
        time.sleep(0.5)


def report(found: dict[tuple[str, int], list[Phase]], shards: int, ingress: str) -> str:
    """The table: medians over the rounds."""
    lines = [
        "| clients | application | QPS | times naive | p50 ms | p99 ms | CPU ms a query | failed |",
        "|---|---|---|---|---|---|---|---|",
    ]
    median: dict[tuple[str, int], float] = {key: statistics.median(p.qps for p in each) for key, each in found.items()}
    for (name, clients), phases in sorted(found.items(), key=lambda item: item[0][1]):
        middle: dict[str, Any] = {
            field: statistics.median(getattr(p, field) for p in phases) for field in ("p50_ms", "p99_ms", "cpu_ms")
        }
        times = median[name, clients] / median["naive", clients]
        cells = [clients, name, f"{median[name, clients]:,.0f}", f"{times:.1f}", *(f"{v:.1f}" for v in middle.values())]
        lines.append("| " + " | ".join(map(str, [*cells, sum(p.failed for p in phases)])) + " |")
    return f"## Spread: one embedder, {shards} shards, behind {ingress}\n\n" + "\n".join(lines)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--haproxy", action="store_true", help="HAProxy as the ingress; it listens on every interface")
    arguments = parser.parse_args()
    env = cluster_environment(ServeConfig(host="0.0.0.0", open=True)) if arguments.haproxy else {}
    with tempfile.TemporaryDirectory() as folder, connect(ClusterConfig(num_cpus=8, object_store_mb=400), env):
        try:
            deploy(folder, arguments.rows, arguments.shards, arguments.port)
            found = asyncio.run(measure(arguments.port, arguments.rounds, arguments.seconds))
        finally:
            serve.shutdown()
    sys.stdout.write(report(found, arguments.shards, "HAProxy" if arguments.haproxy else "Serve's proxy") + "\n")


if __name__ == "__main__":
    main()
