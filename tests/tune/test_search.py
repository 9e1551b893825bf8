"""Searchers: Ray Tune's and Optuna's real ones over conditional spaces, asked and told as Tune does it."""

import math
from pathlib import Path
from typing import Any

import pytest
from ray.tune.search import Searcher

from rayemb.tune import TuneConfig, parse_space
from rayemb.tune.bohb import config_space
from rayemb.tune.search import TPE, Draws

SPACE = parse_space(
    {
        "loss": {
            "choice": [
                {"name": "infonce", "temperature": "loguniform(0.01, 1)"},
                {"name": "siglip", "bias": "uniform(-10, 0)"},
            ]
        },
        "batch_size": "lograndint(8, 257)",
    }
)
GOAL = {"score": "max"}


def built(name: str, space: Any = SPACE, objectives: Any = None, seed: int = 0) -> Searcher:
    config = TuneConfig.model_validate({"searcher": name, "scheduler": "hyperband" if name == "bohb" else "asha"})
    return config.searcher.build(space, objectives or GOAL, seed)


def score(settings: dict[str, Any]) -> float:
    """Best at infonce, temperature 0.1, whatever the batch size."""
    if settings["loss.name"] != "infonce":
        return -1.0
    return -abs(math.log10(settings["loss.temperature"]) + 1)


def run(searcher: Searcher, trials: int, *, first: int = 0) -> list[dict[str, Any]]:
    found = []
    for number in range(first, first + trials):
        draw = searcher.suggest(f"t{number}")
        assert isinstance(draw, dict)
        settings = SPACE.settings(draw)
        assert all(type(value) in (int, float, str) for value in [*draw.values(), *settings.values()])
        found.append(settings)
        result = {"step": 10, "score": score(settings), "hyperband_info": {"budget": 3}, "training_iteration": 1}
        searcher.on_trial_result(f"t{number}", result)
        searcher.on_trial_complete(f"t{number}", {**result, "finished": True})
    return found


@pytest.mark.parametrize("name", ["random", "tpe", "bohb"])
def test_draws_are_of_the_space_with_its_conditions(name: str) -> None:
    for settings in run(built(name), 25):
        inner = {"loss.temperature"} if settings["loss.name"] == "infonce" else {"loss.bias"}
        assert settings.keys() == {"loss.name", "batch_size"} | inner
        assert 8 <= settings["batch_size"] <= 256
        assert 0.01 <= settings.get("loss.temperature", 0.1) <= 1


@pytest.mark.parametrize("name", ["tpe", "bohb"])
def test_a_model_finds_more_than_chance(name: str) -> None:
    found = [score(settings) for settings in run(built(name), 60)]
    late = sum(found[40:]) / 20
    by_chance = [score(settings) for settings in run(built("random", seed=1), 200)]
    assert late > sum(by_chance) / 200 + 0.3


@pytest.mark.parametrize("name", ["random", "tpe"])
def test_the_same_seed_draws_the_same(name: str) -> None:
    assert run(built(name, seed=3), 12) == run(built(name, seed=3), 12)
    assert run(built(name, seed=3), 12) != run(built(name, seed=4), 12)


@pytest.mark.parametrize("name", ["random", "tpe", "bohb"])
def test_a_restored_searcher_goes_on(name: str, tmp_path: Path) -> None:
    before, after = built(name), built(name)
    first = run(before, 8)
    before.save(str(tmp_path / "state"))
    after.restore(str(tmp_path / "state"))
    rest = run(after, 6, first=8)
    assert not any(settings in first for settings in rest)
    if name == "random":
        assert first + rest == run(built(name), 14)


def test_what_is_written_as_grid_search_is_walked_through_in_turn() -> None:
    space = parse_space({"steps": "grid_search([10, 20, 30])", "loss.margin": "uniform(0, 1)"})
    drawn = [space.settings(built("random", space).suggest("t")) for _ in range(1)]
    searcher = Draws(space, 0)
    drawn = [space.settings(searcher.suggest(f"t{number}")) for number in range(7)]
    assert [settings["steps"] for settings in drawn] == [10, 20, 30, 10, 20, 30, 10]
    assert len({settings["loss.margin"] for settings in drawn}) == 7


def test_a_grid_comes_to_its_end() -> None:
    space = parse_space({"steps": "choice([10, 20])", "batch_size": "grid_search([8, 16, 32])"})
    searcher = built("grid", space)
    drawn = [space.settings(searcher.suggest(f"t{number}")) for number in range(6)]
    assert sorted((s["steps"], s["batch_size"]) for s in drawn) == [(s, b) for s in (10, 20) for b in (8, 16, 32)]
    assert searcher.suggest("t6") == Searcher.FINISHED


def test_a_pruned_trial_is_told_with_its_reports_and_not_as_a_result() -> None:
    from optuna.trial import TrialState

    searcher = built("tpe")
    assert isinstance(searcher, TPE)
    for trial in ("done", "pruned", "failed", "silent"):
        searcher.suggest(trial)
    report = {"step": 10, "score": 0.5}
    for trial in ("done", "pruned", "pruned"):  # one comes by the same step twice
        searcher.on_trial_result(trial, report)
    searcher.on_trial_complete("done", {**report, "finished": True})
    searcher.on_trial_complete("pruned", report)
    searcher.on_trial_complete("failed", None, error=True)
    searcher.on_trial_complete("silent", None)
    told = searcher._ot_study.trials
    assert [t.state for t in told] == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.FAIL]
    assert told[1].intermediate_values == {10: 0.5}


def test_several_objectives_are_searched_together() -> None:
    searcher = built("tpe", objectives={"score": "max", "cost": "min"})
    for number in range(30):
        settings = SPACE.settings(searcher.suggest(f"t{number}"))
        # The larger the batch, the better and the dearer.
        result = {"step": 1, "score": settings["batch_size"], "cost": settings["batch_size"] ** 2, "finished": True}
        searcher.on_trial_result(f"t{number}", result)
        searcher.on_trial_complete(f"t{number}", result)
    searcher.suggest("stopped")
    searcher.on_trial_complete("stopped", {"step": 1, "score": 0.0, "cost": 9})
    assert len(searcher._ot_study.best_trials) >= 2
    assert [d.name for d in searcher._ot_study.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert searcher._ot_study.trials[-1].state.name == "FAIL"


def test_bohb_knows_the_conditions_of_the_space() -> None:
    space = config_space(SPACE, seed=0)
    assert sorted(str(c.child.name) for c in space.conditions) == ["loss[infonce].temperature", "loss[siglip].bias"]
