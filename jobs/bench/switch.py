"""Changing the live version under load: failed requests, mixed answers, what it does to latency and memory.

    .venv/bin/python jobs/bench/switch.py                        # 20,000 rows, 8 clients, 50 switches: 3 minutes
    .venv/bin/python jobs/bench/switch.py --rows 100000 --clients 8

Two versions of one collection, of two models with their own indexes, behind a real server (uvicorn) whose gateway
follows a catalog on disk; clients in processes of their own ask without a pause, half of them single searches and half
batches, and hold every answer to the version that it names: ids, payloads, index version, model. Each switch is a
change of the catalog, after which the gateway opens, verifies and warms the other version beside the first. A switch is
timed from the change to the table's replacement. Latencies are of single searches: of the whole run, and of as long a
time without any switch. Memory is the server's resident set, after the first and after the last switch.
Prints a section of Markdown.
"""

import argparse
import multiprocessing
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty
from typing import Any

import httpx
import lance
import numpy as np
import psutil
import pyarrow as pa
import uvicorn

from rayemb.cluster import ClusterConfig, connect
from rayemb.data.embeddings import embeddings_schema
from rayemb.index import IndexConfig, build_index
from rayemb.models import Model, TextTokenizer, TextTransformerConfig, TokenizerConfig, TwoTowerConfig
from rayemb.serve.asgi import create_app
from rayemb.serve.config import ServeConfig
from rayemb.serve.versions import Catalog, CatalogStore, changes
from rayemb.serve.versions.follow import CatalogFollower

WORDS = ["red", "green", "blue", "circle", "square", "star", "ship", "heart", "cloud", "tree"]
DIM, K = 128, 10


def make_version(folder: Path, name: str, seed: int, rows: int) -> tuple[str, str]:
    """A model and its index; ids and payload say the version."""
    tokens = TokenizerConfig(vocab_size=512, max_length=16)
    config = TwoTowerConfig(
        dim=DIM,
        image=None,
        text=TextTransformerConfig(width=64, depth=2, heads=2),
        tokenizer=tokens,
    )
    model = Model.create(config, TextTokenizer.train(WORDS, tokens), seed)
    model.save(str(folder / f"model-{name}"))
    x = np.random.default_rng(seed).normal(size=(rows, DIM)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    schema = embeddings_schema([pa.field("of", pa.string())], DIM, str(model.digest), images=False)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), DIM)
    data = {"id": pa.array([f"{name}-{i}" for i in range(rows)]), "vector": vectors, "of": pa.array([name] * rows)}
    lance.write_dataset(pa.table(data, schema=schema), str(folder / f"table-{name}"))
    index = IndexConfig(factory=f"IVF{max(16, int(rows**0.5))},Flat", nprobe=16, shards=2, min_recall=0)
    build_index(str(folder / f"table-{name}"), str(folder / f"index-{name}"), index)
    return str(folder / f"model-{name}"), str(folder / f"index-{name}")


@dataclass
class Seen:
    """What one client saw."""

    answers: dict[str, int] = field(default_factory=dict)
    failed: int = 0
    mixed: int = 0
    ms: list[tuple[float, float]] = field(default_factory=list)
    problem: str = ""


def client(url: str, versions: dict[str, tuple[str, str]], number: int, ending: Any, told: Any) -> None:
    """Asks without a pause until `ending`."""
    seen = Seen()
    with httpx.Client(base_url=url, timeout=60) as http:
        while not ending.is_set():
            started = time.monotonic()
            try:
                name, whole = single(http, versions) if number % 2 else batch(http, versions)
            except (httpx.HTTPError, KeyError, ValueError) as error:
                seen.failed, seen.problem = seen.failed + 1, f"{type(error).__name__}: {error}"
                continue
            seen.answers[name] = seen.answers.get(name, 0) + 1
            seen.mixed += not whole
            if number % 2:
                seen.ms.append((started, (time.monotonic() - started) * 1000))
    told.put(seen)


def single(http: httpx.Client, versions: dict[str, tuple[str, str]]) -> tuple[str, bool]:
    """One search: the version it names, and whether all of it is of that version."""
    answer = http.post("/v1/search", json={"text": f"{WORDS[0]} {WORDS[5]}", "k": K})
    answer.raise_for_status()
    found = answer.json()
    name = found["version"]
    right = all(hit["id"].startswith(f"{name}-") and hit["payload"]["of"] == name for hit in found["hits"])
    return name, right and len(found["hits"]) == K and _named(found, versions)


def batch(http: httpx.Client, versions: dict[str, tuple[str, str]]) -> tuple[str, bool]:
    """As `single`, for eight texts at once."""
    body = {"texts": [f"{a} {b}" for a, b in zip(WORDS[:8], WORDS[2:], strict=False)], "k": K, "payload": True}
    answer = http.post("/v1/search/batch", json=body)
    answer.raise_for_status()
    found = answer.json()
    name = found["version"]
    ids = all(each.startswith(f"{name}-") for row in found["ids"] for each in row)
    payload = all(each["of"] == name for row in found["payload"] for each in row)
    return name, ids and payload and _named(found, versions)


