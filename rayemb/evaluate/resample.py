"""Intervals of any figure of a task, and of the paired difference of two systems: items are drawn again, by cluster.

Means over items go through `metrics.bootstrap` (Cameron, Gelbach & Miller, 2008). Figures that are no means (a rank
correlation, an average precision, a V-measure) are computed anew of each draw, by `TaskConfig.figures`.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.errors import EvaluateError
from rayemb.evaluate.metrics import MetricError, bootstrap_interval, paired_bootstrap
from rayemb.evaluate.report import Estimate
from rayemb.evaluate.tasks.base import Items, TaskConfig

RESAMPLES = 400
"""Draws at most of figures that are no means: each is computed whole, which takes up to 10 ms."""
ENOUGH = 0.9
"""Of the draws: where fewer have a figure (a constant side, one class alone), there is no interval."""


def estimates(
    config: TaskConfig, items: Items, *, seed: int, confidence: float = 0.95, samples: int = 2000
) -> dict[str, Estimate]:
    """The figures of `config.metrics` with their intervals; without where one cluster alone has no spread.

    A metric of which these items have no figure (a correlation with a constant) is missing. The same seed gives the
    same.
    """
    values = _finite(_figures(config, items.columns))
    if _are_means(config):
        return {
            name: _interval(
                bootstrap_interval, items.columns[name], items=items, seed=seed, confidence=confidence, samples=samples
            )
            for name in values
        }
    drawn = _drawn(config, (items,), seed, min(samples, RESAMPLES))[0]
    return {name: _with_ends(value, drawn[name], confidence) for name, value in values.items()}


def differences(
    config: TaskConfig, a: Items, b: Items, *, seed: int, confidence: float = 0.95, samples: int = 2000
) -> dict[str, Estimate]:
    """The figures of `a` minus those of `b` on the same items, drawn together; as `estimates`.

    Raises EvaluateError where the items are not the same.
    """
    if a.ids != b.ids:
        at = next((n for n, pair in enumerate(zip(a.ids, b.ids, strict=False)) if pair[0] != pair[1]), None)
        told = f"item {at} is {a.ids[at]!r} here and {b.ids[at]!r} there" if at is not None else "their numbers differ"
        raise EvaluateError(f"the two systems were asked different items: {told}", where="comparison")
    ours, theirs = (_finite(_figures(config, each.columns)) for each in (a, b))
    names = [name for name in ours if name in theirs]
    if _are_means(config):
        return {
            name: _interval(
                paired_bootstrap,
                a.columns[name],
                b.columns[name],
                items=a,
                seed=seed,
                confidence=confidence,
                samples=samples,
            )
            for name in names
        }
    drawn = _drawn(config, (a, b), seed, min(samples, RESAMPLES))
    return {name: _with_ends(ours[name] - theirs[name], drawn[0][name] - drawn[1][name], confidence) for name in names}


def _are_means(config: TaskConfig) -> bool:
    return type(config).figures is TaskConfig.figures


def _figures(config: TaskConfig, columns: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
    try:
        return config.figures(columns)
    except MetricError:
        return dict.fromkeys(config.metrics, math.nan)


def _finite(figures: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def _interval(bootstrap, *values: NDArray[np.float64], items: Items, **settings) -> Estimate:  # type: ignore[no-untyped-def]
    try:
        found = bootstrap(*values, items.clusters, **settings)
    except MetricError:
        clusters = items.clusters
        if len(values[0]) > 1 and (clusters is None or len(np.unique(clusters)) > 1):
            raise
        return Estimate(value=float(values[0].mean() - (values[1].mean() if len(values) > 1 else 0)))
    return Estimate(value=found.mean, low=found.low, high=found.high)


def _drawn(
    config: TaskConfig, systems: Sequence[Items], seed: int, samples: int
) -> list[dict[str, NDArray[np.float64]]]:
    """For each system, the figures `(S,)` of the same draws; NaN where a draw has none."""
    first = systems[0]
    clusters = np.arange(len(first.ids)) if first.clusters is None else np.asarray(first.clusters)
    _, member = np.unique(clusters, return_inverse=True)
    order = np.argsort(member, kind="stable")
    rows = np.split(order, np.cumsum(np.bincount(member))[:-1])
    rng = np.random.default_rng(seed)
    found = [{name: np.full(samples, np.nan) for name in config.metrics} for _ in systems]
    for draw in range(samples):
        chosen = np.concatenate([rows[n] for n in rng.integers(0, len(rows), len(rows))])
        for system, items in zip(found, systems, strict=True):
            figures = _figures(config, {name: column[chosen] for name, column in items.columns.items()})
            for name, value in figures.items():
                system[name][draw] = value
    return found


def _with_ends(value: float, drawn: NDArray[np.float64], confidence: float) -> Estimate:
    there = drawn[np.isfinite(drawn)]
    if len(there) < ENOUGH * len(drawn) or np.ptp(there) == 0:
        return Estimate(value=value)
    low, high = np.quantile(there, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Estimate(value=value, low=float(low), high=float(high))
