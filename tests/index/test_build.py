import os
import re
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import faiss
import lance
import numpy as np
import pytest

from rayemb import storage
from rayemb.data.embeddings import EmbeddingsTable
from rayemb.index import (
    Effort,
    Index,
    IndexArtefactError,
    IndexConfig,
    Manifest,
    build_index,
    lexical_build,
    load_manifest,
    tasks,
    verify_index,
)
from rayemb.index import build as build_module
from rayemb.index.ledger import Ledger, Written, fingerprint
from rayemb.index.manifest import ShardFile

from .tables import DIGEST, exact_vectors, naive_search, random_vectors, write_table

FLAT = IndexConfig(factory="Flat", recall_queries=0)


def _whole(manifest: Manifest) -> list[str]:
    """All files of an index."""
    return sorted(["manifest.json", *(file.file for file in manifest.files)])


def _files(uri: str) -> list[str]:
    return [file.removeprefix(uri + "/") for file in storage.list_files(uri)]


def test_shards_find_what_one_shard_finds_when_all_neighbours_lie_in_one(ray_cluster: str, tmp_path: Path) -> None:
    # Sorted by the first coordinate: the neighbours of an extreme row are all in the first or the last shard.
    vectors = exact_vectors(601)
    vectors = vectors[np.argsort(vectors[:, 0], kind="stable")]
    embeddings = write_table(tmp_path / "e", vectors)
    build_index(embeddings, str(tmp_path / "one"), FLAT.model_copy(update={"shards": 1}))
    manifest = build_index(embeddings, str(tmp_path / "four"), FLAT.model_copy(update={"shards": 4}))
    assert [shard.rows for shard in manifest.shards] == [150, 150, 150, 151]
    queries = np.concatenate([vectors[:10], vectors[-10:]])
    with Index.open(str(tmp_path / "one")) as one, Index.open(str(tmp_path / "four")) as four:
        for k in (1, 10, 200, 601):
            a, b = one.search(queries, k), four.search(queries, k)
            assert a.keys.tolist() == b.keys.tolist() == naive_search(vectors, queries, k)[1]
            assert a.scores.tolist() == b.scores.tolist()


def test_ivf_shards_share_their_quantiser(ray_cluster: str, tmp_path: Path) -> None:
    vectors = random_vectors(1500)
    embeddings = write_table(tmp_path / "e", vectors)
    config = IndexConfig(factory="IVF32,Flat", nprobe=3, shards=3, train_rows=1000, recall_queries=0)
    uri = str(tmp_path / "i")
    manifest = build_index(embeddings, uri, config)
    shards = [faiss.read_index(storage.join(uri, shard.file)) for shard in manifest.shards]
    centroids = [shard.quantizer.reconstruct_n(0, 32) for shard in shards]
    assert all((each == centroids[0]).all() for each in centroids)
    # FAISS alone, unsharded: the same quantiser, all rows, the same probes.
    whole = faiss.IndexIVFFlat(shards[0].quantizer, 16, 32, faiss.METRIC_INNER_PRODUCT)
    whole.add(vectors)
    whole.nprobe = 3
    scores, keys = whole.search(vectors[:100], 10)
    with Index.open(uri) as index:
        hits = index.search(vectors[:100], 10)
    assert hits.keys.tolist() == keys.tolist()
    np.testing.assert_allclose(hits.scores, scores, atol=1e-6)


def test_the_same_config_gives_the_same_shards(ray_cluster: str, tmp_path: Path) -> None:
    embeddings = write_table(tmp_path / "e", random_vectors(400))
    config = IndexConfig(factory="IVF8,Flat", recall_queries=0, train_rows=200)
    a = build_index(embeddings, str(tmp_path / "a"), config)
    b = build_index(embeddings, str(tmp_path / "b"), config)
    assert [shard.sha256 for shard in a.shards] == [shard.sha256 for shard in b.shards]


def test_a_shard_is_a_file_that_faiss_reads_alone(ray_cluster: str, tmp_path: Path) -> None:
    vectors = random_vectors(90)
    lines: list[str] = []
    uri = str(tmp_path / "i")
    manifest = build_index(write_table(tmp_path / "e", vectors), uri, FLAT, model_digest=DIGEST, progress=lines.append)
    assert (manifest.model_digest, manifest.dim, manifest.factory) == (DIGEST, 16, "Flat")
    assert (manifest.embeddings.version, manifest.embeddings.rows) == (1, 90)
    assert manifest.recall is None
    assert manifest.build.faiss == faiss.__version__
    found = faiss.read_index(storage.join(uri, manifest.shards[1].file)).search(vectors[60:61], 1)[1]
    assert found.tolist() == [[60 - 45]]
    assert any(line.startswith("shard-00001.faiss: 45 rows") for line in lines)
    assert lines[-1].startswith(f"index {manifest.version}: 90 rows in 2 shards")


