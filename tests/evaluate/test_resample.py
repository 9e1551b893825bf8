"""Intervals of figures that are means and of those that are none; paired differences."""

from typing import Any

import numpy as np
import pytest

from rayemb.config import from_mapping
from rayemb.evaluate.errors import EvaluateError
from rayemb.evaluate.metrics import bootstrap_interval, correlation, paired_bootstrap
from rayemb.evaluate.resample import differences, estimates
from rayemb.evaluate.tasks import FewShotConfig, Items, STSConfig

MEAN = from_mapping(FewShotConfig, {"data": {"file": "x.jsonl"}})
STS = from_mapping(STSConfig, {"data": "x.jsonl"})


def items(clusters: Any = None, **columns: Any) -> Items:
    arrays = {name: np.asarray(column, np.float64) for name, column in columns.items()}
    return Items([str(n) for n in range(len(next(iter(arrays.values()))))], arrays, clusters)


def test_means_are_the_bootstrap_of_the_metrics() -> None:
    rng = np.random.default_rng(0)
    a, b, clusters = rng.random(50), rng.random(50), rng.integers(0, 12, 50)
    found = estimates(MEAN, items(clusters, accuracy=a), seed=4)["accuracy"]
    assert (found.value, found.low, found.high) == bootstrap_interval(a, clusters, seed=4)
    gain = differences(MEAN, items(clusters, accuracy=a), items(clusters, accuracy=b), seed=4)["accuracy"]
    assert (gain.value, gain.low, gain.high) == paired_bootstrap(a, b, clusters, seed=4)


def test_other_figures_are_computed_of_each_draw() -> None:
    rng = np.random.default_rng(1)
    score = rng.random(200)
    good, bad = score + 0.1 * rng.random(200), score + 2 * rng.random(200)
    a, b = items(similarity=good, score=score), items(similarity=bad, score=score)
    found = estimates(STS, a, seed=0)
    assert found["spearman"].value == correlation(good, score).spearman
    assert found["spearman"].low is not None
    assert found["spearman"].low < found["spearman"].value < found["spearman"].high  # type: ignore[operator]
    assert estimates(STS, a, seed=0) == found != estimates(STS, a, seed=1)
    gain = differences(STS, a, b, seed=0)["pearson"]
    assert gain.low is not None
    assert 0 < gain.low < gain.value
    # Paired: of a system and itself there is no difference in any draw, so no width either.
    assert differences(STS, a, a, seed=0)["pearson"].value == 0


def test_the_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    inside = 0
    for trial in range(100):
        x = rng.standard_normal(80)
        y = 0.6 * x + 0.8 * rng.standard_normal(80)  # a correlation of 0.6
        found = estimates(STS, items(similarity=y, score=x), seed=trial, samples=200)["pearson"]
        assert found.low is not None
        assert found.high is not None
        inside += found.low <= 0.6 <= found.high
    assert 88 <= inside <= 100


def test_draws_are_of_whole_clusters() -> None:
    rng = np.random.default_rng(3)
    x = np.repeat(rng.random(10), 20)
    y = np.repeat(rng.random(10), 20)
    clusters = np.repeat(np.arange(10), 20)
    wide = estimates(STS, items(clusters, similarity=x, score=y), seed=0)["pearson"]
    narrow = estimates(STS, items(similarity=x, score=y), seed=0)["pearson"]
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)  # type: ignore[operator]


def test_no_figure_is_no_entry_and_one_item_has_no_interval() -> None:
    assert estimates(STS, items(similarity=[1, 1, 1], score=[1, 2, 3]), seed=0) == {}
    lone = estimates(MEAN, items(accuracy=[0.5]), seed=0)["accuracy"]
    assert (lone.value, lone.low, lone.high) == (0.5, None, None)
    lone = differences(MEAN, items(accuracy=[0.5]), items(accuracy=[0.25]), seed=0)["accuracy"]
    assert (lone.value, lone.low) == (0.25, None)


def test_other_items_do_not_compare() -> None:
    a, b = items(accuracy=[1, 0]), items(accuracy=[1, 0])
    b.ids[1] = "z"
    with pytest.raises(EvaluateError, match="item 1 is '1' here and 'z' there"):
        differences(MEAN, a, b, seed=0)
    with pytest.raises(EvaluateError, match="their numbers differ"):
        differences(MEAN, items(accuracy=[1, 0, 1]), items(accuracy=[1, 0]), seed=0)
