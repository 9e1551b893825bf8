"""What a choice without labels would have cost, against figures worked out by hand."""

import math
from datetime import UTC, datetime
from typing import Any

import pytest

from rayemb.tune.label_free import choices
from rayemb.tune.results import SweepRecord


def sweep(rows: list[tuple[float, float, float]], *, mode: str = "max", states: str = "") -> SweepRecord:
    """Trials of (objective, rankme, uniformity); `states`: p for a pruned one."""
    trials: list[dict[str, Any]] = [
        {
            "id": str(number),
            "settings": {},
            "state": "pruned" if states[number : number + 1] == "p" else "finished",
            "metrics": {"val/recall@1": value, "val/rankme": rank, "val/uniformity": spread, "val/other": 0.0},
        }
        for number, (value, rank, spread) in enumerate(rows)
    ]
    return SweepRecord.model_validate(
        {
            "name": "s",
            "created": datetime(2026, 1, 31, tzinfo=UTC),
            "search": {},
            "objectives": [{"name": "val/recall@1", "mode": mode}],
            "searcher": "random",
            "scheduler": "none",
            "state": "finished",
            "trials": trials,
        }
    )


def test_regret_is_what_the_choice_loses_against_the_best() -> None:
    found = {c.metric: c for c in choices(sweep([(0.5, 10, -1.0), (0.7, 20, -2.0), (0.4, 15, -3.0)]))}
    assert (found["val/rankme"].trial, found["val/rankme"].regret) == ("1", 0.0)
    assert (found["val/uniformity"].trial, found["val/uniformity"].regret) == ("2", pytest.approx(0.3))
    assert found["val/rankme"].spearman == pytest.approx(0.5)
    assert "val/other" not in found


def test_an_objective_to_be_small_has_its_regret_the_other_way() -> None:
    found = {c.metric: c for c in choices(sweep([(0.5, 10, -1.0), (0.7, 20, -2.0)], mode="min"))}
    assert found["val/rankme"].regret == pytest.approx(0.2)
    assert found["val/rankme"].spearman == pytest.approx(-1)


def test_a_metric_that_tells_nothing_apart_is_not_lucky() -> None:
    (found,) = (c for c in choices(sweep([(0.9, 10, -1.0), (0.2, 10, -2.0)])) if c.metric == "val/rankme")
    assert found.regret == pytest.approx(0.7)
    assert math.isnan(found.spearman)


def test_trials_that_were_stopped_early_do_not_take_part() -> None:
    found = choices(sweep([(0.5, 10, -1.0), (0.7, 20, -2.0), (0.9, 99, -9.0)], states="..p"))
    assert {c.trial for c in found} == {"1"}
    assert choices(sweep([(0.5, 10, -1.0), (0.9, 99, -9.0)], states=".p")) == []


def test_a_named_metric_is_taken_as_it_is() -> None:
    (found,) = choices(sweep([(0.5, 10, -1.0), (0.7, 20, -2.0)]), ["val/other"])
    assert (found.metric, found.trial, found.regret) == ("val/other", "0", pytest.approx(0.2))
