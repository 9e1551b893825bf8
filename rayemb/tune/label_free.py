"""What choosing without labels would have cost: the trial that a label-free metric picks beside the best one.

RankMe (S066, Garrido et al., 2023) proposes such a choice; alignment and uniformity (Wang & Isola, 2020), LiDAR (Thilak
et al., 2023) and separability (S072) are others.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rayemb.evaluate.metrics import MetricError, correlation
from rayemb.tune.results import Mode, SweepRecord

LABEL_FREE: Mapping[str, Mode] = {
    "rankme": "max",
    "lidar": "max",
    "uniformity": "min",
    "alignment": "min",
    "separability": "max",
    "loss": "min",
}
"""Metrics that need no labels, by the last part of their names, and which end of them is held to be good."""


@dataclass(frozen=True)
class Choice:
    """What one metric would have chosen, in terms of the labelled objective."""

    metric: str
    mode: Mode
    trial: str
    value: float  # of the objective at the chosen trial
    regret: float  # in the objective's own unit, >= 0: what the choice loses against the best trial
    spearman: float  # between metric and objective over the trials, of the sign in which 1 is perfect; NaN: constant


def choices(record: SweepRecord, metrics: Sequence[str] | None = None) -> list[Choice]:
    """What each label-free metric that all trials have would have chosen; the least regret first.

    Only trials that ran to the end take part: one that was stopped early was stopped by the labels. `metrics`: these
    instead of those that are known as label-free (by the last part of their names). Empty where fewer than two trials
    ended, or none has such a metric.
    """
    goal = record.objectives[0]
    ended = [t for t in record.trials if t.state == "finished" and t.metrics.get(goal.name) is not None]
    if len(ended) < 2:
        return []
    sign = 1.0 if goal.mode == "max" else -1.0
    labelled = np.array([trial.metrics[goal.name] for trial in ended])
    best = (sign * labelled).max()
    found = []
    for name in metrics if metrics is not None else known(record):
        if any(trial.metrics.get(name) is None for trial in ended):
            continue
        mode = LABEL_FREE.get(name.rsplit("/", 1)[-1], "max")
        values = np.array([trial.metrics[name] for trial in ended]) * (1.0 if mode == "max" else -1.0)
        # Of equal ones the worst: a metric that tells nothing apart must not be lucky.
        at = min(np.flatnonzero(values == values.max()), key=lambda i: sign * labelled[i])
        value = float(labelled[at])
        found.append(
            Choice(name, mode, ended[at].id, value, float(best - sign * value), _spearman(values, sign * labelled))
        )
    return sorted(found, key=lambda choice: (choice.regret, choice.metric))


def known(record: SweepRecord) -> list[str]:
    """The label-free metrics that any trial has reported, by name."""
    names = {name for trial in record.trials for name in trial.metrics}
    goals = {each.name for each in record.objectives}
    return sorted(name for name in names - goals if name.rsplit("/", 1)[-1] in LABEL_FREE)


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    try:
        return correlation(a, b).spearman
    except MetricError:
        return float("nan")
