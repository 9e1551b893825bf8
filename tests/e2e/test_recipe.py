"""The whole line as one recipe, with its artefacts on S3: killed while it fine-tunes, gone on with, done.

The S3 server is a real one on loopback; driver and workers know it from their environment.
"""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

from rayemb import storage
from rayemb.cluster import ClusterConfig, local_head
from rayemb.data import Corpus
from rayemb.index import Index
from rayemb.models import Model

DEADLINE_S = 300
RECIPE = """
workspace: s3://runs/small
corpus:
  source: {name: demo, limit: 400, rows_per_unit: 512, image_size: 32}
train:
  steps: 6
  batch_size: 32
  workers: 1
  logging: {every: 1}
  evaluation: {every: 6}
  model:
    image: {image_size: 16, widths: [8, 16], depths: [1, 1]}
    text: {width: 16, depth: 1}
    tokenizer: {vocab_size: 600}
embed: {what: text, splits: [train], workers: 1}
index: {factory: Flat, shards: 2, recall_queries: 0}
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
    train: {seed: 1, steps: 30, checkpoints: {every: 5}, corpora: {main: {hard_negatives: 2}}}
  - {name: soup, run: soup, models: [pretrain, tune], soup: {weights: [1, 3]}}
  - {name: evaluate, run: evaluate}
"""
STEPS = ["corpus", "pretrain", "embed", "index", "mine", "tune", "soup", "evaluate"]


@pytest.fixture
def s3() -> Iterator[dict[str, str]]:
    """The environment that reaches a fresh S3 server with a bucket `runs`."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
        endpoint = f"http://{host}:{port}"
        boto3.client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
        ).create_bucket(Bucket="runs")
        environment = {**keys, "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": endpoint}
        with storage.environment(environment):
            yield environment
    finally:
        server.stop()


def recorded() -> dict[str, dict[str, Any]]:
    return {row["name"]: row for row in storage.read_json("s3://runs/small/recipe.json")["steps"]}


def objects() -> dict[str, Any]:
    pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket="runs")
    return {entry["Key"]: entry["LastModified"] for page in pages for entry in page["Contents"]}


def kill_after_a_checkpoint(command: list[str], environment: dict[str, str]) -> None:
    """Starts the recipe and kills its driver when the fine-tuning has a checkpoint."""
    driver = subprocess.Popen(command, env=environment)
    try:
        deadline = time.monotonic() + DEADLINE_S
        while not storage.list_files("s3://runs/small/tune/runs", "position.json"):
            assert driver.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
    finally:
        driver.kill()
        driver.wait()


def run(command: list[str], environment: dict[str, str]) -> str:
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-4000:]
    return ended.stdout


@pytest.mark.slow
def test_a_recipe_on_s3_goes_on_after_a_kill_and_then_has_nothing_to_do(s3: dict[str, str], tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(RECIPE)
    command = [sys.executable, "-m", "rayemb.cli", "recipe", str(file)]
    with local_head(ClusterConfig(num_cpus=4, object_store_mb=300), env=s3) as head:
        environment = {**os.environ, **head.environment(), **s3}
        kill_after_a_checkpoint(command, environment)
        killed, before = time.time(), recorded()
        assert list(before) == STEPS[: STEPS.index("tune")]
        log = run(command, environment)
        assert "rayemb recipe: 3 of 8 steps done now" in log
    after = recorded()
    assert list(after) == STEPS
    assert {name: after[name] for name in before} == before
    # Again, and there is no cluster any more: none is wanted, and nothing is written.
    there = objects()
    assert "rayemb recipe: 0 of 8 steps done now" in run(command, {**environment, "RAY_ADDRESS": "127.0.0.1:1"})
    assert objects() == there
    _each_step_read_what_the_recipe_says({name: row["digest"] for name, row in after.items()}, killed)
    for name in ("corpus/corpus/_corpus.json", "evaluate/report/index.html", "soup/soup/README.md"):
        assert f"small/{name}" in there
    assert any(key.startswith("small/embed/embeddings.lance/") for key in there)


def _each_step_read_what_the_recipe_says(digests: dict[str, str], killed: float) -> None:
    place = "s3://runs/small"
    pretrained, tuned, soup = (Model.load(f"{place}/{name}") for name in ("pretrain/model", "tune/model", "soup/soup"))
    mined = Corpus.open(f"{place}/mine/mined")
    assert (pretrained.digest, tuned.digest, mined.digest) == (digests["pretrain"], digests["tune"], digests["mine"])
    assert mined.digest != digests["corpus"]
    assert sum(map(bool, mined.column("train", "negatives"))) > 0.9 * mined.rows("train")
    assert tuned.info["init"]["digest"] == pretrained.digest
    assert [corpus["digest"] for corpus in tuned.info["corpora"]] == [mined.digest]
    # It went on from a checkpoint: its first steps are those of the run that was killed.
    assert [row["step"] for row in tuned.info["training"]] == list(range(1, 31))
    assert tuned.info["training"][0]["time"] < killed < tuned.info["training"][-1]["time"]
    ingredients = {row["digest"]: row["weight"] for row in soup.info["soup"]["ingredients"]}
    assert ingredients == {pretrained.digest: 0.25, tuned.digest: 0.75}
    assert storage.read_json(f"{place}/evaluate/report/metrics.json")["model_digest"] == soup.digest
    with Index.open(f"{place}/index/index", model_digest=pretrained.digest) as index:
        hits = index.search(pretrained.embed_texts(["arrow right"]), 3)
        assert len(index.payload(hits.keys[0])) == 3
