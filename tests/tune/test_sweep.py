"""Real sweeps on a real cluster: killed and gone on with, a trial that fails, a population."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from rayemb.cluster import ClusterConfig, Head, local_head
from rayemb.config import load
from rayemb.models import Model
from rayemb.pipeline import RunConfig
from rayemb.train.sinks import read_rows
from rayemb.tune.sweep import _time_limit
from tests.environment import off_cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

DEADLINE_S = 600
SMALL = [
    "corpus.source.limit=600",
    "corpus.source.rows_per_unit=256",
    "train.model.image.image_size=16",
    "train.model.dim=32",
    "train.workers=1",
    "train.cpus_per_worker=0.5",
    "train.batch_size=32",
    "train.schedule.warmup_steps=2",
    "train.loss.learnable_temperature=false",
]


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with local_head(ClusterConfig(num_cpus=4, object_store_mb=300)) as head:
        yield head


@pytest.fixture(scope="module")
def workspace(head: Head, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small corpus."""
    folder = tmp_path_factory.mktemp("sweeps")
    process = command(head, folder, ["data", "build"])
    assert process.wait(DEADLINE_S) == 0
    return folder


def command(
    head: Head | None, folder: Path, words: list[str], settings: list[str] | None = None
) -> "subprocess.Popen[str]":
    """The command on the cluster of `head`, or on one of its own."""
    log = (folder / "log").open("a")
    return subprocess.Popen(
        [sys.executable, "-m", "rayemb.cli", *words, f"workspace={folder}", *SMALL, *(settings or [])],
        env={**off_cluster(), **(head.environment() if head else {})},
        stdout=log,
        stderr=log,
        text=True,
    )


def done(head: Head | None, folder: Path, settings: list[str]) -> dict[str, Any]:
    """The record of a sweep that runs to its end."""
    process = command(head, folder, ["tune"], settings)
    try:
        code = process.wait(DEADLINE_S)
    finally:
        process.kill()
    assert code == 0, (folder / "log").read_text()[-4000:]
    return record(folder, settings) or {}


def record(folder: Path, settings: list[str]) -> dict[str, Any] | None:
    name = next(word.split("=")[1] for word in settings if word.startswith("tune.name="))
    path = folder / "sweeps" / name / "trials.json"
    return json.loads(path.read_text()) if path.exists() else None


def under_way(
    head: Head, folder: Path, settings: list[str], when: Callable[[list[dict[str, Any]]], bool]
) -> "subprocess.Popen[str]":
    """A sweep that runs, as soon as its trials are so far."""
    process = command(head, folder, ["tune"], settings)
    deadline = time.monotonic() + DEADLINE_S
    try:
        while not when((record(folder, settings) or {"trials": []})["trials"]):
            assert process.poll() is None, (folder / "log").read_text()[-4000:]
            assert time.monotonic() < deadline, (folder / "log").read_text()[-4000:]
            time.sleep(0.2)
    except BaseException:
        process.kill()
        raise
    return process


def killed_once(
    head: Head, folder: Path, settings: list[str], when: Callable[[list[dict[str, Any]]], bool]
) -> dict[str, Any]:
    """The record of a sweep that is killed when its trials are so far."""
    process = under_way(head, folder, settings, when)
    time.sleep(3)  # Tune's own state is saved every 2 s
    process.kill()
    process.wait()
    found = record(folder, settings)
    assert found is not None
    return found


