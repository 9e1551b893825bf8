"""The whole line in one go: corpus, training, report, embeddings, index, service, answers."""

import contextlib
import time
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from rayemb.cluster import connect
from rayemb.data import Corpus
from rayemb.data.corpus import read_row_group
from rayemb.pipeline.config import RunConfig
from rayemb.pipeline.display import Display
from rayemb.pipeline.stages import run_stage
from rayemb.serve import Client
from rayemb.serve.deploy import Server, start

TEXT_QUERY = "shopping cart"
SHOWN_HITS = 5


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
    with connect(config.cluster, config.storage.environment()):
        with display.stage("Start the service"):
            server = start(config.uri("model"), config.uri("index"), config.serve)
        with server:
            display.result(f"web page {server.url}/, API described at {server.url}/openapi.json", config.uri("index"))
            _wait()


def hits_table(title: str, hits: Any) -> Table:
    """Ranked answers as a table."""
    table = Table(title=title, title_justify="left")
    for name in ("rank", "score", "text", "style", "split", "id"):
        table.add_column(name, justify="right" if name in ("rank", "score") else "left")
    for rank, hit in enumerate(hits, 1):
        payload = hit.payload
        shown = [str(payload.get(name, "")) for name in ("text", "style", "split")]
        table.add_row(str(rank), f"{hit.score:.3f}", *shown, hit.id)
    return table


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
