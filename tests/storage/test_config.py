"""The storage section: what it tells every process, and what it never tells anybody."""

import gzip
import json
import os
import pickle
from pathlib import Path

import pyarrow as pa
import pytest
import yaml

from rayemb import storage
from rayemb.config import ConfigError, dump, from_mapping
from rayemb.pipeline.config import RunConfig
from rayemb.storage import StorageConfig, StorageError, UnreadableError, is_store_failure, storage_error

KEYS = {"access_key": "AKIA1", "secret_key": "hush-hush-1", "session_token": "hush-hush-2"}


def test_an_empty_section_says_nothing() -> None:
    assert StorageConfig().environment() == {}


def test_every_field_becomes_a_variable() -> None:
    section = {"endpoint": "http://minio:9000", "region": "eu-central-1", "retries": 3, **KEYS}
    config = from_mapping(StorageConfig, {**section, "connect_timeout_s": 2, "request_timeout_s": 7.5})
    assert config.environment() == {
        "AWS_ENDPOINT_URL": "http://minio:9000",
        "AWS_ENDPOINT_URL_S3": "http://minio:9000",
        "AWS_REGION": "eu-central-1",
        "AWS_DEFAULT_REGION": "eu-central-1",
        "AWS_ACCESS_KEY_ID": "AKIA1",
        "AWS_SECRET_ACCESS_KEY": "hush-hush-1",
        "AWS_SESSION_TOKEN": "hush-hush-2",
        "AWS_MAX_ATTEMPTS": "3",
        "RAYEMB_S3_CONNECT_TIMEOUT_S": "2.0",
        "RAYEMB_S3_REQUEST_TIMEOUT_S": "7.5",
    }
    assert from_mapping(StorageConfig, {"anonymous": True}).environment() == {"AWS_SKIP_SIGNATURE": "true"}
    # A token that lies around belongs to other keys.
    only_keys = from_mapping(StorageConfig, {"access_key": "a", "secret_key": "b"})
    assert only_keys.environment()["AWS_SESSION_TOKEN"] == ""


def test_no_secret_is_in_any_dump() -> None:
    config = from_mapping(RunConfig, {"storage": {"endpoint": "http://minio:9000", **KEYS}})
    assert from_mapping(RunConfig, yaml.safe_load(dump(config))).storage == StorageConfig(
        endpoint="http://minio:9000"
    )  # it can be read again
    for text in (dump(config), config.model_dump_json(), repr(config), str(config), json.dumps(config.model_dump())):
        assert "hush-hush" not in text
        assert "minio" in text
    assert pickle.loads(pickle.dumps(config)).storage.environment() == config.storage.environment()


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"access_key": "a"}, "access_key and secret_key are set together"),
        ({"secret_key": "hush-hush"}, "access_key and secret_key are set together"),
        ({"anonymous": True, "access_key": "a", "secret_key": "hush-hush"}, "anonymous access has no access_key"),
        ({"endpoint": "minio:9000"}, "storage.endpoint"),
        ({"retries": 0}, "storage.retries"),
        ({"request_timeout_s": 0}, "storage.request_timeout_s"),
    ],
)
def test_what_makes_no_sense_is_refused_without_telling(section: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        from_mapping(RunConfig, {"storage": section})
    assert "hush-hush" not in str(caught.value)


@pytest.mark.parametrize("name", ["AWS_MAX_ATTEMPTS", "RAYEMB_S3_CONNECT_TIMEOUT_S", "RAYEMB_S3_REQUEST_TIMEOUT_S"])
@pytest.mark.parametrize("value", ["many", "0", "-1", "nan"])
def test_a_variable_that_is_no_number_is_named(name: str, value: str, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(StorageError, match="not a number above 0") as caught:
        storage.filesystem(f"{s3}/x")
    assert caught.value.where == name


def test_the_section_leads_to_the_store(s3: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("AWS_") and name != "AWS_EC2_METADATA_DISABLED"]:
        monkeypatch.delenv(name)
    section = {"endpoint": s3_endpoint, "region": "us-east-1", "access_key": "a", "secret_key": "b"}
    config = from_mapping(StorageConfig, {**section, "retries": 2})
    before = dict(os.environ)
    with storage.environment(config.environment()):
        storage.write_bytes(f"{s3}/x", b"1")
        assert storage.read_bytes(f"{s3}/x") == b"1"
        assert storage.lance_options(s3)["client_max_retries"] == "1"
        assert storage.lance_options(s3)["allow_http"] == "true"
    assert dict(os.environ) == before
    with storage.environment(from_mapping(StorageConfig, {"endpoint": s3_endpoint, "anonymous": True}).environment()):
        assert storage.exists(f"{s3}/x")
    assert storage.lance_options("/local") == {}


def test_one_client_serves_while_the_settings_are_the_same(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = storage.filesystem(f"{s3}/a")[0]
    assert storage.filesystem(f"{s3}/b")[0] is first
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "5")
    assert storage.filesystem(f"{s3}/a")[0] is not first


# -- what went wrong -------------------------------------------------------------------------------------------


def test_a_packed_file_is_read_as_it_is(root: str) -> None:
    data = gzip.compress(b"content")
    uri = storage.join(root, "a.txt.gz")
    storage.write_bytes(uri, data)
    assert storage.read_bytes(uri) == data
    assert storage.sha256_file(uri) == storage.sha256_bytes(data)
    assert storage.read_bytes(uri, 5) == data[:5]


def test_one_file_that_cannot_be_read_is_told_from_a_store_that_fails(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / ("x" * 300), tmp_path / "loop"):
        if place.name == "loop":
            place.symlink_to(place)
        with pytest.raises(UnreadableError):
            storage.read_bytes(str(place))


@pytest.mark.parametrize(
    ("error", "store"),
    [
        (OSError(5, "Input/output error"), True),
        (OSError("When reading: AWS Error SLOW_DOWN during GetObject operation: Please reduce"), True),
        (OSError("When reading: AWS Error NETWORK_CONNECTION during HeadObject operation: curlCode: 28"), True),
        (
            pa.ArrowInvalid("LanceError(IO): Generic S3 error: Error performing GET http://x: 503 Service Unavailable"),
            True,
        ),
        (pa.ArrowInvalid("LanceError(IO): Generic S3 error: status code: 416 Range Not Satisfiable"), False),
        (OSError("Corrupt snappy compressed data."), False),
        (pa.ArrowInvalid("Parquet magic bytes not found in footer"), False),
        (ValueError("anything"), False),
    ],
)
def test_a_store_that_fails_is_told_from_a_file_that_is_damaged(error: Exception, store: bool) -> None:
    assert is_store_failure(error) is store


def test_the_same_error_is_not_wrapped_twice() -> None:
    error = StorageError("once", where="x")
    assert storage_error(error, "y", "read") is error
    assert is_store_failure(error)
