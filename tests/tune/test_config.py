"""Search spaces from YAML: what is a distribution, and what is refused before a cluster starts."""

import pytest

from rayemb.config import ConfigError, load
from rayemb.train import TrainConfig
from rayemb.tune import TuneConfig, TuneError
from rayemb.tune.config import parse_distribution
from rayemb.tune.sweep import trial_config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("loguniform(0.005, 0.5)", ("loguniform", [0.005, 0.5])),
        ("choice([1, 'two', None])", ("choice", [[1, "two", None]])),
        ("quniform(0, 1, 0.1)", ("quniform", [0, 1, 0.1])),
    ],
)
def test_a_distribution_is_read(text: str, expected: tuple[str, list[object]]) -> None:
    assert parse_distribution(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("uniform(0, 1", "not a distribution"),
        ("__import__('os').system('true')", "not a distribution"),
        ("gauss(0, 1)", "unknown distribution 'gauss'"),
        ("uniform(0, open('x'))", "plain values"),
        ("uniform(1, 0)", "not below"),
        ("uniform(0)", "takes 2 arguments"),
        ("choice(3)", "takes a list"),
    ],
)
def test_what_is_no_distribution_is_refused_with_its_key(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match="search") as caught:
        load(TuneConfig, None, [f'search={{"loss.margin": "{text}"}}'])
    assert message in str(caught.value)
    assert "loss.margin" in str(caught.value)


def test_a_trial_is_the_base_with_its_settings() -> None:
    config = TuneConfig(set={"steps": 30, "workers": 1}, grace_steps=10)
    sample = {"loss.temperature": 0.2, "loss.margin": 0.1, "optimizer.learning_rate": 1e-4, "schedule.warmup_steps": 3}
    trial = trial_config(TrainConfig(), config, sample)
    assert (trial.loss.temperature, trial.loss.margin, trial.steps, trial.workers) == (0.2, 0.1, 30, 1)
    assert (trial.optimizer.learning_rate, trial.schedule.warmup_steps) == (1e-4, 3)
    assert trial.logging.every == trial.evaluation.every == 10


@pytest.mark.parametrize(
    ("set_", "sample", "where"),
    [
        ({}, {"loss.temprature": 0.1}, "tune.search.loss.temprature"),
        ({"step": 3}, {}, "tune.set.step"),
        ({}, {"loss.temperature": -1.0}, "tune.search or tune.set"),
    ],
)
def test_a_setting_that_training_does_not_know_is_named(set_: dict, sample: dict, where: str) -> None:
    with pytest.raises(TuneError) as caught:
        trial_config(TrainConfig(), TuneConfig(set=set_), sample)
    assert caught.value.where == where
