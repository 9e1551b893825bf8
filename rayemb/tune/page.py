"""The page of a sweep: what was tried, what came of it, what is best."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rayemb import storage
from rayemb.evaluate.page import environment, figure_text
from rayemb.tune.label_free import choices
from rayemb.tune.plots import against, best_so_far, curves, front, measured, parallel
from rayemb.tune.results import SweepRecord, TrialRecord

PAGE = "index.html"


def write_page(uri: str, record: SweepRecord, *, best_yaml: str = "", watch: Sequence[str] = ()) -> str:
    """Writes the page of the sweep into its folder `uri`; gives the page's URI.

    One file without scripts that needs no network. `best_yaml`: the best config, shown ready to be copied. `watch`:
    further metrics that are drawn over each setting, beside the objectives.
    """
    target = storage.join(uri, PAGE)
    storage.write_bytes(target, render(record, best_yaml=best_yaml, watch=watch).encode())
    return target


def render(record: SweepRecord, *, best_yaml: str = "", watch: Sequence[str] = ()) -> str:
    """The page: one HTML document."""
    shown = measured(record)
    goals = [each.name for each in record.objectives]
    reported = {name for trial in record.trials for name, value in trial.metrics.items() if value is not None}
    over = [name for name in dict.fromkeys([*goals, *watch]) if name in reported]
    searched = [key for key in record.search if any(trial.settings.get(key) is not None for trial in record.trials)]
    templates = environment(Path(__file__).parent)
    templates.globals.update(figure=figure_text, setting=_setting)
    pairs = [(goals[0], other) for other in goals[1:]]
    return templates.get_template("sweep.html").render(
        record=record,
        best=[trial for trial in record.trials if trial.id in record.best],
        counts=_counts(record),
        trials=_sorted(record),
        goals=goals,
        columns=[name for name in over if name not in goals],
        searched=list(record.search),
        parallel=parallel(record) if len(shown) > 1 else None,
        sofar=best_so_far(record),
        against={
            key: [against(record, key, name, f"against{row}-{number}") for number, name in enumerate(over)]
            for row, key in enumerate(searched)
        },
        curves=[curves(record, name, number) for number, name in enumerate(over) if _has_curve(record, name)],
        fronts=[front(record, number, other, first) for number, (first, other) in enumerate(pairs)] if shown else [],
        choices=choices(record),
        best_yaml=best_yaml,
    )


def _sorted(record: SweepRecord) -> list[TrialRecord]:
    """The best first, then by the first objective, those without a figure last."""
    goal = record.objectives[0]
    sign = -1.0 if goal.mode == "max" else 1.0

    def place(trial: TrialRecord) -> tuple[bool, bool, float]:
        value = trial.metrics.get(goal.name)
        return trial.id not in record.best, value is None, sign * (value or 0.0)

    return sorted(record.trials, key=place)


def _counts(record: SweepRecord) -> dict[str, int]:
    states = [trial.state for trial in record.trials]
    return {
        state: states.count(state)
        for state in ("finished", "pruned", "failed", "stopped", "running")
        if state in states
    }


def _has_curve(record: SweepRecord, metric: str) -> bool:
    return any(point.get(metric) is not None for trial in record.trials for point in trial.curve)


def _setting(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
