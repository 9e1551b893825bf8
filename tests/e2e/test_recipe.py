"""A whole recipe on a small corpus: killed while it trains, gone on with, done, and then nothing more to do."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rayemb import storage
from rayemb.config import load
from rayemb.data import Corpus
from rayemb.models import Model, model_digest
from rayemb.pipeline import RunConfig
from rayemb.pipeline.recipe import run_recipe

pytestmark = pytest.mark.slow

DEADLINE_S = 240
RECIPE = """
corpus:
  source: {name: demo, limit: 400, rows_per_unit: 256, image_size: 32}
train:
  steps: 8
  batch_size: 32
  workers: 1
  logging: {every: 1}
  evaluation: {tasks: {}}
  model:
    image: {image_size: 16, widths: [8, 16], depths: [1, 1]}
    text: {width: 16, depth: 1}
    tokenizer: {vocab_size: 600}
embed: {what: text, splits: [train], workers: 1}
index: {factory: Flat, shards: 1, recall_queries: 0}
mine: {negatives: 3, last_rank: 20, workers: 1}
evaluate: {splits: [zero_shot], workers: 1, samples: 100, examples: 1}
steps:
  - {name: corpus, run: corpus}
  - {name: pretrain, run: train}
  - {name: embed, run: embed}
  - {name: index, run: index}
  - {name: mine, run: mine}
  - name: tune
    run: train
    init: pretrain
    train: {seed: 1, steps: 60, checkpoints: {every: 3}, corpora: {main: {hard_negatives: 2}}}
  - {name: soup, run: soup, models: [pretrain, tune], soup: {weights: [1, 3]}}
  - {name: evaluate, run: evaluate}
"""
STEPS = ["corpus", "pretrain", "embed", "index", "mine", "tune", "soup", "evaluate"]


def recorded(folder: Path) -> dict[str, dict]:
    file = folder / "recipe.json"
    return {row["name"]: row for row in json.loads(file.read_text())["steps"]} if file.exists() else {}


def checkpoints(folder: Path) -> list[Path]:
    return sorted((folder / "tune/runs").glob("train-*/checkpoints/*/position.json"))


def files(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def config(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The recipe, after a first run that was killed in the fine-tuning."""
    folder = tmp_path_factory.mktemp("recipe")
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({**yaml.safe_load(RECIPE), "workspace": str(folder / "run")}))
    command = [sys.executable, "-m", "rayemb.cli", "recipe", str(file)]
    driver = subprocess.Popen(command, env={**os.environ, "RAY_ADDRESS": ray_cluster})
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not checkpoints(folder / "run"):
            assert driver.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        driver.kill()
        driver.wait()
    return load(RunConfig, file)


def test_a_killed_recipe_goes_on_and_a_finished_one_does_nothing(config: RunConfig) -> None:
    folder, killed = Path(config.workspace), time.time()
    before = recorded(folder)
    assert list(before) == STEPS[:5]
    found = run_recipe(config)
    assert [result.record.name for result in found] == STEPS
    assert [result.there for result in found] == [name in before for name in STEPS]
    # It went on from a checkpoint: its first steps are those of the run that was killed.
    tuned = Model.load(str(folder / "tune/model"))
    assert [row["step"] for row in tuned.info["training"]] == list(range(1, 61))
    assert tuned.info["training"][0]["time"] < killed < tuned.info["training"][-1]["time"]
    after = recorded(folder)
    assert list(after) == STEPS
    assert {name: after[name] for name in before} == before

    # Each step read what the recipe says.
    digests = {name: row["digest"] for name, row in after.items()}
    mined = Corpus.open(str(folder / "mine/mined"))
    assert mined.digest == digests["mine"] != digests["corpus"]
    assert sum(map(bool, mined.column("train", "negatives"))) > 0.9 * mined.rows("train")
    assert [corpus["digest"] for corpus in tuned.info["corpora"]] == [digests["mine"]]
    assert tuned.info["init"]["digest"] == digests["pretrain"]
    soup = Model.load(str(folder / "soup/soup"))
    assert [row["digest"] for row in soup.info["soup"]["ingredients"]] == [digests["pretrain"], digests["tune"]]
    report = storage.read_json(str(folder / "evaluate/report/metrics.json"))
    assert report["model_digest"] == soup.digest == digests["soup"]

    # Again: nothing is done, and nothing is written.
    there = files(folder)
    assert all(result.there for result in run_recipe(config))
    assert files(folder) == there

    # What is gone is made again, and what was made of it still holds: it is the same.
    shutil.rmtree(folder / "soup")
    again = run_recipe(config)
    assert [result.record.name for result in again if not result.there] == ["soup"]
    assert model_digest(str(folder / "soup/soup")) == digests["soup"]

    # Another setting of a step: it is done anew, and what reads it.
    steps = [
        step.model_copy(update={"soup": {"weights": [1, 1]}}) if step.name == "soup" else step for step in config.steps
    ]
    changed = config.model_copy(update={"steps": steps})
    assert [result.record.name for result in run_recipe(changed) if not result.there] == ["soup", "evaluate"]
    assert model_digest(str(folder / "soup/soup")) != digests["soup"]
