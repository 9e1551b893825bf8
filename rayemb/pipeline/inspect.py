"""`rayemb data inspect`: what is in a corpus or a source, on the terminal and as one HTML page."""

import base64
import io
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rayemb import storage
from rayemb.data import Corpus
from rayemb.data.corpus import MANIFEST
from rayemb.models import ImageError, decode_image
from rayemb.pipeline.config import RunConfig
from rayemb.pipeline.survey import SAMPLE_ROWS, Histogram, Survey, survey_corpus, survey_source

SAMPLE = 5
THUMBNAIL = 160
TEXT_SHOWN = 300
BAR = 30
"""Longest bar on the terminal, in characters."""


def inspect(
    config: RunConfig,
    console: Console,
    *,
    source: bool = False,
    html: str | None = None,
    verify: bool = False,
    sample_rows: int = SAMPLE_ROWS,
) -> Survey:
    """Prints what the run's corpus holds, or a sample of its source; `html`: also written as a page to this URI.

    The source is looked at if `source` says so, or if there is no corpus yet and the config names a source. `verify`
    compares every shard with its checksum first, which reads all of them. Raises CorpusError, SourceError,
    StorageError.
    """
    with storage.environment(config.storage.environment()):
        uri = config.uri("corpus")
        built = storage.exists(storage.join(uri, MANIFEST))
        if source or (not built and "source" in config.corpus.model_fields_set):
            survey = survey_source(config.corpus, sample_rows=sample_rows, seed=config.corpus.seed)
        else:
            if verify:
                Corpus.open(uri).verify()
            survey = survey_corpus(uri, sample_rows=sample_rows)
            if verify:
                survey.facts["checksums"] = "every one right"
        show(survey, console)
        if html:
            storage.write_bytes(html, render(survey).encode())
            console.print(f"page {html}", markup=False)
    return survey


def show(survey: Survey, console: Console) -> None:
    """The survey on the terminal."""
    facts = ", ".join(f"{name} {value}" for name, value in survey.facts.items())
    console.print(_plain(survey.title))
    console.print(_plain(f"  {facts}; kind {survey.kind}"))
    console.print(_plain(f"  {survey.rows:,} rows; set aside {survey.bad_rows:,} ({_reasons(survey) or 'none'})"))
    console.print(_plain("  schema " + ", ".join(f"{name}: {kind}" for name, kind in survey.schema)))
    repeated = ", ".join(f"{each.what} {each.share:.2%} ({each.rows - each.distinct:,})" for each in survey.duplicates)
    console.print(_plain(f"  duplicates in {survey.duplicates_of}: {repeated}"))
    splits = Table("split", "rows", "files", "text length, median", "image size, median")
    for split in survey.splits:
        length = "" if split.text_length is None else f"{split.text_length:g}"
        splits.add_row(_plain(split.name), f"{split.rows:,}", str(split.files or ""), length, split.image_size)
    console.print(splits)
    console.print(_plain(f"lengths and sizes of a sample of {survey.sample_rows:,} rows"))
    for histogram in survey.histograms:
        span = f"{histogram.smallest:,} to {histogram.largest:,}"
        console.print(_plain(f"  {histogram.name}, {histogram.unit}: median {histogram.median:g}, {span}"))
        console.print(_bars(histogram))
    if survey.formats:
        formats = ", ".join(f"{name} {count:,}" for name, count in survey.formats.items())
        sizes = ", ".join(f"{name} ({count:,})" for name, count in survey.sizes)
        console.print(_plain(f"  formats {formats}; most frequent sizes {sizes}"))
    sample = Table("split", "id", "query" if survey.kind == "text_pair" else "image", "text", "captions", "concept")
    for row in survey.sample[:SAMPLE]:
        cells = (row["split"], row["id"], row["query"] or row["size"], row["text"])
        sample.add_row(*(_plain(cell, 80) for cell in cells), str(len(row["texts"] or [])), _plain(row["concept"]))
    console.print(sample)
    if survey.bad:
        bad = Table("reason", "where", "what")
        for row in survey.bad[:SAMPLE]:
            bad.add_row(*(_plain(row[name], 80) for name in ("reason", "source", "what")))
        console.print(bad)


def _reasons(survey: Survey) -> str:
    return ", ".join(f"{reason} {count:,}" for reason, count in survey.reasons.items())


def _bars(histogram: Histogram) -> Table:
    table = Table(box=None, show_header=False)
    for label, count in zip(_labels(histogram), histogram.counts, strict=True):
        table.add_row(label, "█" * round(count / max(histogram.counts) * BAR), f"{count:,}")
    return table


def _labels(histogram: Histogram) -> list[str]:
    ends = zip(histogram.edges, histogram.edges[1:], strict=False)
    return [f"{low:,}" if high - low <= 1 else f"{low:,}-{high - 1:,}" for low, high in ends]


def _short(text: str | None, length: int = TEXT_SHOWN) -> str:
    text = text or ""
    return text if len(text) <= length else text[: length - 1] + "…"


def _plain(text: str | None, length: int = 10_000) -> Text:
    """The text without what moves a terminal's cursor or turns its direction: rows are not to be trusted."""
    shown = _short(text, length).replace("\n", " ")
    return Text("".join(c if c.isprintable() or c == "\u200d" else "\ufffd" for c in shown))


# -- the page ------------------------------------------------------------------------------------------------


def render(survey: Survey) -> str:
    """One HTML document that needs no other file and no network; its size is bounded, whatever the rows hold."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(short=_short, picture=_picture)
    return environment.get_template("inspect.html").render(
        survey=survey, plots=[_plot(histogram) for histogram in survey.histograms]
    )


def _plot(histogram: Histogram) -> dict[str, Any]:
    """Bars as numbers: a template draws them."""
    highest, width = max(histogram.counts), 480 / len(histogram.counts)
    bars = [
        {"x": number * width, "width": width * 0.9, "height": count / highest * 100, "count": count, "label": label}
        for number, (count, label) in enumerate(zip(histogram.counts, _labels(histogram), strict=True))
    ]
    return {"histogram": histogram, "bars": bars}


def _picture(data: bytes | None) -> str:
    """A small copy as a data URI, without the file's metadata; empty where there is no picture."""
    if data is None:
        return ""
    try:
        image = decode_image(data)
    except ImageError:
        return ""
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    image.save(out, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()
