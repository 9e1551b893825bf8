"""The report artefact: `metrics.json` with every figure, and one page that shows them without a network.

`Report` is the contract. `write_report` renders it: plots by matplotlib as inline SVG that follows the
page's light or dark colours, pictures as data URIs, all text from the data escaped.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from markupsafe import Markup
from pydantic import AwareDatetime, Field, model_validator

from rayemb import storage
from rayemb.config import Config, ConfigError, from_mapping
from rayemb.evaluate.errors import EvaluateError
from rayemb.evaluate.page import (
    BACK,
    HATCHES,
    INK,
    MUTED,
    SYSTEMS,
    css,
    environment,
    figure_text,
    new_figure,
    style,
    svg_of,
)
from rayemb.models.images import decode_image

METRICS, PAGE = "metrics.json", "index.html"
THUMBNAIL = 160
"""Longest side of a picture on the page, in pixels: twice the shown size, for dense screens."""

# -- the contract --------------------------------------------------------------------------------------------


class Estimate(Config):
    """A figure, with both ends of its confidence interval or neither (chance is exact)."""

    value: float
    low: float | None = None
    high: float | None = None

    @model_validator(mode="after")
    def _both_ends(self) -> "Estimate":
        if (self.low is None) != (self.high is None):
            raise ValueError("an interval has two ends: give low and high, or neither")
        if self.low is not None and self.high is not None and self.low > self.high:
            raise ValueError(f"the interval is upside down: {self.low} > {self.high}")
        return self


class SystemResult(Config):
    """What one system scores on the queries of one direction."""

    system: str = Field(description='"trained", "untrained", "chance"')
    metrics: dict[str, Estimate] = Field(min_length=1, description='"recall@1", ..., "mrr", in column order')


class Difference(Config):
    """Paired differences `system - baseline`, query by query."""

    system: str
    baseline: str
    metrics: dict[str, Estimate] = Field(min_length=1)


class DirectionResult(Config):
    """One direction of search on one split: all systems on the same queries and candidates."""

    direction: str = Field(description='"image→text", "text→image"')
    queries: int = Field(ge=0)
    candidates: int = Field(ge=0)
    systems: tuple[SystemResult, ...] = Field(min_length=1)
    difference: Difference | None = None

    @model_validator(mode="after")
    def _same_metrics(self) -> "DirectionResult":
        for other in self.systems:
            if list(other.metrics) != self.columns:
                raise ValueError(f"{other.system!r} has metrics {list(other.metrics)}, others {self.columns}")
        if self.difference and not set(self.difference.metrics) <= set(self.columns):
            raise ValueError(f"the difference has metrics {list(self.difference.metrics)}, not {self.columns}")
        return self

    @property
    def columns(self) -> list[str]:
        """Names of the metrics, in the order of the first system."""
        return list(self.systems[0].metrics)


class Space(Config):
    """A sample of the vectors, laid out in the plane; all lists in one order."""

    method: Literal["umap", "pca"]
    rows: int = Field(ge=1, description="vectors there are, of which these are a sample")
    x: tuple[float, ...] = Field(min_length=1, description="0 to 1")
    y: tuple[float, ...] = Field(description="0 to 1, of the same unit as x")
    labels: tuple[str, ...] = Field((), description="class of each point, which colours it; none: all alike")
    texts: tuple[str, ...] = Field((), description="shown on hover")
    images: tuple[bytes | None, ...] = Field((), exclude=True, repr=False, description="encoded; shown on hover")
    neighbours_kept: float | None = Field(None, ge=0, le=1, description="share of nearest neighbours that the map kept")

    @model_validator(mode="after")
    def _same_points(self) -> "Space":
        if {len(self.x)} != {len(self.y), *(len(each) for each in (self.labels, self.texts, self.images) if each)}:
            raise ValueError("its lists differ in length")
        return self


class Similarities(Config):
    """Histograms of the similarities of positives and of negatives, in the same bins."""

    edges: tuple[float, ...] = Field(min_length=2, description="of the bins, ascending")
    positives: tuple[int, ...] = Field(description="pairs in each bin")
    negatives: tuple[int, ...]

    @model_validator(mode="after")
    def _same_bins(self) -> "Similarities":
        if {len(self.edges) - 1} != {len(self.positives), len(self.negatives)}:
            raise ValueError("one count a bin, for positives and for negatives")
        return self


class Curve(Config):
    """A metric over its cut-off, a line a system."""

    metric: str = Field(description='"recall", "ndcg"')
    ks: tuple[int, ...] = Field(min_length=1)
    systems: dict[str, tuple[float, ...]] = Field(min_length=1)

    @model_validator(mode="after")
    def _a_value_a_cutoff(self) -> "Curve":
        if wrong := [name for name, values in self.systems.items() if len(values) != len(self.ks)]:
            raise ValueError(f"{wrong[0]!r} has {len(self.systems[wrong[0]])} values for {len(self.ks)} cut-offs")
        return self


class Confusion(Config):
    """Of which class the nearest neighbours of each class are: `shares[i][j]` of class i's are of class j."""

    labels: tuple[str, ...] = Field(min_length=1)
    shares: tuple[tuple[float, ...], ...]
    note: str = Field("", description="one sentence, where not all classes are shown")

    @model_validator(mode="after")
    def _square(self) -> "Confusion":
        if {len(self.labels)} != {len(self.shares), *map(len, self.shares)}:
            raise ValueError("a row and a column for each label")
        return self