def _named(found: dict[str, Any], versions: dict[str, tuple[str, str]]) -> bool:
    return (found["index_version"], found["model_digest"]) == versions[found["version"]]


def serve(config: ServeConfig) -> tuple[CatalogFollower, str]:
    """The gateway in this process, and where it listens."""
    follower = CatalogFollower(config)
    server = uvicorn.Server(uvicorn.Config(create_app(follower, config), host="127.0.0.1", port=0, log_level="warning"))
    threading.Thread(target=server.run, daemon=True).start()
    while not server.started:
        time.sleep(0.01)
    return follower, f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"


def measure(
    folder: Path, made: dict[str, tuple[str, str]], clients: int, switches: int, pause_s: float
) -> dict[str, Any]:
    """The figures of one run."""
    store = CatalogStore(str(folder / "catalog.json"))
    for name, (model, index) in made.items():
        changes.add(store, "default", model, index, name=name)
    changes.promote(store, "default", "a", force=True)
    entries = store.read().collections["default"].versions
    versions = {name: (entry.index_version, entry.model_digest) for name, entry in entries.items()}
    follower, url = serve(ServeConfig(catalog=store.uri, max_queued_requests=1024))
    context = multiprocessing.get_context("spawn")
    ending, told = context.Event(), context.Queue()
    asking = [context.Process(target=client, args=(url, versions, n, ending, told)) for n in range(clients)]
    for each in asking:
        each.start()
    time.sleep(10)  # the clients' own start
    memory, took = [], []
    began = time.monotonic()
    for number in range(switches):
        wanted = "ba"[number % 2]

        def point(catalog: Catalog, wanted: str = wanted) -> Catalog:
            found = catalog.collections["default"].model_copy(update={"live": wanted})
            return catalog.with_collection("default", found)

        started = time.monotonic()
        if not follower.look(store.update(point).revision, 120):
            raise SystemExit("a switch took more than two minutes")
        took.append(time.monotonic() - started)
        time.sleep(pause_s)
        memory.append(psutil.Process().memory_info().rss / 2**20)
    switched = time.monotonic()
    time.sleep(switched - began)  # as long again, without switches
    ending.set()
    seen = [_got(told) for _ in asking]
    for each in asking:
        each.join(30)
    ms = [pair for each in seen for pair in each.ms]
    return {
        "answers": sum(sum(each.answers.values()) for each in seen),
        "of b": sum(each.answers.get("b", 0) for each in seen),
        "failed": sum(each.failed for each in seen),
        "mixed": sum(each.mixed for each in seen),
        "problems": sorted({each.problem for each in seen if each.problem}),
        "took": np.array(took),
        "while": np.array([value for at, value in ms if began <= at < switched]),
        "without": np.array([value for at, value in ms if at >= switched]),
        "memory": memory,
    }


def _got(told: Any) -> Seen:
    try:
        seen: Seen = told.get(timeout=60)
    except Empty:
        raise SystemExit("a client did not end") from None
    return seen


def section(figures: dict[str, Any], rows: int, clients: int, switches: int) -> str:
    """The figures as Markdown."""
    took, memory = figures["took"], figures["memory"]
    lines = [
        "## Changing the version under load",
        "",
        f"`python {' '.join(sys.argv)}`: {rows:,} × {DIM} a version, IVF in 2 shards, {clients} clients, one gateway.",
        "",
        "| | |",
        "|---|---|",
        f"| switches | {switches} |",
        f"| answers, of them by the second version | {figures['answers']:,}, {figures['of b']:,} |",
        f"| failed requests | {figures['failed']} |",
        f"| answers that mix versions | {figures['mixed']} |",
        f"| a switch, from the change of the catalog: median, longest | {np.median(took):.2f} s, {took.max():.2f} s |",
    ]
    for name, told in (("while", "single search while switching"), ("without", "single search without switches")):
        p50, p95, p99 = np.percentile(figures[name], [50, 95, 99])
        lines.append(f"| {told}: p50, p95, p99 | {p50:.1f}, {p95:.1f}, {p99:.1f} ms ({len(figures[name]):,}) |")
    lines.append(
        f"| resident after switch 1, 10, {switches} | {_at(memory, 1)}, {_at(memory, 10)}, {_at(memory, switches)} |"
    )
    return "\n".join([*lines, *figures["problems"], ""])


def _at(memory: list[float], number: int) -> str:
    return f"{memory[min(number, len(memory)) - 1]:,.0f} MiB"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--switches", type=int, default=50)
    parser.add_argument("--pause", type=float, default=0.5, help="s between a switch and the next change")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        with connect(ClusterConfig(num_cpus=2)):  # for the builds alone
            seeds = {"a": 1, "b": 2}
            made = {name: make_version(Path(folder), name, seed, args.rows) for name, seed in seeds.items()}
        figures = measure(Path(folder), made, args.clients, args.switches, args.pause)
    print(section(figures, args.rows, args.clients, args.switches))


if __name__ == "__main__":
    main()
