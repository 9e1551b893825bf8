import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.fs as pafs
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayemb import storage
from rayemb.index import Effort, Index, IndexArtefactError, IndexConfig, QueryError, build_index, load_manifest
from rayemb.index import searcher as searcher_module

from .conftest import ROWS, Built, payload_of
from .tables import DIGEST, build_here, exact_vectors, naive_search, write_table


@pytest.fixture(scope="module", params=["rows", "hash"])
def opened(request: pytest.FixtureRequest, flat: Built, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Index]:
    uri = flat.uri
    if request.param == "hash":
        uri = str(tmp_path_factory.mktemp("hashed"))
        build_here(flat.embeddings, uri, IndexConfig(factory="Flat", shards=3, by="hash"))
    with Index.open(uri) as index:
        yield index


def test_three_shards_answer_as_a_naive_search_of_all_rows(flat: Built) -> None:
    with Index.open(flat.uri, model_digest=DIGEST) as index:
        assert (index.rows, index.dim, index.version) == (ROWS, 8, flat.manifest.version)
        for k in (1, 10, 130):
            hits = index.search(flat.vectors[:25], k)
            scores, keys = naive_search(flat.vectors, flat.vectors[:25], k)
            assert hits.scores.tolist() == scores
            assert hits.keys.tolist() == keys


@pytest.mark.parametrize("group", ["g0", "g99", "absent"])
def test_a_filter_of_one_percent_finds_what_a_naive_search_finds(flat: Built, group: str) -> None:
    with Index.open(flat.uri) as index:
        hits = index.search(flat.vectors[:25], 12, {"group": group})
    keep = [f"g{row % 100}" == group for row in range(ROWS)]
    scores, keys = naive_search(flat.vectors, flat.vectors[:25], 12, keep)
    assert hits.keys.tolist() == keys
    assert hits.scores.tolist() == scores


def test_more_than_there_is_comes_padded(flat: Built) -> None:
    with Index.open(flat.uri) as index:
        hits = index.search(flat.vectors[:1], ROWS + 5)
    assert sorted(hits.keys[0, :ROWS].tolist()) == list(range(ROWS))
    assert hits.keys[0, ROWS:].tolist() == [-1] * 5
    assert np.isneginf(hits.scores[0, ROWS:]).all()


def test_a_search_takes_an_effort_or_the_recall_it_should_reach(flat: Built) -> None:
    with Index.open(flat.uri) as index:
        expected = index.search(flat.vectors[:5], 3).keys.tolist()
        assert index.search(flat.vectors[:5], 3, effort=Effort(1, 1, 1)).keys.tolist() == expected
        assert index.search(flat.vectors[:5], 3, recall=1.0).keys.tolist() == expected
        with pytest.raises(QueryError, match="not both"):
            index.search(flat.vectors[:5], 3, effort=Effort(), recall=0.5)
        with pytest.raises(QueryError, match="the best is 1"):
            index.search(flat.vectors[:5], 3, recall=1.1)


def test_payloads_come_in_the_order_of_the_keys(flat: Built) -> None:
    with Index.open(flat.uri) as index:
        keys = np.array([999, 0, 333, 332, 333])
        assert index.payload(keys) == [{"id": f"item-{row}", **payload_of(row)} for row in keys.tolist()]
        assert index.payload(np.array([], np.int64)) == []
        assert index.filter_fields == ["group", "parity", "price", "sold"]
        for wrong in (-1, ROWS):
            with pytest.raises(QueryError, match=f"no row {wrong}"):
                index.payload([wrong])


@given(st.lists(st.integers(-1, ROWS - 1), max_size=40))
def test_ids_are_those_of_the_keys(opened: Index, keys: list[int]) -> None:
    found = opened.ids(np.array(keys, np.int64).reshape(1, -1))
    assert found.to_pylist() == [None if key < 0 else f"item-{key}" for key in keys]


def test_images_and_keys_are_found_by_id(flat: Built) -> None:
    with Index.open(flat.uri) as index:
        assert [index.key(f"item-{row}") for row in (0, 333, 999)] == [0, 333, 999]
        assert index.key("item-1000") is None
        assert index.image("item-666") == b"image 666"
        assert index.image("item-7") is None
        assert index.image("nobody") is None


