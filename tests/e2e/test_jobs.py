"""The stages as Ray jobs: a real head with its job server, jobs submitted, their artefacts looked at."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rayemb.cluster import ClusterConfig, Head, local_head
from rayemb.config import load
from rayemb.index import load_manifest
from rayemb.models import Model
from rayemb.pipeline import RunConfig
from tests.e2e.conftest import SMALL

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
DEADLINE_S = 400


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with local_head(ClusterConfig(num_cpus=4, object_store_mb=300)) as head:
        yield head


def submit(head: Head, entrypoint: str, arguments: list[str]) -> str:
    """Submits a job as the README says, waits for its end, and gives its log. Fails with the log."""
    ray = Path(sys.executable).with_name("ray")
    command = [ray, "job", "submit", "--address", head.dashboard, "--working-dir", ROOT, "--", "python", entrypoint]
    environment = {**os.environ, **head.environment()}
    answer = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert answer.returncode == 0, (answer.stdout + answer.stderr)[-4000:]
    return answer.stdout


def test_train_and_index_run_as_jobs(head: Head, tmp_path: Path) -> None:
    quick = ["train.steps=20", "corpus.source.limit=1500", "train.evaluation.tasks={}"]
    arguments = ["jobs/configs/demo.yaml", f"workspace={tmp_path}", *SMALL, *quick]
    config = load(RunConfig, ROOT / "jobs/configs/demo.yaml", [f"workspace={tmp_path}"])
    submit(head, "jobs/corpus.py", arguments)
    log = submit(head, "jobs/train.py", arguments)
    assert "20 steps" in log
    digest = Model.load(config.uri("model")).digest
    submit(head, "jobs/embed.py", arguments)
    log = submit(head, "jobs/index.py", arguments)
    assert "against exact search" in log
    manifest = load_manifest(config.uri("index"))
    assert manifest.model_digest == digest
    assert manifest.recall is not None
    assert manifest.recall.recall >= 0.9


def test_a_sweep_runs_without_deadlock_and_prints_its_best(head: Head, tmp_path: Path) -> None:
    small = ["corpus.source.limit=1500", "train.model.image.image_size=32", "corpus.source.rows_per_unit=512"]
    small += ["tune.trials=3", "tune.set.steps=12", "tune.set.batch_size=64", "tune.report_every=4"]
    arguments = ["jobs/configs/tune_demo.yaml", f"workspace={tmp_path}", *small]
    submit(head, "jobs/corpus.py", arguments)
    log = submit(head, "jobs/tune.py", arguments)
    assert "best val/recall@1" in log
    (sweep,) = (tmp_path / "sweeps").glob("sweep-*")
    record = json.loads((sweep / "trials.json").read_text())
    trials = record["trials"]
    assert record["state"] == "finished"
    assert len(trials) == 3
    assert all(0.02 <= trial["settings"]["loss.temperature"] <= 0.5 for trial in trials)
    best = load(RunConfig, sweep / "best.yaml")
    (winner,) = (trial for trial in trials if trial["id"] == record["best"][0])
    finished = [trial["metrics"]["val/recall@1"] for trial in trials if trial["state"] == "finished"]
    assert winner["metrics"]["val/recall@1"] == max(finished)
    assert best.train.loss.temperature == pytest.approx(winner["settings"]["loss.temperature"])


def test_the_shipped_configs_are_valid() -> None:
    for path in sorted((ROOT / "jobs/configs").glob("*.yaml")):
        load(RunConfig, path)