class SplitResult(Config):
    """All directions on one held-out split, or one task of a suite."""

    split: str = Field(description='"zero_shot", "style_held_out", "zero_shot_style", or the name of a task')
    description: str = Field("", description="one sentence: what was held out")
    directions: tuple[DirectionResult, ...] = Field(min_length=1)
    space: Space | None = None
    similarities: Similarities | None = None
    curves: tuple[Curve, ...] = ()
    confusion: Confusion | None = None
    diagnostics: dict[str, dict[str, float]] = Field(default_factory=dict, description="system: diagnostic: figure")


class TrainingPoint(Config):
    """What the trainer recorded at one step."""

    step: int = Field(ge=0)
    loss: float
    temperature: float | None = None
    learning_rate: float | None = None
    seconds: float | None = Field(None, description="since the start of training")


class Hit(Config):
    """One retrieved candidate, best first: a picture, a text, or a picture with its caption."""

    caption: str = ""
    image: bytes | None = Field(None, exclude=True, repr=False, description="encoded; not in metrics.json")
    score: float
    relevant: bool


class Example(Config):
    """One query and what was found for it."""

    split: str
    direction: str
    text: str = Field("", description="the query, or the caption of the query picture")
    image: bytes | None = Field(None, exclude=True, repr=False, description="the query picture, encoded")
    rank: int | None = Field(None, ge=1, description="1-based rank of the best relevant candidate")
    hits: tuple[Hit, ...]


class Corpus(Config):
    """The data that was trained and evaluated on."""

    name: str
    uri: str
    rows: dict[str, int] = Field(default_factory=dict, description="rows per split")


class Report(Config):
    """Everything a report says. Non-finite numbers are refused: they have no place in JSON."""

    format: Literal[1] = 1
    title: str
    created: AwareDatetime
    model_digest: str
    corpus: Corpus
    facts: dict[str, str | int | float] = Field(default_factory=dict, description="further lines on its origin")
    config: str = Field("", description="the resolved config as YAML")
    training: tuple[TrainingPoint, ...] = ()
    confidence: float = Field(0.95, gt=0, lt=1, description="nominal coverage of the intervals")
    method: str = Field("", description="one sentence: how intervals and chance were computed")
    results: tuple[SplitResult, ...] = ()
    examples: tuple[Example, ...] = ()
    examples_note: str = Field("", description="one sentence: how the examples were chosen")
    notes: tuple[str, ...] = ()


# -- writing -------------------------------------------------------------------------------------------------


def write_report(uri: str, report: Report | Mapping[str, Any]) -> str:
    """Writes `metrics.json` and then `index.html` into the folder `uri`; gives the page's URI.

    Raises ConfigError naming every wrong key of a mapping (a non-finite number is one), ImageError for a
    picture that does not decode, StorageError where the folder cannot be written. Nothing is written unless
    both render.
    """
    if not isinstance(report, Report):
        report = from_mapping(Report, report, source="report")
    page = render(report)
    storage.write_json(storage.join(uri, METRICS), report.model_dump(mode="json"))
    target = storage.join(uri, PAGE)
    storage.write_bytes(target, page.encode())
    return target


def read_report(uri: str) -> Report:
    """The report in the folder `uri`, without its pictures. Raises EvaluateError where there is none, StorageError."""
    source = storage.join(storage.normalise(uri), METRICS)
    try:
        return from_mapping(Report, storage.read_json(source), source=source)
    except storage.MissingError as error:
        raise EvaluateError(
            "there is no report", where=source, fix="name the folder that an evaluation wrote"
        ) from error
    except (ConfigError, TypeError) as error:
        told = error.problems[0] if isinstance(error, ConfigError) else ("", "expected an object")
        raise EvaluateError(f"it is no report of this version ({': '.join(told)})", where=source) from error


