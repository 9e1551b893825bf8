"""The whole line with its artefacts on S3: a real server on loopback, workers that know it from their environment."""

import os
import subprocess
import sys
from collections.abc import Iterator

import boto3
import pytest
from moto.server import ThreadedMotoServer

from rayemb.cluster import ClusterConfig, local_head
from tests.e2e.conftest import SMALL

SCRIPT = """
import sys
from rayemb.cluster import connect
from rayemb.config import load
from rayemb.index import Index
from rayemb.models import Model
from rayemb.pipeline import RunConfig, run_stage

config = load(RunConfig, None, sys.argv[1:])
with connect(config.cluster):
    for stage in ("corpus", "train", "embed", "index", "evaluate"):
        run_stage(stage, config)
    model = Model.load(config.uri("model"))
    with Index.open(config.uri("index"), model_digest=model.digest) as index:
        hits = index.search(model.embed_texts(["arrow right"]), 3)
        assert len(index.payload(hits.keys[0])) == 3
"""


@pytest.fixture
def s3() -> Iterator[dict[str, str]]:
    """The environment that reaches a fresh S3 server with a bucket `runs`."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        keys = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_REGION": "us-east-1"}
        endpoint = f"http://{host}:{port}"
        client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
        )
        client.create_bucket(Bucket="runs")
        yield {**keys, "AWS_DEFAULT_REGION": "us-east-1", "AWS_ENDPOINT_URL": endpoint}
    finally:
        server.stop()


@pytest.mark.slow
def test_every_artefact_can_lie_on_s3(s3: dict[str, str]) -> None:
    quick = ["train.steps=20", "train.checkpoints.every=10", "corpus.source.limit=1500", "train.evaluation.every=20"]
    with local_head(ClusterConfig(num_cpus=4, object_store_mb=300), env=s3) as head:
        environment = {**os.environ, **head.environment(), **s3}
        command = [sys.executable, "-c", SCRIPT, "workspace=s3://runs/small", *SMALL, *quick]
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-4000:]
    client = boto3.client(
        "s3",
        endpoint_url=s3["AWS_ENDPOINT_URL"],
        aws_access_key_id="test",
        aws_secret_access_key="test",
        region_name="us-east-1",
    )
    keys = {entry["Key"] for entry in client.list_objects_v2(Bucket="runs")["Contents"]}
    for name in ("corpus/_corpus.json", "model/rayemb.json", "index/manifest.json", "report/index.html"):
        assert f"small/{name}" in keys
    assert any(key.startswith("small/runs/train-") and key.endswith("position.json") for key in keys)
    assert any(key.startswith("small/embeddings.lance/") for key in keys)
