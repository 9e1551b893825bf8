"""The config of a sweep: what goes together, and what is refused before a cluster starts."""

from pathlib import Path

import pytest

from rayemb.cli import main
from rayemb.config import ConfigError, load
from rayemb.losses import InfoNCEConfig
from rayemb.pipeline import RunConfig
from rayemb.pipeline.methods import methods
from rayemb.pipeline.stages import run_stage
from rayemb.train import TrainConfig
from rayemb.tune import TuneConfig, TuneError, check_sweep
from rayemb.tune import search as search_module
from rayemb.tune.trial import at_fraction, budgets, trial_config

ROOT = Path(__file__).parents[2]


def test_a_name_alone_chooses_a_searcher_and_a_scheduler() -> None:
    config = load(TuneConfig, None, ["searcher=tpe", "scheduler={name: hyperband, reduction_factor: 4}"])
    assert (config.searcher.name, config.scheduler.name, config.total) == ("tpe", "hyperband", 10)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (['search={"loss.margin": "uniform(1, 0)"}'], "loss.margin: the range of uniform(1, 0) is inverted"),
        (["search={}"], "at least 1"),
        (["objectives={}"], "at least 1"),
        (["objectives={val/recall@1: more}"], "max"),
        (["searcher=annealing"], "annealing"),
        (["searcher=bohb"], "hyperband"),
        (["scheduler=pbt", "searcher=tpe"], "pbt draws its first settings at random"),
        (["fidelity=fraction", "scheduler=none"], "fidelity fraction"),
        (["name=../there"], "pattern"),
        (["trials=0"], "greater than or equal to 1"),
    ],
)
def test_what_does_not_go_together_is_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(TuneConfig, None, overrides)
    assert message in str(caught.value)


FIXED = TrainConfig(loss=InfoNCEConfig(learnable_temperature=False))


@pytest.mark.parametrize(
    ("config", "where", "message"),
    [
        ({"objectives": {"val/recall@7": "max"}}, "tune.objectives.val/recall@7", "val/recall@10"),
        ({"objectives": {"bytes_per_vector": "min"}}, "tune.objectives.bytes_per_vector", "no evaluation yields"),
        ({"set": {"step": 3}}, "tune.set.step", "did you mean 'steps'"),
        ({"set": {"steps": 0}}, "tune.set.steps", "greater than or equal to 1"),
        ({"set": {"evaluation.tasks": {}}}, "tune.objectives.val/recall@1", "no evaluation yields"),
        ({"searcher": "grid"}, "tune.search.loss.temperature", "loguniform(0.02, 0.5)"),
        ({"searcher": "tpe", "search": {"loss.margin": "randn(0.1, 0.01)"}}, "tune.search.loss.margin", "randn"),
        (
            {"searcher": "bohb", "scheduler": "hyperband", "objectives": {"loss": "min", "val/recall@1": "max"}},
            "tune.objectives",
            "one objective",
        ),
        ({"scheduler": "pbt", "search": {"steps": "randint(1, 9)"}}, "tune.search.steps", "in mid-training"),
        (
            {"scheduler": "pbt", "search": {"loss.name": "choice([infonce])"}},
            "tune.search.loss.name",
            "in mid-training",
        ),
        ({"scheduler": "pbt", "trials": 1}, "tune.trials", "two trials"),
        (
            {"scheduler": "pbt", "set": {"loss.learnable_temperature": True}},
            "tune.search.loss.temperature",
            "the temperature is learned",
        ),
        (
            {"objectives": {"bytes_per_vector": "min"}, "measures": [{"name": "size"}]},
            "tune.objectives",
            "measured at the end",
        ),
    ],
)
def test_what_would_be_found_wrong_later_is_found_first(config: dict, where: str, message: str) -> None:
    with pytest.raises(TuneError) as caught:
        check_sweep(TuneConfig.model_validate(config), FIXED)
    assert caught.value.where == where
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("searcher", "scheduler", "package", "extra"),
    [
        ("tpe", "asha", "optuna", "rayemb[optuna]"),
        ("bohb", "hyperband", "hpbandster", "rayemb[bohb]"),
        ("bohb", "hyperband", "ConfigSpace", "rayemb[bohb]"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    searcher: str, scheduler: str, package: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TuneConfig.model_validate({"searcher": searcher, "scheduler": scheduler})
    check_sweep(config, FIXED)
    find = search_module.importlib.util.find_spec
    monkeypatch.setattr(
        search_module.importlib.util, "find_spec", lambda name, *rest: None if name == package else find(name, *rest)
    )
    with pytest.raises(TuneError) as caught:
        check_sweep(config, FIXED)
    assert package in caught.value.what
    assert extra in caught.value.fix


def test_a_wrong_sweep_ends_before_a_cluster_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayemb.pipeline.stages.connect", lambda *_: pytest.fail("a cluster was started"))
    config = load(RunConfig, None, ["tune.search={loss.temprature: 'uniform(0.1, 1)'}"])
    with pytest.raises(TuneError, match=r"tune\.search\.loss\.temprature.*did you mean"):
        run_stage("tune", config)


def test_the_command_line_says_what_is_wrong_and_where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["rayemb", "tune", "tune.objectives={val/recal@1: max}"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "tune.objectives.val/recal@1" in said
    assert "val/recall@1" in said


def test_a_trial_is_the_base_with_its_settings_evaluated_in_step() -> None:
    config = TuneConfig(set={"steps": 30, "workers": 1, "loss.margin": 0.1}, report_every=10)
    trial = trial_config(TrainConfig(), config, {"loss.temperature": 0.2, "steps": 20})
    assert (trial.loss.temperature, trial.loss.margin, trial.steps, trial.workers) == (0.2, 0.1, 20, 1)
    assert trial.logging.every == trial.evaluation.every == trial.checkpoints.every == 10


def test_budgets_are_reports_of_the_steps_or_shares_of_the_data() -> None:
    assert budgets(TuneConfig(), 60, 20) == [(1.0, 3)]
    assert budgets(TuneConfig(), 61, 20) == [(1.0, 4)]
    config = TuneConfig.model_validate({"fidelity": {"name": "fraction", "least": 0.25}})
    assert budgets(config, 60, 20) == [(0.25, 1), (0.5, 2), (1.0, 4)]
    small = at_fraction(TrainConfig(steps=400), 0.25)
    assert (small.steps, small.schedule.warmup_steps, small.corpora["main"].fraction) == (100, 12, 0.25)


@pytest.mark.parametrize(("name", "total"), [("tune.yaml", 12), ("tune_demo.yaml", 4), ("temperature.yaml", 6)])
def test_the_shipped_sweeps_are_valid(name: str, total: int) -> None:
    config = load(RunConfig, ROOT / "jobs/configs" / name)
    assert check_sweep(config.tune, config.train)
    assert config.tune.total == total


def test_methods_lists_searchers_and_schedulers_with_their_papers() -> None:
    found = {f"{method.family}/{method.name}": method for method in methods()}
    assert found["searchers/bohb"].source == "Falkner et al., ICML 2018"
    assert found["schedulers/asha"].test == "tests/tune/test_schedulers.py"
    assert {"searchers/random", "searchers/tpe", "schedulers/hyperband", "schedulers/pbt"} <= set(found)
