from pathlib import Path

import numpy as np
import pytest

from rayemb.data.embeddings import EmbeddingsTable
from rayemb.index import IndexArtefactError, IndexConfig, build_index, measure_recall, verify_index
from rayemb.index.verify import exact_search

from .conftest import Built
from .tables import naive_search, random_vectors, write_table


def test_a_sound_index_is_reported_so(flat: Built) -> None:
    report = verify_index(flat.uri, IndexConfig(recall_queries=30)).require_ok()
    assert report.ok
    assert (report.version, report.rows, report.shards) == (flat.manifest.version, 1000, 3)
    assert report.recall is not None
    # Flat is exact: with a thousand tied neighbours only the tie rule makes this 1.
    assert (report.recall.k, report.recall.queries, report.recall.recall) == (10, 30, 1.0)
    assert flat.manifest.recall is not None
    assert flat.manifest.recall.recall == 1.0


def test_every_damaged_file_is_reported(flat: Built, tmp_path: Path) -> None:
    damaged = flat.copy(tmp_path)
    damaged.shard_path(0).write_bytes(b"x")
    damaged.shard_path(2).unlink()
    report = verify_index(damaged.uri)
    assert not report.ok
    assert report.recall is None
    assert len(report.problems) == 2
    assert "shard-00000.faiss: the checksum differs" in report.problems[0]
    assert "shard-00002.faiss: the shard file is missing" in report.problems[1]
    with pytest.raises(IndexArtefactError, match="shard-00000"):
        report.require_ok()


def test_another_model_or_a_missing_table_is_reported(flat: Built, tmp_path: Path) -> None:
    other = flat.copy(tmp_path)
    path = Path(other.uri) / "manifest.json"
    text = path.read_text()
    path.write_text(text.replace(flat.manifest.model_digest, "f" * 64))
    assert "built with model ffffffffffff" in verify_index(other.uri).problems[0]
    path.write_text(text.replace(flat.embeddings, str(tmp_path / "gone")))
    assert len(verify_index(other.uri).problems) == 1


def test_recall_is_the_share_of_true_neighbours_found(ray_cluster: str, tmp_path: Path) -> None:
    vectors = random_vectors(800, 16)
    embeddings = write_table(tmp_path / "e", vectors)
    config = IndexConfig(factory="IVF32,Flat", nprobe=1, recall_queries=60, recall_k=5, min_recall=0.9, seed=3)
    manifest = build_index(embeddings, str(tmp_path / "i"), config)
    recall = manifest.recall
    assert recall is not None
    # The naive way: the same rows as queries, each one's five best by Python's sort, the overlap counted.
    rows = np.sort(np.random.default_rng(3).choice(800, 60, replace=False))
    from rayemb.index import Index

    with Index.open(str(tmp_path / "i")) as index:
        found = index.search(vectors[rows], 5).keys
    _, expected = naive_search(vectors, vectors[rows], 5)
    overlap = np.mean([len(set(a) & set(b)) / 5 for a, b in zip(found.tolist(), expected, strict=True)])
    assert recall.recall == pytest.approx(overlap, abs=1e-6)
    assert 0.2 < recall.recall < 0.9  # one list of 32 finds the query itself and a part of the rest
    report = verify_index(str(tmp_path / "i"), config)
    assert report.recall == recall
    assert "below index.min_recall 0.9" in report.problems[0]
    everything = manifest.model_copy(update={"nprobe": 32})
    assert measure_recall(str(tmp_path / "i"), everything, k=5, queries=60, seed=3).recall == 1.0


def test_exact_search_in_blocks_is_the_naive_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayemb.index.verify._BLOCK_BYTES", 4 * 16 * 33)
    vectors = random_vectors(100, 16)
    table = EmbeddingsTable.open(write_table(tmp_path / "e", vectors))
    scores, keys = exact_search(table, vectors[:9], 7)
    expected_scores, expected_keys = naive_search(vectors, vectors[:9], 7)
    assert keys.tolist() == expected_keys
    np.testing.assert_allclose(scores, expected_scores, atol=1e-6)