def test_keys_are_offsets_also_after_deletions_and_appends(ray_cluster: str, tmp_path: Path) -> None:
    uri = write_table(tmp_path / "e", random_vectors(100))
    lance.dataset(uri).delete("id in ('item-3', 'item-60')")
    write_table(uri, random_vectors(50, seed=1), ids=[f"new-{i}" for i in range(50)], mode="append")
    build_index(uri, str(tmp_path / "i"), FLAT)
    table = EmbeddingsTable.open(uri)
    with Index.open(str(tmp_path / "i")) as index:
        assert index.rows == 148
        keys = index.search(table.vectors(0, 148), 1).keys[:, 0]
        assert keys.tolist() == list(range(148))
        assert index.payload(keys) == table.take(list(range(148)), ["id"])
        assert index.key("new-0") == 98


@pytest.mark.parametrize(
    ("rows", "settings", "where", "message"),
    [
        (0, {}, None, "has no rows"),
        (1, {"shards": 2}, "index.shards", "2 shards of 1 rows"),
        (
            50,
            {"factory": "IVF64,Flat"},
            "index.factory",
            "IVF64,Flat needs at least 64 rows to train .* has 50",
        ),
        (50, {"factory": "PQ4"}, "index.factory", "at least 256 rows"),
        (90, {"factory": "IVF64,Flat", "train_rows": 40}, "index.train_rows", "the sample has 40"),
        (90, {"words": "title"}, "index.words", "no text column 'title'.*texts: none"),
        (50, {"factory": "PQ5x4"}, "index.factory", "16 dimensions"),
    ],
)
def test_what_cannot_be_built_is_said_before_any_work(
    ray_cluster: str, tmp_path: Path, rows: int, settings: dict[str, Any], where: str | None, message: str
) -> None:
    embeddings = write_table(tmp_path / "e", random_vectors(rows))
    with pytest.raises(IndexArtefactError, match=message) as caught:
        build_index(embeddings, str(tmp_path / "i"), IndexConfig(**settings))
    assert caught.value.where == (where or embeddings)
    assert not (tmp_path / "i").exists()


def test_another_model_is_said_before_any_work(ray_cluster: str, tmp_path: Path) -> None:
    embeddings = write_table(tmp_path / "e", random_vectors(10))
    with pytest.raises(IndexArtefactError, match="of model 0123456789ab, not of ffffffffffff"):
        build_index(embeddings, str(tmp_path / "i"), FLAT, model_digest="f" * 64)


def test_without_ray_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    with pytest.raises(IndexArtefactError, match="not connected to Ray"):
        build_index(str(tmp_path / "e"), str(tmp_path / "i"), FLAT)


def test_duplicate_ids_are_named(ray_cluster: str, tmp_path: Path) -> None:
    ids = [f"id-{i}" for i in range(30)]
    ids[29], ids[7] = ids[2], ids[5]
    embeddings = write_table(tmp_path / "e", random_vectors(30), ids=ids)
    with pytest.raises(IndexArtefactError, match="occur more than once") as caught:
        build_index(embeddings, str(tmp_path / "i"), FLAT)
    assert "'id-2'" in caught.value.what
    assert "'id-5'" in caught.value.what
    assert "'id-7'" not in caught.value.what
    assert _files(str(tmp_path / "i")) == []