def test_a_sweep_that_is_killed_goes_on_and_a_trial_that_fails_is_reported(head: Head, workspace: Path) -> None:
    search = {
        "steps": "choice([4, 40])",
        "corpora.main.uri": {"choice": [None, str(workspace / "nowhere")]},
    }
    settings = [f"tune.search={json.dumps(search)}", "tune.name=killed", "tune.searcher=grid", "tune.scheduler=none"]
    settings += ["tune.report_every=2", "tune.measures=[{name: size}]", "train.logging.sinks=[{name: tensorboard}]"]
    settings += ["tune.objectives={val/recall@1: max, bytes_per_vector: min}"]

    def going(trials: list[dict[str, Any]]) -> bool:
        finished = any(trial["state"] == "finished" for trial in trials)
        return finished and any(trial["state"] == "running" and len(trial["curve"]) > 2 for trial in trials)

    before = killed_once(head, workspace, settings, going)
    killed = time.time()
    assert before["state"] == "running"
    (short,) = [trial for trial in before["trials"] if trial["state"] == "finished" and trial["settings"]["steps"] == 4]
    model = Path(short["model"])
    written = {path: path.stat().st_mtime for path in model.iterdir()}

    after = done(head, workspace, settings)
    assert after["state"] == "finished"
    states = {(t["settings"]["steps"], t["settings"]["corpora.main.uri"] is None): t for t in after["trials"]}
    assert len(after["trials"]) == len(states) == 4
    assert [states[key]["state"] for key in ((4, True), (40, True), (4, False), (40, False))] == [
        "finished",
        "finished",
        "failed",
        "failed",
    ]
    # Failed ones were tried twice, and say why.
    for steps in (4, 40):
        failed = states[steps, False]
        assert failed["attempts"] == 2
        assert str(workspace / "nowhere") in failed["error"]
    # The finished one was not repeated; the other went on from its own checkpoint.
    again = next(trial for trial in after["trials"] if trial["id"] == short["id"])
    assert {**again, "seconds": 0} == {**short, "seconds": 0}
    assert {path: path.stat().st_mtime for path in model.iterdir()} == written
    rows = Model.load(states[40, True]["model"]).info["training"]
    assert [row["step"] for row in rows] == list(range(2, 41, 2))
    assert rows[0]["time"] < killed < rows[-1]["time"]
    assert [row["step"] for row in states[40, True]["curve"]] == list(range(2, 41, 2))
    assert states[40, True]["metrics"]["bytes_per_vector"] == 4 * 32
    # What a person finds: the settings of the best, each trial's config, its metrics by trial.
    folder = workspace / "sweeps" / "killed"
    best = next(trial for trial in after["trials"] if trial["id"] == after["best"][0])
    assert load(RunConfig, folder / "best.yaml").train.steps == best["settings"]["steps"]
    for trial in after["trials"]:
        assert load(RunConfig, folder / trial["config"]).train.steps == trial["settings"]["steps"]
    assert sorted(path.name for path in (folder / "tensorboard").iterdir()) == sorted(
        states[steps, True]["id"] for steps in (4, 40)
    )
    (run,) = (folder / "trials" / short["id"] / "runs").iterdir()
    assert len(read_rows(str(run))) == 2
    about = json.loads((run / "run.json").read_text())
    assert about["name"] == f"killed-{short['id']}"
    assert about["tags"]["trial"] == short["id"]
    assert about["tags"]["steps"] == "4"
    assert not (run / "checkpoints").exists()
    # A third time there is nothing to do.
    began = time.monotonic()
    assert done(head, workspace, settings) == after
    assert time.monotonic() - began < 120


def test_trials_that_are_stopped_early_give_their_cpus_back(workspace: Path) -> None:
    # One CPU: if the second trial kept its share, the third would wait for ever.
    settings = ["tune.name=pruned", "tune.search={loss.temperature: 'grid_search([0.5, 0.01, 0.011])'}"]
    settings += ["tune.searcher=grid", "tune.objectives={loss: min}", "tune.concurrent=1", "cluster.num_cpus=1"]
    settings += ["tune.scheduler={name: asha, grace: 1, reduction_factor: 2}", "train.loss.min_temperature=0.001"]
    settings += ["train.steps=6", "tune.report_every=2", "tune.watch=[val/rankme]"]
    database = f"sqlite:///{workspace}/mlflow.db"
    settings += [f"train.logging.sinks=[{{name: mlflow, uri: '{database}'}}]"]
    after = done(None, workspace, settings)
    assert [trial["state"] for trial in after["trials"]] == ["finished", "pruned", "pruned"]
    client = MlflowClient(tracking_uri=database)
    experiment = client.get_experiment_by_name("rayemb")
    runs = {run.info.run_name: run.info.status for run in client.search_runs([experiment.experiment_id])}
    names = [f"pruned-{trial['id']}" for trial in after["trials"]]
    assert runs == dict(zip(names, ["FINISHED", "KILLED", "KILLED"], strict=True))
    page = (workspace / "sweeps" / "pruned" / "index.html").read_text()
    assert "3 trials: 1 finished, 2 pruned." in page
    assert "val/rankme over loss.temperature" in page


