"""`rayemb report`: what runs reported, side by side: last and best values, their settings, curves."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from markupsafe import Markup

from rayemb import storage
from rayemb.errors import RayembError
from rayemb.evaluate.page import MUTED, SYSTEMS, css, environment, figure_text, new_figure, style, svg_of
from rayemb.models.bundle import MANIFEST
from rayemb.train.sinks.base import figures, flat
from rayemb.train.sinks.jsonl import ABOUT, read_rows

HIGHER = re.compile(r"recall@|accuracy|spearman|pearson|per_second|^mfu$")
LOWER = re.compile(r"^loss$")
LINES = ("-", "--", ":", "-.")


class ReportError(RayembError):
    """A place where no run has reported anything."""


@dataclass(frozen=True)
class Value:
    """A metric of a run: its last value and its best one, where more or less of it is better."""

    last: float
    step: int
    best: float | None = None
    best_step: int | None = None


@dataclass(frozen=True)
class Record:
    """What one run reported."""

    name: str
    uri: str
    config: Mapping[str, Any]
    rows: Sequence[Mapping[str, Any]] = field(repr=False)

    def curve(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) of a metric where it was measured."""
        return [(row["step"], found[metric]) for row in self.rows if metric in (found := figures(row))]

    def value(self, metric: str) -> Value | None:
        """Its last and best value; None if it was never measured."""
        curve = self.curve(metric)
        if not curve:
            return None
        step, last = curve[-1]
        best = None
        if HIGHER.search(metric):
            best = max(curve, key=lambda point: point[1])
        elif LOWER.search(metric):
            best = min(curve, key=lambda point: point[1])
        return Value(last, step, best[1], best[0]) if best else Value(last, step)


@dataclass(frozen=True)
class Comparison:
    """Runs side by side."""

    runs: list[Record]

    @property
    def metrics(self) -> list[str]:
        """Names of all metrics: the loss, tasks, the rest."""
        names = {name for run in self.runs for row in run.rows for name in figures(row)}
        return sorted(names, key=lambda name: (name != "loss", name.startswith("time/"), "/" not in name, name))

    @property
    def differences(self) -> dict[str, list[str]]:
        """Keys of the config that differ, with each run's value; a key that a run lacks is empty there."""
        settings = [flat(run.config) for run in self.runs]
        keys = dict.fromkeys(key for found in settings for key in found)
        rows = {key: [found.get(key, "") for found in settings] for key in keys}
        return {key: values for key, values in rows.items() if len(set(values)) > 1}

    @property
    def document(self) -> dict[str, Any]:
        """For machines."""
        runs = []
        for run in self.runs:
            values = {name: asdict(value) for name in self.metrics if (value := run.value(name))}
            runs.append({"name": run.name, "uri": run.uri, "metrics": values})
        return {"format": 1, "runs": runs, "differences": self.differences}


def compare(uris: Sequence[str]) -> Comparison:
    """The runs at `uris`: folders of runs, folders that hold some, or model directories.

    Names are made distinct. Raises ReportError where there is none.
    """
    found = [record for uri in uris for record in _records(storage.normalise(uri))]
    names: dict[str, int] = {}
    distinct = []
    for record in found:
        names[record.name] = names.get(record.name, 0) + 1
        again = names[record.name]
        name = record.name if again == 1 else f"{record.name} ({again})"
        distinct.append(Record(name, record.uri, record.config, record.rows))
    return Comparison(distinct)


def _records(uri: str) -> list[Record]:
    if storage.exists(storage.join(uri, MANIFEST)):
        info = storage.read_json(storage.join(uri, MANIFEST))
        if not info.get("training"):
            raise ReportError("the model does not say how it was trained", where=uri, fix="name the run's folder")
        parts = uri.rstrip("/").split("/")
        return [Record("/".join(parts[-2:]), uri, info.get("config", {}), info["training"])]
    records = []
    for file in storage.list_files(uri, f"/{ABOUT}"):
        folder = file.removesuffix(f"/{ABOUT}")
        about, rows = storage.read_json(file), read_rows(folder)
        if rows:
            records.append(Record(about["name"], folder, about["config"], rows))
    if not records:
        raise ReportError("no run has reported anything here", where=uri, fix="name a run's folder or a model")
    return records


def write_page(uri: str, comparison: Comparison) -> str:
    """Writes one page with a curve of every metric, which needs no network, at `uri`; gives the URI."""
    plots = [_plot(comparison, metric, number) for number, metric in enumerate(comparison.metrics)]
    templates = environment(Path(__file__).parent)
    templates.globals.update(figure=figure_text)
    page = templates.get_template("runs.html").render(
        runs=comparison.runs,
        colours=[css(number) for number in range(len(comparison.runs))],
        values={name: [run.value(name) for run in comparison.runs] for name in comparison.metrics},
        differences=comparison.differences,
        plots=plots,
    )
    storage.write_bytes(uri, page.encode())
    return storage.normalise(uri)


def _plot(comparison: Comparison, metric: str, number: int) -> Markup:
    figure = new_figure(4.7, 2.4)
    axes = figure.subplots()
    style(axes, metric)
    said = []
    for place, run in enumerate(comparison.runs):
        curve = run.curve(metric)
        if not curve:
            continue
        look: dict[str, Any] = {"color": SYSTEMS[place % len(SYSTEMS)], "ls": LINES[place // len(SYSTEMS) % len(LINES)]}
        axes.plot(*zip(*curve, strict=True), lw=1.6, marker="o" if len(curve) < 12 else "", ms=3, **look)
        (first, start), (last, end) = curve[0], curve[-1]
        said.append(f"{run.name} from {figure_text(start)} at step {first} to {figure_text(end)} at step {last}")
    axes.set_xlabel("step", fontsize=8, color=MUTED)
    return svg_of(figure, f"metric{number}", f"Line chart of {metric}: {'; '.join(said)}.")