def render(report: Report) -> str:
    """The page: one HTML document that needs no other file."""
    templates = environment()
    templates.filters.update(figure=figure_text, signed=_signed, picture=_picture)
    templates.globals.update(figure=figure_text, signed=_signed)
    points = report.training
    shown = np.unique(np.linspace(0, len(points) - 1, min(len(points), 20)).round().astype(int))
    return templates.get_template("report.html").render(
        report=report,
        metrics_file=METRICS,
        training_plot=_training_plot(points) if points else None,
        training_rows=[points[i] for i in shown],
        split_plots=[_split_plot(result, number) for number, result in enumerate(report.results)],
        markers=[css(number) for number in range(len(SYSTEMS))],
    )


def _signed(value: float) -> str:
    return ("+" if value > 0 else "−" if value < 0 else "±") + figure_text(abs(value))


def _picture(data: bytes) -> str:
    """A small copy as a data URI: bounded size, a format every browser reads, none of the file's metadata."""
    image = decode_image(data)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    image.save(out, "WEBP", quality=90)
    return "data:image/webp;base64," + base64.b64encode(out.getvalue()).decode()


# -- plots --------------------------------------------------------------------------------------------------


def _split_plot(result: SplitResult, number: int) -> Markup:
    """Bars of every metric and system with their intervals, one panel a direction."""
    figure = new_figure(9.6, 3.1, wspace=0.06)
    panels = figure.subplots(1, len(result.directions), sharey=True, squeeze=False)[0]
    top = 0.0
    for axes, part in zip(panels, result.directions, strict=True):
        style(axes, part.direction)
        width = 0.82 / len(part.systems)
        for row, system in enumerate(part.systems):
            at = np.arange(len(part.columns)) + (row - (len(part.systems) - 1) / 2) * width
            values = [system.metrics[name].value for name in part.columns]
            look = row % len(SYSTEMS)
            axes.bar(at, values, width * 0.9, color=SYSTEMS[look], hatch=HATCHES[look], edgecolor=BACK, lw=0)
            for x, name in zip(at, part.columns, strict=True):
                estimate = system.metrics[name]
                if estimate.low is not None:
                    axes.vlines(x, estimate.low, estimate.high, color=INK, lw=1.2)
                ceiling = max(estimate.value, estimate.high or 0.0)
                top = max(top, ceiling)
                axes.annotate(
                    _short(estimate.value),
                    (x, ceiling),
                    xytext=(0, 2),
                    textcoords="offset points",
                    ha="center",
                    fontsize=6.5,
                    color=MUTED,
                )
        axes.set_xticks(range(len(part.columns)), part.columns, parse_math=False)
        axes.tick_params(axis="x", length=0)
    panels[0].set_ylim(0, max(top * 1.12, 0.01))
    said = "; ".join(
        f"{part.direction}, {name}: "
        + ", ".join(f"{system.system} {figure_text(system.metrics[name].value)}" for system in part.systems)
        for part in result.directions
        for name in part.columns
    )
    return svg_of(figure, f"split{number}", f"Bar chart of split {result.split}. {said}.")


def _training_plot(points: Sequence[TrainingPoint]) -> Markup:
    """Loss over steps; beside it the temperature, where it was recorded."""
    steps = np.array([point.step for point in points])
    losses = np.array([point.loss for point in points])
    warm = [(point.step, point.temperature) for point in points if point.temperature is not None]
    figure = new_figure(9.6, 2.9, wspace=0.06)
    panels = figure.subplots(1, 2 if warm else 1, width_ratios=[2, 1] if warm else [1], squeeze=False)[0]
    style(panels[0], "loss")
    marker = "o" if len(points) == 1 else ""
    window = len(points) // 40
    if window > 1:
        panels[0].plot(steps, losses, color=SYSTEMS[0], lw=0.7, alpha=0.35)
        smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
        panels[0].plot(steps[window - 1 :], smooth, color=SYSTEMS[0], lw=1.8)
        panels[0].set_title(f"bold: mean of the last {window} records", loc="right", fontsize=7.5, color=MUTED)
    else:
        panels[0].plot(steps, losses, color=SYSTEMS[0], lw=1.8, marker=marker)
    if warm:
        style(panels[1], "temperature")
        panels[1].plot(*zip(*warm, strict=True), color=SYSTEMS[2], lw=1.8, marker=marker)
    for axes in panels:
        axes.set_xlabel("step", fontsize=8, color=MUTED)
    said = f"Loss from {figure_text(losses[0])} at step {steps[0]} to {figure_text(losses[-1])} at step {steps[-1]}."
    if warm:
        said += f" Temperature from {figure_text(warm[0][1])} to {figure_text(warm[-1][1])}."
    return svg_of(figure, "training", f"Line chart. {said}")


def _short(value: float) -> str:
    """For the tight space above a bar: `.82`, `1`, `.002`."""
    text = f"{value:.2f}" if value >= 0.095 or value == 0 else f"{value:.1g}"
    return "1" if text == "1.00" else "0" if float(text) == 0 else text.removeprefix("0")