def test_a_population_that_is_killed_goes_on_takes_over_weights_and_leaves_a_schedule(
    head: Head, workspace: Path
) -> None:
    settings = ["tune.name=population", "tune.search={loss.temperature: 'choice([0.05, 0.3])'}", "tune.trials=2"]
    settings += ["train.steps=6", "tune.report_every=2", "tune.scheduler={name: pbt, quantile: 0.5, resample: 1.0}"]
    settings += ["tune.seed=1", "tune.objectives={loss: min}"]

    def exploited(trials: list[dict[str, Any]]) -> bool:
        return len(trials) == 2 and all(trial["curve"] for trial in trials)

    before = killed_once(head, workspace, settings, exploited)
    assert before["state"] == "running"
    assert not any(trial["state"] == "finished" for trial in before["trials"])
    after = done(head, workspace, settings)
    assert [trial["state"] for trial in after["trials"]] == ["finished", "finished"]
    assert all(trial["step"] == 6 for trial in after["trials"])
    schedules = [trial["schedule"] for trial in after["trials"]]
    assert all(
        [part["step"] for part in schedule] == sorted({part["step"] for part in schedule}) for schedule in schedules
    )
    ids = [trial["id"] for trial in after["trials"]]
    origins = [[part["trial"] for part in schedule] for schedule in schedules]
    # With a population of two, one took over the other's weights at some time.
    assert any(set(origin) == set(ids) for origin in origins)
    for trial in after["trials"]:
        model = Model.load(trial["model"])
        assert [row["step"] for row in model.info["training"]] == [2, 4, 6]
        # The temperature that was set, not that of the checkpoint which it went on from.
        assert model.info["temperature"] == pytest.approx(trial["settings"]["loss.temperature"], rel=1e-3)


def test_ctrl_c_leaves_a_result_and_trials_go_on_over_shares_of_the_data(head: Head, workspace: Path) -> None:
    settings = ["tune.name=shares", "tune.search={loss.temperature: 'loguniform(0.02, 0.5)'}", "tune.trials=2"]
    settings += ["train.steps=8", "tune.report_every=2", "tune.fidelity={name: fraction, least: 0.5}"]
    settings += ["tune.searcher=bohb", "tune.scheduler={name: hyperband, reduction_factor: 2}"]
    process = under_way(head, workspace, settings, lambda trials: any(trial["curve"] for trial in trials))
    try:
        process.send_signal(signal.SIGINT)
        assert process.wait(DEADLINE_S) == 0, (workspace / "log").read_text()[-4000:]
    finally:
        process.kill()
    stopped = record(workspace, settings)
    assert stopped is not None
    assert stopped["state"] == "interrupted"
    assert "stopped" in {trial["state"] for trial in stopped["trials"]}
    assert stopped["best"]
    assert (workspace / "sweeps/shares/best.yaml").exists()
    after = done(head, workspace, settings)
    assert after["state"] == "finished"
    assert len(after["trials"]) == 2
    whole = [trial for trial in after["trials"] if trial["state"] == "finished"]
    assert whole
    for trial in whole:
        assert [row["step"] for row in trial["curve"]] == [4, 8]
        assert Model.load(trial["model"]).info["config"]["corpora"]["main"]["fraction"] == 1.0
        half = Model.load(str(Path(trial["model"]).with_name("model-1")))
        assert half.info["config"]["corpora"]["main"]["fraction"] == 0.5


def test_when_the_time_is_over_tune_is_told_as_by_ctrl_c() -> None:
    told = threading.Event()
    before = signal.getsignal(signal.SIGUSR1)
    with _time_limit(0.5 / 60) as over:
        signal.signal(signal.SIGUSR1, lambda *_: told.set())  # as Tune does
        assert told.wait(10)
        assert over.is_set()
    assert signal.getsignal(signal.SIGUSR1) == before
    with _time_limit(None) as over:
        assert not over.is_set()
