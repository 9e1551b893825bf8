"""The drop-and-why report: `metrics.json` with every figure, and one page with examples, kept beside the corpus."""

import base64
import datetime
import io
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rayemb import storage
from rayemb.curate.base import EDITS, Rows
from rayemb.curate.state import State
from rayemb.data import Corpus
from rayemb.models import ImageError, decode_image

REPORT, METRICS, PAGE = "_report", "metrics.json", "index.html"
BINS = 24
THUMBNAIL = 160  # longest side of a picture on the page, in pixels: twice the shown size, for dense screens
SHOWN = ("id", "text", "query")


def write_report(uri: str, curation: dict[str, Any], state: State, done: list[tuple[str, str, dict[str, Any]]]) -> str:
    """Writes `metrics.json` and then `index.html` into the folder `uri`; gives the page's URI.

    `done` are (label, folder, record) of each step. Reads the rows that stand as examples, and no others.
    """
    rows = _rows(state, done)
    steps = []
    for step, (_, _, record) in zip(curation["steps"], done, strict=True):
        examples = [
            _example(reason, example, rows) for reason, found in record["examples"].items() for example in found
        ]
        extra = {"seconds": record["seconds"], "histogram": _histogram(record["scores"]), "examples": examples}
        steps.append({**step, **extra})
    created = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    figures = {"format": 1, "created": created, **curation, "steps": steps}
    page = _page(figures)
    for step in steps:
        for example in step["examples"]:
            for shown in (example["row"], example["partner"]):
                if shown:
                    del shown["image"]
    storage.write_json(storage.join(uri, METRICS), figures)
    target = storage.join(uri, PAGE)
    storage.write_bytes(target, page.encode())
    return target


def _page(figures: dict[str, Any]) -> str:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(picture=_picture, count="{:,}".format, figure="{:.4g}".format)
    before, after = sum(figures["input"]["rows"].values()), sum(figures["rows"].values())
    return environment.get_template("report.html").render(
        report=figures, before=before, after=after, metrics_file=METRICS
    )


def _rows(state: State, done: list[tuple[str, str, dict[str, Any]]]) -> dict[tuple[str | None, int], dict[str, Any]]:
    """What is shown of the rows that stand as examples and of their partners, by corpus (None: this one) and row."""
    wanted: dict[str | None, set[int]] = {None: set()}
    for _, _, record in done:
        for examples in record["examples"].values():
            for example in examples:
                wanted[None].add(example["row"])
                if example["partner"] is not None:
                    wanted.setdefault(example["partner_corpus"], set()).add(example["partner"])
    found: dict[tuple[str | None, int], dict[str, Any]] = {}
    for uri, ordinals in wanted.items():
        corpus = state.corpus if uri is None else Corpus.open(uri)
        taken = Rows.of(corpus).take(ordinals, [*SHOWN, "image"])
        found.update({(uri, row): {**content, "row": row, "corpus": uri} for row, content in taken.items()})
    return found


def _example(
    reason: str, example: dict[str, Any], rows: dict[tuple[str | None, int], dict[str, Any]]
) -> dict[str, Any]:
    partner = None if example["partner"] is None else rows[example["partner_corpus"], example["partner"]]
    return {
        "reason": reason,
        **{name: example[name] for name in ("drop", "what", "score")},
        "row": dict(rows[None, example["row"]]),
        "partner": partner and dict(partner),
        "edits": {column: example[name] for column, name in EDITS.items() if example[name] is not None},
    }


def _histogram(scores: list[tuple[float, bool]]) -> dict[str, Any] | None:
    """Counts of the sampled scores in equal bins, kept and dropped apart; None where there are none."""
    if not scores:
        return None
    values, drop = np.array([score for score, _ in scores]), np.array([drop for _, drop in scores], bool)
    edges = np.histogram_bin_edges(values, BINS)
    kept, dropped = (np.histogram(part, edges)[0].tolist() for part in (values[~drop], values[drop]))
    return {"sampled": len(values), "edges": edges.tolist(), "kept": kept, "dropped": dropped}


def _picture(data: bytes) -> str:
    """A small copy as a data URI: bounded size, a format every browser reads, none of the file's metadata."""
    try:
        image = decode_image(data)
    except ImageError:
        return ""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    image.save(out, "WEBP", quality=90)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()
