"""The whole line in one go: corpus, training, report, embeddings, index, service, answers."""

import contextlib
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from rayemb.cluster import connect
from rayemb.data import Corpus
from rayemb.data.corpus import read_row_group
from rayemb.pipeline.config import RunConfig
from rayemb.pipeline.display import Display
from rayemb.pipeline.stages import run_stage
from rayemb.serve import Client, Hit
from rayemb.serve.deploy import Server, cluster_environment, start
from rayemb.serve.page import sniff

TEXT_QUERY = "shopping cart"
SHOWN_HITS = 5
# Payload columns that a table of hits has, if they are there; else the first so many.
_SHOWN = ("text", "style", "split")


@dataclass(frozen=True)
class DemoResult:
    """The figures of one demo."""

    seconds: float
    figures: dict[str, Any]


def run_demo(config: RunConfig, *, keep: bool = False, display: Display | None = None) -> DemoResult:
    """Runs every stage on one cluster, asks the service, and stops it (`keep`: on Ctrl-C).

    Stages whose artefacts are already there and match are not repeated.
    """
    display = display or Display()
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        with display.stage("Start Ray"):
            address = stack.enter_context(connect(config.cluster, config.storage.environment()))
        display.result(f"cluster at {address}")
        stages = ("corpus", "train", "evaluate", "embed", "index")
        figures = {name: run_stage(name, config, display).figures for name in stages}
        with display.stage("Start the service"):
            server = stack.enter_context(start(config.uri("model"), config.uri("index"), config.serve))
        figures["search"] = _ask(server, config, display)
        if keep:
            _last_line(figures, config, time.monotonic() - started, display)
            display.result(f"serving at {server.url} until Ctrl-C")
            _wait()
    seconds = time.monotonic() - started
    if not keep:
        _last_line(figures, config, seconds, display)
    return DemoResult(seconds, figures)


def serve_until_interrupted(config: RunConfig, display: Display | None = None) -> None:
    """The service of the run's index, until Ctrl-C."""
    display = display or Display()
    environment = config.storage.environment()
    if not (config.cluster.address or os.environ.get("RAY_ADDRESS")):
        # A cluster that runs already has chosen its proxy.
        environment = {**environment, **cluster_environment(config.serve)}
    with connect(config.cluster, environment):
        with display.stage("Start the service"):
            names = (None, None) if config.serve.catalog else (config.uri("model"), config.uri("index"))
            server = start(names[0], names[1], config.serve)
        with server:
            what = config.serve.catalog or config.uri("index")
            display.result(f"web page {server.url}/, API described at {server.url}/openapi.json", what)
            if server.grpc:
                display.result(f"gRPC at {server.grpc}, API described by `rayemb serve proto`")
            _wait()


def hits_table(title: str, hits: Sequence[Hit], pictures: Mapping[str, str] | None = None) -> Table:
    """Ranked answers as a table: three columns of the payload, and where the `pictures` of hits were saved, by id."""
    table = Table(title=title, title_justify="left")
    there = list(dict.fromkeys(name for hit in hits for name in hit.payload))
    shown = sorted(there, key=lambda name: _SHOWN.index(name) if name in _SHOWN else len(_SHOWN))[: len(_SHOWN)]
    for name in ("rank", "score", *shown, "id", *(["picture"] if pictures is not None else [])):
        table.add_column(name, justify="right" if name in ("rank", "score") else "left", overflow="fold")
    for rank, hit in enumerate(hits, 1):
        cells = [escape(str(hit.payload.get(name, ""))) for name in shown]
        path = [escape(pictures.get(hit.id, ""))] if pictures is not None else []
        table.add_row(str(rank), f"{hit.score:.3f}", *cells, escape(hit.id), *path)
    return table


def save_pictures(client: Client, hits: Sequence[Hit], folder: Path) -> dict[str, str]:
    """Saves the pictures of hits in a folder, as `01-NAME.png`; their paths by id."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for rank, hit in enumerate(hits, 1):
        if hit.image_url is None:
            continue
        data = client.image(hit.image_url)
        # An id may be anything: of it only what cannot be a path of its own.
        name = re.sub(r"[^A-Za-z0-9_-]+", "-", hit.id)[:80]
        path = folder / f"{rank:02d}-{name}.{sniff(data).rpartition('/')[2].replace('octet-stream', 'bin')}"
        path.write_bytes(data)
        paths[hit.id] = str(path)
    return paths


def _ask(server: Server, config: RunConfig, display: Display) -> dict[str, Any]:
    client = Client(server.url)
    text = client.search(text=TEXT_QUERY, k=SHOWN_HITS)
    display.console.print(hits_table(f'text query "{TEXT_QUERY}"', text.hits))
    name, image = _image_query(config)
    picture = client.search(image=image, k=SHOWN_HITS)
    display.console.print(hits_table(f"image query: {name}", picture.hits))
    display.result(f"web page: {server.url}/")
    return {
        "url": server.url,
        "index_version": text.index_version,
        "text": {"query": TEXT_QUERY, "hits": [hit.id for hit in text.hits]},
        "image": {"query": name, "hits": [hit.id for hit in picture.hits]},
    }


def _image_query(config: RunConfig) -> tuple[str, bytes]:
    """The first picture of a held-out split: an image that training never saw."""
    corpus = Corpus.open(config.uri("corpus"))
    split = next((name for name in config.evaluate.splits if name in corpus.splits), next(iter(corpus.splits)))
    row = read_row_group(corpus.row_groups(split)[0], ("id", "image", "text")).slice(0, 1).to_pylist()[0]
    return f"{row['id']} ({row['text']}), from split {split}", row["image"]


def _last_line(figures: dict[str, Any], config: RunConfig, seconds: float, display: Display) -> None:
    gain = figures["evaluate"]["headline"]
    recall = figures["index"].get("recall") or {}
    display.console.print(
        f"rayemb demo: {figures['corpus']['rows']:,} pairs; {gain}; index recall@{recall.get('k')} "
        f"{recall.get('recall', float('nan')):.3f}; {seconds:.0f} s. Artefacts in {config.workspace}: "
        f"corpus/ model/ report/index.html embeddings.lance/ index/",
        markup=False,
    )


def _wait() -> None:
    try:
        while True:
            time.sleep(3600)
    except KeyboardInterrupt:
        return
