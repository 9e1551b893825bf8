"""The report artefact: `metrics.json` with every figure, and one page that shows them without a network.

`Report` is the contract. `write_report` renders it: plots (`rayemb.evaluate.plots`) as inline SVG that follows the
page's light or dark colours, pictures as data URIs, all text from the data escaped.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from markupsafe import Markup
from pydantic import AwareDatetime, Field, model_validator

from rayemb import storage
from rayemb.config import Config, ConfigError, from_mapping
from rayemb.evaluate.errors import EvaluateError
from rayemb.evaluate.page import SYSTEMS, css, environment, figure_text, signed_text
from rayemb.evaluate.plots import (
    LOOKS,
    Budget,
    ConfusionTable,
    CurvePlot,
    SimilarityPlot,
    SpaceView,
    bars,
    confusion_table,
    curve_plot,
    picture,
    similarity_plot,
    space_view,
    training_plot,
)

METRICS, PAGE = "metrics.json", "index.html"

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
        if not all(0 <= at <= 1 for at in (*self.x, *self.y)):
            raise ValueError("a point lies outside the unit square")
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
        if list(self.edges) != sorted(set(self.edges)) or min(*self.positives, *self.negatives) < 0:
            raise ValueError("edges ascend, and counts are not negative")
        return self


class Curve(Config):
    """A metric over its cut-off, a line a system."""

    metric: str = Field(description='"recall", "ndcg"')
    ks: tuple[int, ...] = Field(min_length=1, description="cut-offs, ascending")
    systems: dict[str, tuple[float, ...]] = Field(min_length=1)

    @model_validator(mode="after")
    def _a_value_a_cutoff(self) -> "Curve":
        if wrong := [name for name, values in self.systems.items() if len(values) != len(self.ks)]:
            raise ValueError(f"{wrong[0]!r} has {len(self.systems[wrong[0]])} values for {len(self.ks)} cut-offs")
        if list(self.ks) != sorted(set(self.ks)):
            raise ValueError("cut-offs ascend")
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
        if not all(0 <= share <= 1 for row in self.shares for share in row):
            raise ValueError("shares lie between 0 and 1")
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
    rank: int | None = Field(None, ge=1, description="1-based rank of the best relevant candidate, where it was found")
    worst: bool = Field(False, description="one of those on which the model does worst; so is whatever has a rank")
    hits: tuple[Hit, ...]
    wanted: Hit | None = Field(None, description="the best relevant candidate, where it is not among the hits")


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
    templates.filters.update(figure=figure_text, signed=signed_text, picture=picture)
    templates.globals.update(figure=figure_text, signed=signed_text)
    points = report.training
    shown = np.unique(np.linspace(0, len(points) - 1, min(len(points), 20)).round().astype(int))
    budget = Budget()
    return templates.get_template("report.html").render(
        report=report,
        metrics_file=METRICS,
        training_plot=training_plot(points) if points else None,
        training_rows=[points[i] for i in shown],
        views=[_View.of(result, number, budget) for number, result in enumerate(report.results)],
        worst=[each for each in report.examples if each.worst or each.rank is not None],
        others=[each for each in report.examples if not each.worst and each.rank is None],
        markers=[css(number) for number in range(len(SYSTEMS))],
        looks=LOOKS,
    )


class _View(NamedTuple):
    """What the page shows of one split or task."""

    bars: Markup
    space: SpaceView | None
    similarities: SimilarityPlot | None
    curves: list[CurvePlot]
    confusion: ConfusionTable | None
    diagnostics: list[str]  # names of the rows

    @classmethod
    def of(cls, result: SplitResult, number: int, budget: Budget) -> "_View":
        systems = [each.system for each in result.directions[0].systems]
        return cls(
            bars(result, number),
            space_view(result.space, budget) if result.space else None,
            similarity_plot(result.similarities, f"similarities{number}") if result.similarities else None,
            [curve_plot(curve, f"curve{number}-{at}", systems) for at, curve in enumerate(result.curves)],
            confusion_table(result.confusion) if result.confusion else None,
            list(dict.fromkeys(name for found in result.diagnostics.values() for name in found)),
        )