def test_queries_of_another_model_are_refused(flat: Built) -> None:
    with pytest.raises(IndexArtefactError, match="queries are of model ffffffffffff"):
        Index.open(flat.uri, model_digest="f" * 64)


def test_embeddings_of_another_model_are_refused(flat: Built, tmp_path: Path) -> None:
    other = flat.copy(tmp_path)
    path = Path(other.uri) / "manifest.json"
    path.write_text(path.read_text().replace(DIGEST, "f" * 64))
    with pytest.raises(IndexArtefactError, match="built with model ffffffffffff and the embeddings are of model"):
        Index.open(other.uri, model_digest="f" * 64)


def test_one_damaged_shard_closes_the_whole_index(flat: Built, tmp_path: Path) -> None:
    damaged = flat.copy(tmp_path)
    damaged.shard_path(2).write_bytes(damaged.shard_path(2).read_bytes()[:-1])
    with pytest.raises(IndexArtefactError, match=r"shard-00002\.faiss: the checksum differs"):
        Index.open(damaged.uri)


def test_a_rebuild_published_while_opening_is_opened_instead(
    flat: Built, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = str(tmp_path / "index")
    config = IndexConfig(factory="Flat", recall_queries=0)
    embeddings = write_table(tmp_path / "e", exact_vectors(50))
    old = build_index(embeddings, uri, config)
    new = build_index(embeddings, uri, config)
    manifests = iter([old, new])
    monkeypatch.setattr(searcher_module, "load_manifest", lambda _: next(manifests))
    with Index.open(uri) as index:
        assert index.version == new.version != old.version


# -- S3 ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def s3_environment() -> Iterator[dict[str, str]]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    yield {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    server.stop()


@pytest.fixture
def bucket(s3_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    for name, value in s3_environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))  # local copies of remote files go there
    name = f"bucket-{os.urandom(4).hex()}"
    endpoint = s3_environment["AWS_ENDPOINT_URL"]
    pafs.S3FileSystem(endpoint_override=endpoint, allow_bucket_creation=True).create_dir(name)
    return f"s3://{name}"


def test_an_index_is_built_and_opened_on_s3(
    bucket: str, s3_environment: dict[str, str], flat: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    plain = ray.remote
    monkeypatch.setattr(ray, "remote", lambda task: plain(runtime_env={"env_vars": s3_environment})(task))
    uri = f"{bucket}/some/index"
    config = IndexConfig(factory="IVF4,Flat", recall_queries=20, nprobe=4)
    build_index(flat.embeddings, uri, config)
    manifest = build_index(flat.embeddings, uri, config)  # takes the first one's place
    assert storage.list_files(uri) == sorted(
        [f"{uri}/{file}" for file in ("manifest.json", manifest.trained.file, *(s.file for s in manifest.shards))]
    )
    assert load_manifest(uri).version == manifest.version
    with Index.open(uri) as index:
        hits = index.search(flat.vectors[:5], 10)
    assert hits.keys.tolist() == naive_search(flat.vectors, flat.vectors[:5], 10)[1]


def test_damage_on_s3_is_refused_and_damage_to_the_copy_is_mended(bucket: str, flat: Built, tmp_path: Path) -> None:
    uri = f"{bucket}/index"
    for file in storage.list_files(flat.uri):
        storage.write_bytes(storage.join(uri, file.removeprefix(flat.uri + "/")), storage.read_bytes(file))
    Index.open(uri).close()
    copies = sorted((tmp_path / "rayemb-cache").glob("*shard-00001.faiss"))
    assert len(copies) == 1
    copies[0].write_bytes(b"damaged")
    Index.open(uri).close()
    remote = storage.join(uri, flat.manifest.shards[1].file)
    storage.write_bytes(remote, storage.read_bytes(remote)[:-1] + b"!")
    with pytest.raises(IndexArtefactError, match=r"s3://.*shard-00001\.faiss: the checksum differs"):
        Index.open(uri)
    storage.delete(remote)
    with pytest.raises(IndexArtefactError, match=r"s3://.*shard-00001\.faiss: the file is missing"):
        Index.open(uri)
