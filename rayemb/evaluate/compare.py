"""Two reports of one suite: is the difference real? From the items that they kept, without the models.

Suffixes: S training seeds, B draws.
"""

import datetime
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import AwareDatetime, Field

from rayemb import storage
from rayemb.config import Config
from rayemb.evaluate.errors import EvaluateError
from rayemb.evaluate.gate import Place
from rayemb.evaluate.metrics import MetricError, holm_corrected
from rayemb.evaluate.metrics import compare as compare_values
from rayemb.evaluate.metrics.significance import Comparison as Tested
from rayemb.evaluate.page import environment, figure_text, signed_text
from rayemb.evaluate.plots import forest
from rayemb.evaluate.report import PAGE
from rayemb.evaluate.resample import ENOUGH, RESAMPLES
from rayemb.evaluate.suite_reports import check_suite, read_suite, same_items
from rayemb.evaluate.tasks import Items, TaskConfig

COMPARISON = "comparison.json"
LOWER = ("hole", "ece", "mce", "brier")
"""Metrics of which less is better, by the name before the cut-off."""

Verdict = Literal["better", "worse", "no difference shown"]


class Compared(Config):
    """One figure of A against that of B, on the same items."""

    task: str
    direction: str
    metric: str
    a: float = Field(description="mean over the seeds")
    b: float
    difference: float = Field(description="a - b")
    low: float = Field(description="of its interval")
    high: float
    p: float = Field(ge=0, le=1, description="two-sided, corrected for the number of figures (Holm)")
    p_alone: float = Field(ge=0, le=1, description="of this figure alone")
    detectable: float = Field(ge=0, description="the true difference that data like these would show in 80 % of cases")
    verdict: Verdict = Field(description="of A")
    test: Literal["sign flips", "bootstrap", "seeds and items"]
    items: int
    clusters: int = Field(description="of items that succeed or fail together")

    @property
    def path(self) -> str:
        """Its name, as in requirements."""
        return Place(self.task, self.direction, self.metric).path

    @property
    def said(self) -> str:
        """The verdict in words."""
        told = (
            f"{signed_text(self.difference)}, {signed_text(self.low)} to {signed_text(self.high)}, p {p_text(self.p)}"
        )
        if self.verdict == "no difference shown":
            return f"no difference shown in {self.path} ({told}); {figure_text(self.detectable)} would have been"
        return f"A is {self.verdict} in {self.path} ({told})"


class SuiteComparison(Config):
    """All figures of A against B."""

    format: Literal[1] = 1
    created: AwareDatetime
    a: tuple[str, ...] = Field(description="reports, one a training seed")
    b: tuple[str, ...]
    names: tuple[str, str] = Field(description="of the systems of the first pair")
    confidence: float
    figures: tuple[Compared, ...]
    notes: tuple[str, ...] = ()

    @property
    def summary(self) -> str:
        """One line."""
        found = [each.verdict for each in self.figures]
        better, worse, rest = (found.count(verdict) for verdict in ("better", "worse", "no difference shown"))
        return f"A is better in {better} and worse in {worse} of {len(found)} figures; no difference shown in {rest}"


