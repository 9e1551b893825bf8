"""A store that answers 500, 503 or nothing: tried again with growing pauses, then named; never taken for bad data."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import boto3
import numpy as np
import pytest

from rayemb import storage
from rayemb.config import from_mapping
from rayemb.data import Corpus, CorpusConfig
from rayemb.data.augment import AugmentConfig
from rayemb.data.decode import Decoder, DecodeSettings, Member, Piece
from rayemb.data.mix import CorpusEntry
from rayemb.data.sources.files import open_stream
from rayemb.models import TextTokenizer, TokenizerConfig
from rayemb.storage import MissingError, StorageError
from tests.data.corpora import png, write_corpus
from tests.data.formats import write
from tests.data.test_sources_formats import upload
from tests.storage.conftest import BUCKET
from tests.storage.flaky import FlakyServer

BOUND_S = 40.0  # three attempts, each silent for a second, and the pauses between them (at most 20 s each)


@pytest.fixture
def flaky(s3: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyServer]:
    """A server that fails when told to; three attempts, a second of patience."""
    server = FlakyServer(s3_endpoint)
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "3")
    monkeypatch.setenv("RAYEMB_S3_REQUEST_TIMEOUT_S", "1")
    monkeypatch.setenv("RAYEMB_S3_CONNECT_TIMEOUT_S", "1")
    yield server
    server.shutdown()
    server.server_close()


def put(endpoint: str, key: str, data: bytes) -> str:
    client = boto3.client(
        "s3", endpoint_url=endpoint, aws_access_key_id="test", aws_secret_access_key="test", region_name="us-east-1"
    )
    client.put_object(Bucket=BUCKET, Key=key, Body=data)
    return f"s3://{BUCKET}/{key}"


@pytest.mark.parametrize("failure", [{"status": 500}, {"status": 503}, {"silence_s": 3.0}], ids=str)
def test_what_recovers_is_read_after_pauses(failure: dict[str, Any], flaky: FlakyServer, s3_endpoint: str) -> None:
    data = os.urandom(100_000)
    uri = put(s3_endpoint, "x.bin", data)
    flaky.fail("x.bin", times=2, **failure)
    assert storage.read_bytes(uri) == data
    assert len(flaky.times) == 2


def test_a_read_that_fails_in_the_middle_goes_on(flaky: FlakyServer, s3_endpoint: str) -> None:
    data = os.urandom(20 << 20)
    uri = put(s3_endpoint, "big.bin", data)
    with open_stream(uri) as stream:
        first = stream.read(1000)
        flaky.fail("big.bin", times=2, status=503)
        assert first + stream.read() == data
    assert len(flaky.times) == 2


@pytest.mark.parametrize(
    ("failure", "answer"),
    [({"status": 500}, "500"), ({"status": 503}, "503"), ({"silence_s": 9.0}, "Timeout")],
    ids=str,
)
def test_what_never_recovers_is_named_with_attempts_and_answer(
    failure: dict[str, Any], answer: str, flaky: FlakyServer, s3_endpoint: str
) -> None:
    uri = put(s3_endpoint, "x.bin", b"1")
    flaky.fail("x.bin", times=50, **failure)
    start = time.monotonic()
    with pytest.raises(StorageError, match=rf"up to 3 attempts a request: AWS Error .*{answer}") as caught:
        storage.read_bytes(uri)
    assert time.monotonic() - start < BOUND_S
    assert len(flaky.times) == 3
    assert caught.value.where == uri
    assert "storage.retries" in caught.value.fix
    assert type(caught.value) is StorageError  # neither missing nor unreadable: an outage


def test_a_file_that_is_not_there_is_asked_for_once(flaky: FlakyServer) -> None:
    with pytest.raises(MissingError):
        storage.read_bytes(f"s3://{BUCKET}/none")
    assert sum(flaky.seen.values()) <= 2


def test_lance_tries_again_and_then_names_the_table(
    flaky: FlakyServer, s3: str, tmp_path: Path, s3_endpoint: str
) -> None:
    config = write("lance", tmp_path)
    for path in (tmp_path / "rows.lance").rglob("*"):
        if path.is_file():
            put(s3_endpoint, f"rows.lance/{path.relative_to(tmp_path / 'rows.lance')}", path.read_bytes())
    config["uri"] = f"{s3}/rows.lance"
    source = from_mapping(CorpusConfig, {"source": config}).source
    units = source.units(0)
    flaky.fail(".lance/data", times=2, status=503)
    assert sum(1 for _ in source.read(units[0])) == 4
    flaky.fail(".lance/data", times=500, status=503)
    start = time.monotonic()
    with pytest.raises(StorageError, match=r"up to 3 attempts.*503") as caught:
        list(source.read(units[1]))
    assert time.monotonic() - start < BOUND_S
    assert caught.value.where.startswith(f"{s3}/rows.lance")


@pytest.mark.parametrize("form", ["parquet", "webdataset", "jsonl .gz", "datasets", "csv"])
def test_an_outage_while_reading_is_an_error_and_no_bad_row(
    form: str, flaky: FlakyServer, s3: str, tmp_path: Path, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write(form, tmp_path)
    with monkeypatch.context() as direct:
        direct.setenv("AWS_ENDPOINT_URL", s3_endpoint)
        upload(tmp_path, f"{s3}/data")
    placed = json.loads(json.dumps(config).replace("{root}", f"{s3}/data"))
    source = from_mapping(CorpusConfig, {"source": placed}).source
    units = source.units(0)
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    flaky.fail("rows/", times=50, status=503)
    with pytest.raises(StorageError, match=r"up to 1 attempt a request: AWS Error"):
        list(source.read(units[-1]))


def test_a_training_stream_outlasts_a_short_outage_and_names_a_long_one(
    flaky: FlakyServer, s3: str, tmp_path: Path, s3_endpoint: str
) -> None:
    write_corpus(tmp_path / "corpus", {"train": [20]})
    for path in (tmp_path / "corpus").rglob("*.*"):
        put(s3_endpoint, str(path.relative_to(tmp_path)), path.read_bytes())
    corpus = Corpus.open(f"{s3}/corpus")
    members = [Member(CorpusEntry(), corpus.kind, corpus.row_groups("train"), corpus.image_limits)]
    tokenizer = TextTokenizer.train(["text"], TokenizerConfig(vocab_size=600))
    decoder = Decoder(members, DecodeSettings(tokenizer, 8, 0, AugmentConfig()))
    flaky.fail("shard-00000", times=2, status=503)
    arrays, bad = decoder(Piece(0, ((0, np.arange(5)),)))
    assert arrays["row"].tolist() == list(range(5))
    assert bad == []
    assert len(flaky.times) == 2
    flaky.fail("shard-00000", times=50, status=503)
    with pytest.raises(StorageError, match="503") as caught:
        decoder(Piece(1, ((0, np.arange(10, 15)),)))
    assert caught.value.where == f"{s3}/corpus/split=train/shard-00000.parquet"


@pytest.mark.parametrize("status", [500, 403])
def test_an_image_that_the_store_refuses_is_an_error_and_not_missing(
    status: int, flaky: FlakyServer, s3: str, s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    for n in range(3):
        put(s3_endpoint, f"images/{n}.png", png(n))
    lines = [json.dumps({"id": n, "image": f"{n}.png", "text": "t"}) for n in range(3)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    config = {"name": "jsonl", "uri": str(tmp_path), "image_root": f"{s3}/images"}
    source = from_mapping(CorpusConfig, {"source": config}).source
    (unit,) = source.units(0)
    assert [row.image for row in source.read(unit)] == [png(0), png(1), png(2)]
    flaky.fail("1.png", times=9, status=status)
    with pytest.raises(StorageError, match=r"AWS Error"):
        list(source.read(unit))


BUILD = """
import sys
from rayemb.cluster import connect
from rayemb.config import load
from rayemb.errors import RayembError
from rayemb.pipeline.config import RunConfig
from rayemb.pipeline.stages import run_stage

