"""Schedulers: Ray Tune's real ones, with the names and the times that trials report."""

from typing import Any

import pytest
from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    PopulationBasedTraining,
    TrialScheduler,
)

from rayemb.tune import TuneConfig, parse_space
from rayemb.tune.schedulers import HyperBand, HyperBandOfBOHB, Population, Within

SPACE = parse_space({"loss.margin": "uniform(0, 0.3)", "loss.temperature": "loguniform(0.01, 0.5)"})


def built(config: Any, *, budget: int = 4, bohb: bool = False) -> TrialScheduler:
    return TuneConfig.model_validate({"scheduler": config}).scheduler.build("score", "max", budget, SPACE, bohb=bohb)


class Controller:
    """As much of Tune's controller as a scheduler asks for."""

    def __init__(self) -> None:
        self.search_alg = None
        self.trials: list[Trial] = []

    def get_trials(self) -> list[Trial]:
        return self.trials

    get_live_trials = get_trials

    def add(self, scheduler: TrialScheduler, count: int) -> list[Trial]:
        self.trials = [Trial("x", stub=True) for _ in range(count)]
        for trial in self.trials:
            trial.status = Trial.RUNNING
            scheduler.on_trial_add(self, trial)
        return self.trials


@pytest.mark.parametrize(
    ("config", "bohb", "kind"),
    [
        ("none", False, FIFOScheduler),
        ("asha", False, AsyncHyperBandScheduler),
        ("hyperband", False, HyperBand),
        ("hyperband", True, HyperBandOfBOHB),
        ("pbt", False, Population),
    ],
)
def test_a_name_gives_its_scheduler(config: str, bohb: bool, kind: type) -> None:
    assert type(built(config, bohb=bohb)) is kind


def test_asha_stops_what_falls_behind_at_a_rung_and_no_trial_before_its_last_report() -> None:
    scheduler, controller = built({"name": "asha", "grace": 1, "reduction_factor": 2}), Controller()
    trials = controller.add(scheduler, 4)
    decisions = []
    for trial, score in zip(trials, [0.9, 0.8, 0.1, 0.7], strict=True):
        decisions.append(scheduler.on_trial_result(controller, trial, {"budget": 1.0, "score": score}))
    assert decisions == ["CONTINUE", "STOP", "STOP", "STOP"]
    assert scheduler.on_trial_result(controller, trials[0], {"budget": 3.0, "score": 0.9}) == "CONTINUE"
    assert scheduler.on_trial_result(controller, trials[0], {"budget": 4, "score": 0.9}) == "STOP"


def test_a_grace_beyond_the_whole_budget_is_the_whole_budget() -> None:
    scheduler, controller = built({"name": "asha", "grace": 9}, budget=3), Controller()
    first, second = controller.add(scheduler, 2)
    assert scheduler.on_trial_result(controller, first, {"budget": 2.0, "score": 0.9}) == "CONTINUE"
    assert scheduler.on_trial_result(controller, second, {"budget": 2.0, "score": 0.1}) == "CONTINUE"


def test_hyperband_lets_trials_wait_for_each_other() -> None:
    scheduler, controller = built({"name": "hyperband", "reduction_factor": 2}), Controller()
    trials = controller.add(scheduler, 6)
    # The first bracket, of three, is trained to the end; the second has its first rung at half.
    assert scheduler.on_trial_result(controller, trials[0], {"budget": 2, "score": 0.5}) == "CONTINUE"
    assert scheduler.on_trial_result(controller, trials[4], {"budget": 2, "score": 0.5}) == "PAUSE"


def test_pbt_perturbs_within_the_ranges() -> None:
    within = Within(SPACE)
    assert within({"loss.margin": 0.36, "loss.temperature": 0.6}) == {"loss.margin": 0.3, "loss.temperature": 0.5}
    assert within({"loss.margin": -0.1, "loss.temperature": 0.2}) == {"loss.margin": 0.0, "loss.temperature": 0.2}
    scheduler = built({"name": "pbt", "interval": 1, "quantile": 0.5})
    assert isinstance(scheduler, PopulationBasedTraining)
    controller = Controller()
    better, worse = controller.add(scheduler, 2)
    better.config = {"loss.margin": 0.29, "loss.temperature": 0.49}
    for _ in range(20):
        new, _ = scheduler._get_new_config(worse, better)
        assert 0 <= new["loss.margin"] <= 0.3
        assert 0.01 <= new["loss.temperature"] <= 0.5


def test_a_population_that_was_interrupted_is_compared_anew_and_goes_on() -> None:
    scheduler, controller = built({"name": "pbt", "interval": 1, "quantile": 0.5}), Controller()
    for _ in range(2):  # as a sweep finds them again
        trial = Trial("x", stub=True)
        trial.run_metadata.last_result = {"budget": 1.0, "score": 0.5}
        controller.trials.append(trial)
        scheduler.on_trial_add(controller, trial)
    for score in (0.9, 0.1):
        trial = scheduler.choose_trial_to_run(controller)
        assert trial is not None
        assert trial.status == Trial.PENDING
        trial.status = Trial.RUNNING
        assert scheduler.on_trial_result(controller, trial, {"budget": 2.0, "score": score}) == "PAUSE"
        trial.status = Trial.PAUSED
    assert scheduler.choose_trial_to_run(controller) is not None


@pytest.mark.parametrize("bohb", [False, True])
def test_a_bracket_does_not_wait_for_trials_that_were_over_before_an_interruption(bohb: bool) -> None:
    scheduler, controller = built({"name": "hyperband", "reduction_factor": 2}, budget=2, bohb=bohb), Controller()
    pruned, stopped = (Trial("x", stub=True) for _ in range(2))
    pruned.status = Trial.TERMINATED
    controller.trials = [pruned, stopped]
    for trial in controller.trials:
        scheduler.on_trial_add(controller, trial)
    brackets = [bracket for band in scheduler._hyperbands for bracket in band]
    assert [trial for bracket in brackets for trial in bracket.current_trials()] == [stopped]
