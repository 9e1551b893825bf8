from pathlib import Path

import numpy as np
import pytest

from rayemb.data.embeddings import EmbeddingsTable
from rayemb.index import (
    CurvePoint,
    Effort,
    Index,
    IndexArtefactError,
    IndexConfig,
    measure,
    measure_recall,
    verify_index,
)
from rayemb.index.faiss_index import make_index
from rayemb.index.verify import efforts_of, exact_search, frontier

from .conftest import Built
from .tables import build_here, naive_search, random_vectors, write_table


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
    assert "shard-00002.faiss: the file is missing" in report.problems[1]
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


def test_recall_is_the_share_of_true_neighbours_found_of_held_out_queries(tmp_path: Path) -> None:
    vectors = random_vectors(800, 16)
    embeddings = write_table(tmp_path / "e", vectors)
    config = IndexConfig(factory="IVF32,Flat", nprobe=1, recall_queries=60, recall_k=5, min_recall=0.9, seed=3)
    uri = str(tmp_path / "i")
    manifest = build_here(embeddings, uri, config)
    recall, curve = measure(uri, manifest, k=5, queries=60, seed=3)
    assert recall is not None
    # The naive way: the same rows as queries, each one's five best others by Python's sort, the overlap counted.
    rows = np.sort(np.random.default_rng(3).choice(800, 60, replace=False))
    _, six = naive_search(vectors, vectors[rows], 6)
    expected = [[key for key in keys if key != row] for row, keys in zip(rows.tolist(), six, strict=True)]
    with Index.open(uri) as index:

        def overlap(effort: Effort) -> float:
            found = index.search(vectors[rows], 6, effort=effort).keys.tolist()
            others = [[key for key in keys if key != row][:5] for row, keys in zip(rows.tolist(), found, strict=True)]
            return float(np.mean([len(set(a) & set(b)) / 5 for a, b in zip(others, expected, strict=True)]))

        assert recall.recall == pytest.approx(overlap(Effort(nprobe=1)), abs=1e-6)
        for point in curve:
            assert point.recall == pytest.approx(overlap(point.effort), abs=1e-6)
    assert 0.1 < recall.recall < 0.6  # one list of 32: without the query itself, which it would always find
    assert curve[-1].recall == 1.0
    assert [p.ms for p in curve] == sorted(p.ms for p in curve)
    assert [p.recall for p in curve] == sorted(p.recall for p in curve)
    report = verify_index(uri, config)
    assert report.recall == recall == measure_recall(uri, manifest, k=5, queries=60, seed=3)
    assert "below index.min_recall 0.9" in report.problems[0]


def test_a_row_with_twins_is_still_left_out_of_its_own_answers(tmp_path: Path) -> None:
    vectors = np.repeat(random_vectors(20, 8), 5, axis=0)
    uri = str(tmp_path / "i")
    manifest = build_here(write_table(tmp_path / "e", vectors), uri, IndexConfig(factory="Flat"))
    for k in (1, 4, 10, 99, 500):
        recall = measure_recall(uri, manifest, k=k, queries=100)
        assert recall is not None
        assert (recall.k, recall.recall) == (min(k, 99), 1.0)


def test_a_table_of_one_row_has_nothing_to_find(tmp_path: Path) -> None:
    config = IndexConfig(factory="Flat", shards=1)
    manifest = build_here(write_table(tmp_path / "e", random_vectors(1)), tmp_path / "i", config)
    assert measure(str(tmp_path / "i"), manifest, k=10, queries=5) == (None, ())


@pytest.mark.parametrize(
    ("factory", "expected"),
    [
        ("Flat", {(16, 64, 4)}),
        ("IVF4,Flat", {(1, 64, 4), (2, 64, 4), (4, 64, 4)}),
        ("HNSW8", {(16, 2**i, 4) for i in range(4, 11)}),
        ("IVF2,SQ8,RFlat", {(nprobe, 64, rerank) for nprobe in (1, 2) for rerank in (1, 4, 16, 64)}),
    ],
)
def test_efforts_vary_what_the_type_has(factory: str, expected: set[tuple[int, int, int]]) -> None:
    found = efforts_of(make_index(16, factory), Effort())
    assert {(each.nprobe, each.ef_search, each.rerank) for each in found} == expected


def test_the_frontier_has_no_point_that_a_cheaper_one_equals() -> None:
    points = [
        CurvePoint(effort=Effort(nprobe=n), recall=recall, ms=ms)
        for n, recall, ms in [(1, 0.5, 0.2), (2, 0.5, 0.1), (4, 0.9, 0.4), (8, 0.8, 0.5), (16, 1.0, 0.6)]
    ]
    assert [point.effort.nprobe for point in frontier(points)] == [2, 4, 16]


def test_exact_search_in_blocks_is_the_naive_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayemb.index.verify._BLOCK_BYTES", 4 * 16 * 33)
    vectors = random_vectors(100, 16)
    table = EmbeddingsTable.open(write_table(tmp_path / "e", vectors))
    scores, keys = exact_search(table, vectors[:9], 7)
    expected_scores, expected_keys = naive_search(vectors, vectors[:9], 7)
    assert keys.tolist() == expected_keys
    np.testing.assert_allclose(scores, expected_scores, atol=1e-6)