config = load(RunConfig, sys.argv[1])
with connect(config.cluster, config.storage.environment()):
    for place in sys.argv[2:]:
        try:
            outcome = run_stage("corpus", config.model_copy(update={"workspace": place}))
            print("built", outcome.figures["rows"], outcome.figures["quarantine"])
        except RayembError as error:
            print("failed", type(error).__name__, error)
        print("next", file=sys.stderr, flush=True)
        sys.stdin.readline()
"""


def test_the_storage_section_reaches_every_worker_and_no_manifest(
    ray_cluster: str, flaky: FlakyServer, s3: str, s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write("parquet", tmp_path)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    upload(tmp_path, f"{s3}/data")
    # The cluster runs already, and neither it nor this driver knows any of this but from the config.
    outside = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RAYEMB_S3"))}
    storage_section = {
        "endpoint": flaky.url,
        "region": "us-east-1",
        "access_key": "test",
        "secret_key": "hush-hush-9f3",
        "retries": 3,
        "request_timeout_s": 1,
    }
    config = {
        "cluster": {"address": os.environ["RAY_ADDRESS"]},
        "storage": storage_section,
        "corpus": {"source": source | {"uri": f"{s3}/data/rows"}, "max_bad_fraction": 0},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    places = [str(tmp_path / "good"), str(tmp_path / "bad")]
    flaky.fail("rows/", times=3, status=503)
    command = [sys.executable, "-c", BUILD, str(tmp_path / "run.yaml"), *places]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=outside | {"AWS_EC2_METADATA_DISABLED": "true"}, text=True, **pipes) as run:
        assert run.stderr is not None
        while "next" not in (line := run.stderr.readline()):
            assert line or run.poll() is None, run.communicate()
        assert len(flaky.times) == 3
        flaky.fail("b.parquet", times=500, status=503)
        out, errors = run.communicate("\n\n", timeout=120)
    first, second = [line for line in out.splitlines() if line.startswith(("built", "failed"))]
    assert first == "built 10 {'rows': 0, 'reasons': {}}", (out, errors)
    assert second.startswith(f"failed StorageError {s3}/data/rows/b.parquet: cannot read it"), second
    assert "up to 3 attempts a request: AWS Error" in second
    assert not (tmp_path / "bad/corpus/_corpus.json").exists()
    written = [path.read_bytes() for path in (tmp_path / "good").rglob("*") if path.is_file()]
    assert written
    assert not any(b"hush-hush" in data for data in written)
    assert "hush-hush" not in out + errors
