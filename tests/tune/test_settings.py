"""Settings applied to a training config, and a space tried at its corners before anything runs."""

import pytest

from rayemb.losses import InfoNCEConfig, SigLIPConfig
from rayemb.train import TrainConfig
from rayemb.tune import TuneError, parse_space
from rayemb.tune.settings import applied, check_space


def test_settings_are_set_and_leave_the_rest() -> None:
    base = TrainConfig(batch_size=64, loss=InfoNCEConfig(margin=0.3))
    found = applied(base, {"loss.temperature": 0.2, "corpora.main.fraction": 0.5, "steps": 30, "workers": 1})
    assert found == base.model_copy(update={**dict(found), "batch_size": 64})
    assert (found.loss.temperature, found.loss.margin, found.corpora["main"].fraction) == (0.2, 0.3, 0.5)
    assert (found.steps, found.workers, base.steps) == (30, 1, 400)


def test_another_name_begins_its_mapping_anew() -> None:
    base = TrainConfig(loss=InfoNCEConfig(margin=0.3, temperature=0.2))
    found = applied(base, {"loss.temperature": 0.05, "loss.name": "siglip"})
    assert found.loss == SigLIPConfig(temperature=0.05)
    assert applied(base, {"loss.name": "infonce"}).loss == base.loss


def test_a_section_that_was_null_can_be_set_into() -> None:
    found = applied(TrainConfig(), {"ema.decay": 0.99})
    assert found.ema is not None
    assert found.ema.decay == 0.99


@pytest.mark.parametrize(
    ("settings", "where", "message"),
    [
        ({"loss.temprature": 0.1}, "loss.temprature", "did you mean 'loss.temperature'"),
        ({"corpora.mian.fraction": 0.1}, "corpora.mian.fraction", "did you mean 'corpora.main.fraction'"),
        ({"step": 3}, "step", "did you mean 'steps'"),
        ({"steps.more": 3}, "steps.more", "no key"),
        ({"ema.decoy": 0.9}, "ema.decoy", "did you mean 'decay'"),
        ({"loss.temperature": -1.0}, "loss.temperature", "greater than 0"),
        ({"loss.name": "infonse"}, "loss.name", "infonse"),
        ({"batch_size": 1, "workers": 2}, "batch_size=1, workers=2", "less than a row"),
    ],
)
def test_what_the_training_config_refuses_is_named(settings: dict, where: str, message: str) -> None:
    with pytest.raises(TuneError) as caught:
        applied(TrainConfig(), settings)
    assert message in str(caught.value)
    assert caught.value.where == where or message == "infonse"


@pytest.mark.parametrize(
    ("search", "where", "message"),
    [
        ({"loss.temprature": "uniform(0.1, 1)"}, "tune.search.loss.temprature", "did you mean 'loss.temperature'"),
        ({"loss.margin": "uniform(-0.5, 0.5)"}, "tune.search.loss.margin", "greater than or equal to 0"),
        ({"loss.margin": "uniform(0, 5)"}, "tune.search.loss.margin", "less than 2"),
        ({"loss.margin": "choice([0, 0.1, none, 7])"}, "tune.search.loss.margin", "valid number"),
        ({"corpora.main.fraction": "uniform(0.1, 1.5)"}, "tune.search.corpora.main.fraction", "less than or equal"),
        (
            {"loss": {"choice": [{"name": "infonce"}, {"name": "siglip", "margin": "uniform(0, 0.1)"}]}},
            "tune.search.loss[siglip].margin",
            "unknown key",
        ),
    ],
)
def test_a_value_that_training_refuses_is_found_before_anything_runs(search: dict, where: str, message: str) -> None:
    with pytest.raises(TuneError) as caught:
        check_space(TrainConfig(), parse_space(search))
    assert caught.value.where == where
    assert message in str(caught.value)


def test_values_that_do_not_go_together_are_named_together() -> None:
    space = parse_space({"workers": "choice([1, 4])", "batch_size": "choice([2, 64])"})
    with pytest.raises(TuneError, match=r"workers=4, batch_size=2: .*less than a row"):
        check_space(TrainConfig(), space)
    space = parse_space({"zero_stage": "choice([1, 2])", "precision": "choice([fp32, bf16])"})
    # Each of these alone does not fit the base; together they do.
    assert len(check_space(TrainConfig(zero_stage=0), space)) == 4


def test_batch_size_world_size_fraction_and_steps_may_be_searched() -> None:
    search = {
        "batch_size": "choice([64, 128])",
        "workers": "choice([1, 2])",
        "corpora.main.fraction": "uniform(0.1, 1)",
        "steps": "lograndint(10, 400)",
    }
    corners = check_space(TrainConfig(), parse_space(search))
    assert len(corners) == 16
    assert {config.workers for config in corners} == {1, 2}
    assert {config.steps for config in corners} == {10, 399}