def compare_reports(
    pairs: Sequence[tuple[str, str]],
    *,
    metrics: Sequence[str] = (),
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> SuiteComparison:
    """What is different between the models of reports A and B; several pairs: of several training seeds.

    Figures that are means over items are tested by sign flips of clusters (`metrics.significance`). Others (a rank
    correlation, an average precision, a V-measure) are computed anew of items drawn by cluster, the same for both
    sides: interval and p are those of the difference in its standard errors (Efron & Tibshirani, 1993). Several
    seeds: see `metrics.significance.compare`. The verdict asks both the interval and p, corrected for the number of
    figures (Holm, 1979). `metrics`: only these, by names as in requirements; fewer are corrected for less, so name
    them before you look.

    Raises EvaluateError where the reports are not of one suite, the same data and the same items, naming what differs;
    for a metric that none has.
    """
    if not pairs:
        raise EvaluateError("there is nothing to compare", where="compare", fix="name two reports")
    read = [(read_suite(a), read_suite(b)) for a, b in pairs]
    first = read[0][0]
    everything = [report for pair in read for report in pair]
    for other in everything[1:]:
        check_suite(first, other)
    tested: dict[Place, Tested] = {}
    means: dict[Place, tuple[float, float]] = {}
    kinds: dict[Place, Literal["sign flips", "bootstrap", "seeds and items"]] = {}
    notes = []
    settings: dict[str, Any] = {"confidence": confidence, "samples": samples, "seed": seed}
    offered = [Place(n, task.direction, metric) for n, task in first.suite.tasks.items() for metric in task.metrics]
    if unknown := [name for name in metrics if not any(name in place.names for place in offered)]:
        known = ", ".join(dict.fromkeys(place.metric for place in offered))
        raise EvaluateError(f"no figure is called {unknown[0]!r}", where="--metric", fix=f"there are: {known}")
    for name, task in first.suite.tasks.items():
        if missing := [report.uri for report in everything if report.system(name) is None]:
            notes.append(f"{name} is left out: no figure of it in {missing[0]}.")
            continue
        asked = [Place(name, task.direction, metric) for metric in task.metrics]
        asked = [place for place in asked if not metrics or set(metrics) & place.names]
        if not asked:
            continue
        sides = same_items(name, read)
        try:
            found = dict(_compared(task, [place.metric for place in asked], *sides, **settings))
        except MetricError as error:
            notes.append(f"{name} is left out: {error.what}.")
            continue
        additive = type(task).figures is TaskConfig.figures
        for place in asked:
            if place.metric not in found:
                notes.append(f"{place.path} is left out: too few draws of the items have a figure.")
                continue
            means[place], tested[place] = found[place.metric]
            kinds[place] = "seeds and items" if len(read) > 1 else "sign flips" if additive else "bootstrap"
    if not tested:
        raise EvaluateError("nothing can be compared: " + " ".join(notes), where="compare")
    figures = []
    corrected = holm_corrected({place.path: each for place, each in tested.items()})
    for at in tested:
        found_of = corrected[at.path]
        figures.append(
            Compared(
                task=at.split,
                direction=at.direction,
                metric=at.metric,
                a=means[at][0],
                b=means[at][1],
                difference=found_of.difference,
                low=found_of.low,
                high=found_of.high,
                p=found_of.p,
                p_alone=tested[at].p,
                detectable=found_of.detectable,
                verdict=found_of.verdict,
                test=kinds[at],
                items=found_of.queries,
                clusters=found_of.clusters,
            )
        )
    systems = [next(filter(None, map(report.system, report.suite.tasks)), "") for report in read[0]]
    return SuiteComparison(
        created=datetime.datetime.now(datetime.UTC),
        a=tuple(a.uri for a, _ in read),
        b=tuple(b.uri for _, b in read),
        names=(systems[0], systems[1]),
        confidence=confidence,
        figures=tuple(figures),
        notes=tuple(notes),
    )


def write_comparison(uri: str, comparison: SuiteComparison) -> str:
    """Writes `comparison.json` and then a page with a forest plot into the folder `uri`; gives the page's URI."""
    tasks = list(dict.fromkeys(each.task for each in comparison.figures))
    groups = [[each for each in comparison.figures if each.task == task] for task in tasks]
    ends = [end for each in comparison.figures for end in (each.low, each.high, 0.0)]
    templates = environment()
    templates.filters.update(figure=figure_text, signed=signed_text, p=p_text)
    page = templates.get_template("compare.html").render(
        comparison=comparison,
        data_file=COMPARISON,
        groups=groups,
        plots=[forest(group, f"forest{n}", (min(ends), max(ends))) for n, group in enumerate(groups)],
    )
    storage.write_json(storage.join(uri, COMPARISON), comparison.model_dump(mode="json"))
    target = storage.join(storage.normalise(uri), PAGE)
    storage.write_bytes(target, page.encode())
    return target


def p_text(value: float) -> str:
    """A p-value for people."""
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


# -- what is computed -----------------------------------------------------------------------------------------


def _compared(
    task: TaskConfig,
    metrics: Sequence[str],
    a: Sequence[Items],
    b: Sequence[Items],
    *,
    confidence: float,
    samples: int,
    seed: int,
) -> Iterator[tuple[str, tuple[tuple[float, float], Tested]]]:
    """Of each metric: the means of both sides, and the test. Raises MetricError where items have no spread."""
    figures = [[task.figures(items.columns) for items in side] for side in (a, b)]
    draws = None
    for metric in metrics:
        a_S, b_S = (np.array([found[metric] for found in side]) for side in figures)
        if not (np.isfinite(a_S).all() and np.isfinite(b_S).all()):
            continue
        higher = metric.partition("@")[0] not in LOWER
        if type(task).figures is TaskConfig.figures:
            a_SQ, b_SQ = (np.stack([items.columns[metric] for items in side]) for side in (a, b))
            tested = compare_values(
                a_SQ,
                b_SQ,
                a[0].clusters,
                seed=seed,
                confidence=confidence,
                samples=samples,
                higher_is_better=higher,
            )
        else:
            draws = draws or _draws(task, a, b, seed, min(samples, RESAMPLES))
            d_SB, clusters = draws[0][metric], draws[1]
            d_SB = d_SB[:, np.isfinite(d_SB).all(axis=0)]
            if d_SB.shape[1] < ENOUGH * min(samples, RESAMPLES):
                continue
            tested = by_draws(a_S - b_S, d_SB, len(a[0].ids), clusters, confidence, higher)
        yield metric, ((float(a_S.mean()), float(b_S.mean())), tested)


def _draws(
    task: TaskConfig, a: Sequence[Items], b: Sequence[Items], seed: int, samples: int
) -> tuple[dict[str, NDArray[np.float64]], int]:
    """The differences `(S, B)` of each metric in the same draws of clusters; NaN where a draw has no figure."""
    items = a[0]
    clusters = np.arange(len(items.ids)) if items.clusters is None else items.clusters
    _, member = np.unique(clusters, return_inverse=True)
    rows = np.split(np.argsort(member, kind="stable"), np.cumsum(np.bincount(member))[:-1])
    if len(rows) < 2:
        raise MetricError("one cluster alone has no spread", where="clusters")
    rng = np.random.default_rng(seed)
    found = {metric: np.full((len(a), samples), np.nan) for metric in task.metrics}
    for draw in range(samples):
        chosen = np.concatenate([rows[n] for n in rng.integers(0, len(rows), len(rows))])
        for s, pair in enumerate(zip(a, b, strict=True)):
            try:
                ours, theirs = (
                    task.figures({name: column[chosen] for name, column in each.columns.items()}) for each in pair
                )
            except MetricError:
                continue
            for metric in found:
                found[metric][s, draw] = ours[metric] - theirs[metric]
    return found, len(rows)


def by_draws(
    d_S: NDArray[np.float64],
    d_SB: NDArray[np.float64],
    items: int,
    clusters: int,
    confidence: float,
    higher_is_better: bool,
) -> Tested:
    """The test of a difference `(S,)`, a training seed each, by what it was in draws of the items `(S, B)`.

    The interval is the difference ± t · its error in the draws, not their quantiles: items that are drawn twice make
    clusters purer, and the draws of a V-measure lie beside its value (0.205, and quantiles of 0.216 to 0.284, of 365
    texts in 13 classes). Several seeds: the variances of items and seeds crossed (as `metrics.significance` has them:
    items + seeds - both), with Satterthwaite's degrees of freedom. The verdict is left open: it is the correction's.
    """
    from scipy import stats  # half a second, and only here

    mean, many = float(d_S.mean()), len(d_S)
    by_item = float(d_SB.mean(axis=0).var(ddof=1))
    variance, freedom = by_item, float(clusters - 1)
    if many > 1:
        by_seed = float(d_S.var(ddof=1)) / many
        both = float((d_SB - d_SB.mean(axis=0)).var(axis=1, ddof=1).sum()) / (many * (many - 1))
        variance = max(by_item + by_seed - both, by_item, by_seed)
        parts = ((by_item, clusters - 1), (by_seed, many - 1), (both, (many - 1) * (clusters - 1)))
        weight = sum(part**2 / free for part, free in parts)
        freedom = max(variance**2 / weight if weight else freedom, min(clusters, many) - 1)
    error = variance**0.5
    p = float(2 * stats.t.sf(abs(mean) / error, freedom)) if error else float(mean == 0)
    tail = (1 - confidence) / 2
    low, high = mean + error * stats.t.ppf([tail, 1 - tail], freedom)
    detectable = float(stats.t.ppf([1 - tail, 0.8], freedom).sum() * error)
    return Tested(
        "no difference shown",
        mean,
        float(low),
        float(high),
        p,
        detectable,
        items,
        clusters,
        (many, many),
        confidence,
        higher_is_better,
    )
