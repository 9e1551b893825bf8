"""The plots of a sweep's page: what each setting does to what was measured, trial by trial."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from rayemb.evaluate.page import INK, MUTED, SYSTEMS, figure_text, new_figure, style, svg_of
from rayemb.tune.results import SweepRecord, TrialRecord

BEST, OTHER = SYSTEMS[2], SYSTEMS[0]
_MOST_LABELS = 6
_DECADES = 20


class Axis:
    """A setting or a metric on an axis: a linear or logarithmic scale of numbers, or places for categories."""

    def __init__(self, name: str, values: Sequence[Any], *, log: bool = False) -> None:
        self.name = name
        known = [value for value in values if value is not None]
        self.numeric = bool(known) and all(isinstance(v, int | float) and not isinstance(v, bool) for v in known)
        self.log = self.numeric and log and min(known) > 0
        self.categories = [] if self.numeric else sorted({_label(value) for value in known})
        self.low: float = min(known) if self.numeric else 0
        self.high: float = max(known) if self.numeric else max(len(self.categories) - 1, 0)

    def at(self, value: Any) -> float:
        """The number that stands for a value."""
        return float(value) if self.numeric else float(self.categories.index(_label(value)))

    def share(self, value: Any) -> float:
        """Where a value lies between the lowest, 0, and the highest, 1."""
        low, high, at = self.low, self.high, self.at(value)
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(at)
        return 0.5 if high == low else (at - low) / (high - low)

    def dress(self, axes: Any) -> None:
        """Gives the x axis of a plot its scale, ticks and name."""
        axes.set_xlabel(self.name, fontsize=8, color=MUTED, parse_math=False)
        if self.log:
            axes.set_xscale("log")
            _plain_ticks(axes)
        if self.categories:
            axes.set_xticks(range(len(self.categories)), [_cut(name) for name in self.categories], parse_math=False)


def parallel(record: SweepRecord) -> Markup:
    """Parallel coordinates: a line a trial over all settings, the first objective last; better ones are bolder."""
    shown = measured(record)
    goal = record.objectives[0]
    axes_of = [axis_of(record, key) for key in record.search]
    axes_of += [Axis(each.name, [t.metrics.get(each.name) for t in shown]) for each in record.objectives[::-1]]
    figure = new_figure(9.6, 3.4)
    axes = figure.subplots()
    axes.set_facecolor("none")
    axes.spines[:].set_visible(False)
    axes.set_ylim(-0.16, 1.1)
    axes.set_yticks([])
    order = sorted(shown, key=lambda trial: trial.metrics[goal.name], reverse=goal.mode == "min")
    for place, trial in enumerate(order):
        values = [trial.settings.get(axis.name, trial.metrics.get(axis.name)) for axis in axes_of]
        points = [(x, axis.share(v)) for x, (axis, v) in enumerate(zip(axes_of, values, strict=True)) if v is not None]
        best = trial.id in record.best
        strength = 1.0 if best else 0.15 + 0.6 * place / max(len(order) - 1, 1)
        look: dict[str, Any] = {"color": BEST if best else OTHER, "alpha": strength, "lw": 2.2 if best else 1.2}
        axes.plot(*zip(*points, strict=True), marker="o", ms=3, zorder=3 if best else 2, **look)
    for x, axis in enumerate(axes_of):
        axes.vlines(x, 0, 1, color=MUTED, lw=0.8, zorder=1)
        ends = [axis.categories[0], axis.categories[-1]] if axis.categories else [_tick(axis.low), _tick(axis.high)]
        if len(set(ends)) == 1:
            axes.text(x, 1.04, _cut(ends[0]), ha="center", fontsize=7.5, color=MUTED, parse_math=False)
        else:
            axes.text(x, 1.04, _cut(ends[1]), ha="center", fontsize=7.5, color=MUTED, parse_math=False)
            axes.text(x, -0.1, _cut(ends[0]), ha="center", fontsize=7.5, color=MUTED, parse_math=False)
    axes.set_xticks(range(len(axes_of)), [axis.name for axis in axes_of], parse_math=False)
    axes.tick_params(colors=INK, labelsize=8, length=0)
    axes.set_xlim(-0.3, len(axes_of) - 0.7)
    said = "; ".join(_told(trial, record) for trial in order[::-1][:_MOST_LABELS])
    return svg_of(figure, "parallel", f"Parallel coordinates of {len(order)} trials, best first: {said}.")


def against(record: SweepRecord, key: str, metric: str, name: str) -> Markup:
    """A metric over one setting; hollow: stopped early. `name` is unique on the page."""
    axis = axis_of(record, key)
    figure = new_figure(4.7, 2.7)
    axes = figure.subplots()
    style(axes, metric)
    shown = [t for t in record.trials if t.metrics.get(metric) is not None and t.settings.get(key) is not None]
    for trial in shown:
        best = trial.id in record.best
        edge = BEST if best else OTHER
        look: dict[str, Any] = {"mec": edge, "mfc": edge if trial.state == "finished" else "none"}
        look |= {"marker": "D" if best else "o", "ms": 6 if best else 5, "zorder": 4 if best else 3}
        axes.plot([axis.at(trial.settings[key])], [trial.metrics[metric]], ls="", **look)
    axis.dress(axes)
    pairs = sorted((axis.share(t.settings[key]), _label(t.settings[key]), t.metrics[metric]) for t in shown)
    told = ", ".join(f"{figure_text(value)} at {label}" for _, label, value in pairs)
    return svg_of(figure, name, f"{metric} over {key}: {told}.")


def curves(record: SweepRecord, metric: str, number: int) -> Markup:
    """A metric over steps, a line a trial; the best in bold."""
    figure = new_figure(9.6, 2.9)
    axes = figure.subplots()
    style(axes, metric)
    told = []
    for trial in sorted(record.trials, key=lambda trial: trial.id in record.best):
        points = [(point["step"], point[metric]) for point in trial.curve if point.get(metric) is not None]
        if not points:
            continue
        best = trial.id in record.best
        look: dict[str, Any] = {
            "color": BEST if best else OTHER,
            "alpha": 1.0 if best else 0.45,
            "lw": 2.0 if best else 1.0,
        }
        axes.plot(*zip(*points, strict=True), marker="o", ms=3 if len(points) > 1 else 4, **look)
        told.append(f"trial {trial.id} from {figure_text(points[0][1])} to {figure_text(points[-1][1])}")
    axes.set_xlabel("step", fontsize=8, color=MUTED)
    return svg_of(figure, f"curve{number}", f"Line chart of {metric} over steps: {'; '.join(told)}.")


def front(record: SweepRecord, number: int, x: str, y: str) -> Markup:
    """Two objectives against each other; the trials that none beats in all objectives are joined."""
    modes = {each.name: each.mode for each in record.objectives}
    shown = [t for t in record.trials if t.metrics.get(x) is not None and t.metrics.get(y) is not None]
    figure = new_figure(4.7, 3.0)
    axes = figure.subplots()
    style(axes, f"{y} over {x}")
    for trial in shown:
        best = trial.id in record.best
        colour = BEST if best else OTHER
        axes.plot(
            [trial.metrics[x]],
            [trial.metrics[y]],
            ls="",
            marker="D" if best else "o",
            ms=6 if best else 5,
            color=colour,
        )
        axes.annotate(
            trial.id,
            (trial.metrics[x], trial.metrics[y]),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=6.5,
            color=MUTED,
        )
    best_points = sorted((t.metrics[x], t.metrics[y]) for t in shown if t.id in record.best)
    if len(best_points) > 1 and len(record.objectives) == 2:
        axes.plot(*zip(*best_points, strict=True), color=BEST, lw=1.0, zorder=1, drawstyle="steps-post")
    better = {"max": "more is better", "min": "less is better"}
    axes.set_xlabel(f"{x}, {better[modes[x]]}", fontsize=8, color=MUTED, parse_math=False)
    axes.set_ylabel(better[modes[y]], fontsize=8, color=MUTED)
    told = "; ".join(f"{figure_text(a)} with {figure_text(b)}" for a, b in best_points)
    return svg_of(figure, f"front{number}", f"{y} over {x}; on the front: {told}.")


def measured(record: SweepRecord) -> list[TrialRecord]:
    """The trials that have a figure for every objective."""
    return [t for t in record.trials if all(t.metrics.get(each.name) is not None for each in record.objectives)]


def axis_of(record: SweepRecord, key: str) -> Axis:
    """The axis of a searched setting."""
    values = [trial.settings.get(key) for trial in record.trials]
    text = record.search.get(key, "")
    log = "loguniform" in text or "lograndint" in text
    if text.startswith(("grid_search", "choice")):
        # Numbers decades apart are meant on a logarithmic scale, too.
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool) and v > 0]
        log = bool(numbers) and max(numbers) >= _DECADES * min(numbers)
    return Axis(key, values, log=log)


def _told(trial: TrialRecord, record: SweepRecord) -> str:
    settings = ", ".join(f"{key} {_label(value)}" for key, value in trial.settings.items())
    figures = ", ".join(f"{each.name} {figure_text(trial.metrics[each.name])}" for each in record.objectives)
    return f"{settings}: {figures}"


def _label(value: Any) -> str:
    if isinstance(value, Mapping):
        return str(value.get("name", value))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _tick(value: float) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _cut(text: str) -> str:
    return text if len(text) <= 18 else text[:17] + "…"


def _plain_ticks(axes: Any) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def best_so_far(record: SweepRecord) -> Markup | None:
    """The first objective of the best trial so far, over trials in the order in which they ended."""
    goal = record.objectives[0]
    values = [t.metrics[goal.name] for t in measured(record)]
    if len(values) < 2:
        return None
    running = np.maximum.accumulate(values) if goal.mode == "max" else np.minimum.accumulate(values)
    figure = new_figure(4.7, 2.7)
    axes = figure.subplots()
    style(axes, f"best {goal.name} so far")
    at = np.arange(1, len(values) + 1)
    axes.plot(at, values, ls="", marker="o", ms=4, color=OTHER)
    axes.plot(at, running, color=BEST, lw=1.8, drawstyle="steps-post")
    axes.set_xlabel("trials", fontsize=8, color=MUTED)
    return svg_of(
        figure,
        "sofar",
        f"Best {goal.name} after 1 trial {figure_text(running[0])}, at the end {figure_text(running[-1])}.",
    )