def test_a_rebuild_takes_over_in_one_step(ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings, uri = write_table(tmp_path / "e", random_vectors(60)), str(tmp_path / "i")
    old = build_index(embeddings, uri, FLAT)
    reader = Index.open(uri)
    seen: list[list[str]] = []
    publish = build_module.publish_manifest

    def watched(where: str, manifest: Any) -> Any:
        seen.append(_files(uri))
        with Index.open(uri) as index:
            assert index.version == old.version
        return publish(where, manifest)

    monkeypatch.setattr(build_module, "publish_manifest", watched)
    vectors = random_vectors(60, seed=5)
    write_table(tmp_path / "e", vectors)
    new = build_index(embeddings, uri, FLAT)
    assert {*_whole(old), *_whole(new)} < set(seen[0])
    assert all("/ledger/" in file for file in {*seen[0]} - {*_whole(old), *_whole(new)})
    assert _files(uri) == _whole(new)
    assert set(_whole(old)) & set(_whole(new)) == {"manifest.json"}
    # A reader that was open goes on with the version that it opened.
    assert reader.search(random_vectors(60), 1).keys[:, 0].tolist() == list(range(60))
    with Index.open(uri) as index:
        assert index.search(vectors, 1).keys[:, 0].tolist() == list(range(60))


def test_a_build_that_fails_halfway_leaves_the_old_index(ray_cluster: str, tmp_path: Path) -> None:
    vectors, uri = random_vectors(60), str(tmp_path / "i")
    embeddings = write_table(tmp_path / "e", vectors)
    old = build_index(embeddings, uri, FLAT)
    spoilt = vectors.copy()
    spoilt[45, 3] = np.nan  # the first shard is fine and gets written
    write_table(tmp_path / "e", spoilt)
    with pytest.raises(IndexArtefactError, match=r"NaN or infinity in 1 rows \(45"):
        build_index(embeddings, uri, FLAT)
    assert _files(uri) == _whole(old)
    with Index.open(uri) as index:
        assert index.version == old.version
        assert index.search(vectors, 1).keys[:, 0].tolist() == list(range(60))


@pytest.mark.parametrize("settings", [{}, {"by": "hash"}, {"by": "cell", "factory": "IVF4,Flat", "train_rows": 100}])
def test_a_build_that_was_interrupted_goes_on_with_what_is_missing(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    vectors = random_vectors(160)
    embeddings, uri = write_table(tmp_path / "e", vectors), str(tmp_path / "i")
    config = IndexConfig(**{"factory": "Flat", "recall_queries": 0, "shards": 4, **settings})
    undisturbed = build_index(embeddings, str(tmp_path / "other"), config)
    old = build_index(write_table(tmp_path / "old", random_vectors(60)), uri, FLAT)
    build_shard = tasks.build_shard

    def failing(*arguments: Any) -> Any:
        if arguments[5] == 2:
            for _ in range(600):  # the others get through
                if len(list(Path(uri).glob("v-*/ledger/shard-*.json"))) == 3:
                    break
                time.sleep(0.1)
            raise OSError(28, "No space left on device")
        return build_shard(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(tasks, "build_shard", failing)
        with pytest.raises(OSError, match="No space left"):
            build_index(embeddings, uri, config)
    assert load_manifest(uri).version == old.version
    Index.open(uri).close()
    there = {file: Path(file).stat().st_ino for file in storage.list_files(uri) if "shard-" in file}
    lines: list[str] = []
    new = build_index(embeddings, uri, config, progress=lines.append)
    assert "3 of 4 shards are there from an earlier run" in lines
    assert len([line for line in lines if line.startswith("shard-")]) == 1
    now = {file: Path(file).stat().st_ino for file in storage.list_files(uri) if "shard-" in file}
    kept = [file for file in there if file.endswith((".faiss", ".keys")) and old.trained.file.split("/")[0] not in file]
    assert len(kept) == 3 + 4 * (config.by != "rows")
    assert all(now[file] == there[file] for file in kept)
    # The manifest is that of a build which nothing happened to, but for when and where.
    apart = {"created", "build"}
    a, b = new.model_dump_json(exclude=apart), undisturbed.model_dump_json(exclude=apart)
    assert re.sub(r"v-\d{8}T\d{6}", "", a) == re.sub(r"v-\d{8}T\d{6}", "", b)
    assert not any("ledger" in file for file in _files(uri))
    with Index.open(uri) as index:
        assert index.search(vectors, 1, effort=Effort(nprobe=4)).keys[:, 0].tolist() == list(range(160))


@pytest.mark.parametrize("by", ["rows", "hash"])
def test_words_are_built_with_the_index_and_go_on_after_an_interruption(
    ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: Any
) -> None:
    texts = [f"Number {row % 7}, g{row}" for row in range(90)]
    embeddings, uri = write_table(tmp_path / "e", random_vectors(90), {"text": texts}), str(tmp_path / "i")
    config = IndexConfig(factory="Flat", shards=3, by=by, words="text", recall_queries=0)
    write_words = lexical_build.write_words

    def failing(*arguments: Any) -> Any:
        if arguments[5] == 1:
            for _ in range(600):  # the others get through
                if len(list(Path(uri).glob("v-*/ledger/words-*.json"))) == 2:
                    break
                time.sleep(0.1)
            raise OSError(28, "No space left on device")
        return write_words(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(lexical_build, "write_words", failing)
        with pytest.raises(OSError, match="No space left"):
            build_index(embeddings, uri, config)
    there = {file: Path(file).stat().st_ino for file in storage.list_files(uri, ".arrow")}
    assert len(there) == 2
    manifest = build_index(embeddings, uri, config)
    assert {file: Path(file).stat().st_ino for file in there} == there
    assert _files(uri) == _whole(manifest)
    assert manifest.words is not None
    assert (manifest.words.column, manifest.words.length) == ("text", 180 + 90)
    with Index.open(uri) as index:
        assert sorted(index.words("number of G5, g7", 2).keys[0].tolist()) == [5, 7]
        assert sorted(index.words("3", 30).keys[0].tolist())[-13:] == list(range(3, 90, 7))
    damaged = Path(uri, manifest.words.shards[1].file)
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert "words-00001.arrow: the checksum differs" in verify_index(uri).problems[0]
    with pytest.raises(IndexArtefactError, match="checksum differs"):
        Index.open(uri)


def test_leftovers_are_kept_for_a_day_and_others_files_for_ever(ray_cluster: str, tmp_path: Path) -> None:
    embeddings, uri = write_table(tmp_path / "e", random_vectors(60)), str(tmp_path / "i")
    young = Path(uri, f"v-{datetime.now(UTC):%Y%m%dT%H%M%S}-00000000", "trained.faiss")
    old = Path(uri, "v-20200101T000000-00000000", "shard-00000.faiss")
    foreign = Path(uri, "mine", "x.faiss")
    for path in (young, old, foreign):
        path.parent.mkdir(parents=True)
        path.write_bytes(b"")
    manifest = build_index(embeddings, uri, FLAT)
    left = {str(path.relative_to(uri)) for path in (young, foreign)}
    assert set(_files(uri)) == {*_whole(manifest), *left}


def test_shards_of_another_quantiser_are_written_again(ray_cluster: str, tmp_path: Path) -> None:
    embeddings, uri = write_table(tmp_path / "e", random_vectors(300)), str(tmp_path / "i")
    config = IndexConfig(factory="IVF4,Flat", recall_queries=0)
    table = EmbeddingsTable.open(embeddings)
    mark = fingerprint(table.uri, table.version, config, faiss.__version__)
    ledger = Ledger.open(uri, mark, set())
    ledger.write(
        "shard-00000", Written(trained="0" * 64, shard=ShardFile(file="x", bytes=0, sha256="", rows=0, start=0))
    )
    Path(uri, "x").write_bytes(b"")
    manifest = build_index(embeddings, uri, config)
    assert [shard.rows for shard in manifest.shards] == [150, 150]


def test_a_killed_worker_is_replaced(ray_cluster: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vectors, marker = random_vectors(60), str(tmp_path / "killed")
    build_shard = tasks.build_shard

    def fragile(*arguments: Any) -> Any:
        if arguments[5] > 0 and not os.path.exists(marker):
            with open(marker, "w"):
                pass
            os.kill(os.getpid(), signal.SIGKILL)
        return build_shard(*arguments)

    monkeypatch.setattr(tasks, "build_shard", fragile)
    build_index(write_table(tmp_path / "e", vectors), str(tmp_path / "i"), FLAT)
    assert os.path.exists(marker)
    with Index.open(str(tmp_path / "i")) as index:
        assert index.search(vectors, 1).keys[:, 0].tolist() == list(range(60))


MEMORY = """
import ctypes, sys
from pathlib import Path
from rayemb.data.embeddings import EmbeddingsTable
from rayemb.index import IndexConfig, tasks
from rayemb.index.ledger import Ledger

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

uri, index, factory = sys.argv[1:]
table = EmbeddingsTable.open(uri)
version, rows = table.version, table.rows
ledger = Ledger(index, "v-20260101T000000-00000000")
trained = tasks.train(uri, version, IndexConfig(factory=factory, train_rows=2000), ledger)
ctypes.CDLL(None).malloc_trim(0)
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
written = tasks.build_shard(trained, "", uri, version, ledger, 0, rows, 0)
print(written.shard.bytes, status("VmHWM") - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_shard_is_built_in_little_more_than_its_size(tmp_path: Path) -> None:
    embeddings = write_table(tmp_path / "e", random_vectors(250_000, 64))
    alone = {**os.environ, "OMP_NUM_THREADS": "1"}
    for factory in ("Flat", "IVF64,Flat"):
        command = [sys.executable, "-c", MEMORY, embeddings, str(tmp_path / factory), factory]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=alone)
        size, peak = map(int, done.stdout.split()[-2:])
        assert size > 250_000 * 64 * 4
        assert peak < 1.3 * size + (80 << 20)  # blocks of 8 MiB in Lance, Arrow and FAISS
