"""The record of a sweep: what trials report, as Tune's callbacks tell of it; the front of several objectives."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from ray import cloudpickle
from ray.tune.experiment import Trial

from rayemb.config import load
from rayemb.errors import RayembError
from rayemb.pipeline import RunConfig
from rayemb.train import TrainConfig, TrainError
from rayemb.tune import TuneConfig, front, load_record
from rayemb.tune.record import Recorder
from rayemb.tune.trial import Plan, write_config

SEARCH = {"loss.temperature": "loguniform(0.01, 0.5)"}


def recorder(tmp_path: Path, **config: Any) -> Recorder:
    settings = TuneConfig.model_validate({"search": SEARCH, "trials": 3, **config})
    found = Recorder(Plan(settings, TrainConfig(steps=40), "/corpus", str(tmp_path / "s"), "s"), "abc")
    found.setup()
    return found


def trial(temperature: float, status: str = Trial.RUNNING) -> Trial:
    made = Trial("x", stub=True, config={"loss.temperature": temperature})
    made.status = status
    return made


def told(it: Recorder, of: Trial, step: int, **metrics: Any) -> None:
    it.on_trial_result(0, [], of, {"step": step, **metrics})


def test_what_trials_report_is_there_at_once_and_whole(tmp_path: Path) -> None:
    it = recorder(tmp_path, trials=4)
    good, bad, lost, odd = trial(0.1), trial(0.2), trial(0.3), trial(0.4)
    for each in (good, bad, lost, odd):
        it.on_trial_start(0, [], each)
        write_config(it.plan, each.trial_id, it.plan.trained({"loss.temperature": each.config["loss.temperature"]}))
    told(it, good, 20, **{"val/recall@1": 0.5, "loss": 1.0, "time_total_s": 3.0, "time/data": 0.1})
    told(it, good, 40, **{"val/recall@1": 0.7, "loss": math.nan, "val/rankme": None, "finished": True})
    told(it, bad, 20, **{"val/recall@1": 0.9})
    bad.status = Trial.TERMINATED
    it.on_step_end(0, [good, bad, lost, odd])
    odd.status = Trial.TERMINATED  # as Tune does when it is interrupted
    it.on_experiment_end([good, bad, lost, odd])
    lost.run_metadata.num_failures = 2
    lost.storage = SimpleNamespace(trial_driver_staging_path=str(tmp_path))
    lost.run_metadata.pickled_error_filename = "error.pkl"
    (tmp_path / "error.pkl").write_bytes(cloudpickle.dumps(TrainError("the memory is full", where="train.batch_size")))
    it.on_trial_error(0, [], lost)
    record = load_record(str(tmp_path / "s"))
    assert record is not None
    by_id = {entry["id"]: entry for entry in record["trials"]}
    assert [by_id[t.trial_id]["state"] for t in (good, bad, lost, odd)] == ["finished", "pruned", "failed", "running"]
    first = by_id[good.trial_id]
    assert first["curve"] == [{"step": 20, "val/recall@1": 0.5, "loss": 1.0}, {"step": 40, "val/recall@1": 0.7}]
    assert (first["settings"], first["metrics"], first["step"]) == (
        {"loss.temperature": 0.1},
        {"val/recall@1": 0.7},
        40,
    )
    assert by_id[lost.trial_id]["attempts"] == 2
    assert by_id[lost.trial_id]["error"] == "train.batch_size: the memory is full"
    # The pruned one was better at its half; what counts is what is finished.
    assert record["best"] == [good.trial_id]
    config = load(RunConfig, tmp_path / "s" / "best.yaml")
    assert (config.train.loss.temperature, config.train.steps) == (0.1, 40)
    assert config.uri("corpus") == "/corpus"
    assert load(RunConfig, tmp_path / "s" / first["config"]).train.loss.temperature == 0.1
    assert yaml.safe_load((tmp_path / "s" / "best.yaml").read_text()).keys() == {"artefacts", "train"}


def test_a_restored_sweep_goes_on_with_the_record(tmp_path: Path) -> None:
    it = recorder(tmp_path)
    done, running = trial(0.1), trial(0.2)
    for each in (done, running):
        it.on_trial_start(0, [], each)
        told(it, each, 20, **{"val/recall@1": 0.5})
    told(it, running, 30, **{"val/recall@1": 0.6})
    told(it, done, 40, **{"val/recall@1": 0.7, "finished": True})
    young = trial(0.3)  # younger than Tune's last snapshot
    it.on_trial_start(0, [], young)
    told(it, young, 10, **{"val/recall@1": 0.9})
    it._write()
    # As Tune does it: by pickle, with nothing of what it has seen.
    again = Recorder.__new__(Recorder)
    again.__setstate__(json.loads(json.dumps({})) | it.__getstate__())
    again.setup()
    again.on_trial_start(0, [], running)
    told(again, running, 20, **{"val/recall@1": 0.55})
    again.on_experiment_end([done, running])
    record = load_record(str(tmp_path / "s"))
    assert record is not None
    first, second = record["trials"]
    assert first["state"] == "finished"
    # From a checkpoint before what had been reported.
    assert second["curve"] == [{"step": 20, "val/recall@1": 0.55}]


def test_what_was_trained_while_nobody_listened_is_in_the_curve(tmp_path: Path) -> None:
    it = recorder(tmp_path)
    one = trial(0.1)
    it.on_trial_start(0, [], one)
    told(it, one, 10, **{"val/recall@1": 0.1})
    history = [{"step": step, "val/recall@1": step / 100, "time/data": 0.5} for step in (10, 20, 30, 40)]
    manifest = Path(it.plan.model_uri(one.trial_id)) / "rayemb.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"training": history}))
    told(it, one, 40, **{"val/recall@1": 0.5, "finished": True})
    record = load_record(str(tmp_path / "s"))
    assert record is not None
    expected = [(10, 0.1), (20, 0.2), (30, 0.3), (40, 0.5)]
    assert record["trials"][0]["curve"] == [{"step": step, "val/recall@1": value} for step, value in expected]


def test_the_schedule_of_a_population_is_kept(tmp_path: Path) -> None:
    it = recorder(tmp_path)
    one = trial(0.1)
    it.on_trial_start(0, [], one)
    schedule = [{"step": 0, "trial": "a", "settings": {"loss.temperature": 0.1}}]
    one.config["loss.temperature"] = 0.2
    told(it, one, 20, schedule=json.dumps(schedule))
    it.on_experiment_end([one])
    record = load_record(str(tmp_path / "s"))
    assert record is not None
    assert record["trials"][0]["schedule"] == schedule
    assert record["trials"][0]["settings"] == {"loss.temperature": 0.2}


def test_another_file_is_not_taken_for_a_record(tmp_path: Path) -> None:
    assert load_record(str(tmp_path)) is None
    (tmp_path / "trials.json").write_text("[]")
    with pytest.raises(RayembError, match=r"trials\.json"):
        load_record(str(tmp_path))


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_a_front_is_what_no_other_beats(values: list[tuple[int, int]]) -> None:
    trials = [{"id": n, "state": "finished", "metrics": {"a": a, "b": b}} for n, (a, b) in enumerate(values)]
    found = {trial["id"] for trial in front(trials, {"a": "max", "b": "min"})}
    for number, (a, b) in enumerate(values):
        beaten = any((x >= a and y <= b) and (x, y) != (a, b) for x, y in values)
        assert (number not in found) == beaten


def test_the_best_of_one_objective_is_one_and_finished() -> None:
    trials = [
        {"id": "cut", "state": "pruned", "metrics": {"a": 9.0}},
        {"id": "first", "state": "finished", "metrics": {"a": 2.0}},
        {"id": "equal", "state": "finished", "metrics": {"a": 2.0}},
        {"id": "none", "state": "failed", "metrics": {}},
    ]
    assert [trial["id"] for trial in front(trials, {"a": "max"})] == ["first"]
    assert [trial["id"] for trial in front(trials, {"a": "min"})] == ["first"]
    assert [trial["id"] for trial in front(trials[:1], {"a": "max"})] == ["cut"]
    assert front(trials[3:], {"a": "max"}) == []
