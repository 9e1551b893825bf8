from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayemb.index import FilterError, IndexArtefactError, IndexConfig, QueryError, Shard

from .conftest import ROWS, Built, payload_of
from .tables import build_here, naive_search, random_vectors, write_table


def test_a_shard_finds_its_own_rows(flat: Built) -> None:
    shard = Shard.open(flat.uri, flat.manifest, 1)
    assert (shard.info.start, shard.info.rows) == (333, 333)
    scores, keys = shard.search(flat.vectors[:20], 12)
    mine = [333 <= row < 666 for row in range(ROWS)]
    expected_scores, expected_keys = naive_search(flat.vectors, flat.vectors[:20], 12, mine)
    assert (scores.dtype, keys.dtype) == (np.float32, np.int64)
    assert scores.tolist() == expected_scores
    assert keys.tolist() == expected_keys


@pytest.mark.parametrize("conditions", [{"group": "g5"}, {"parity": 1, "sold": True}, {"price": 100.25}])
def test_a_filtered_search_equals_the_naive_one(flat: Built, conditions: dict[str, Any]) -> None:
    shard = Shard.open(flat.uri, flat.manifest, 1)
    _, keys = shard.search(flat.vectors[:10], 10, conditions)
    keep = [
        333 <= row < 666 and all(payload_of(row)[name] == value for name, value in conditions.items())
        for row in range(ROWS)
    ]
    assert keys.tolist() == naive_search(flat.vectors, flat.vectors[:10], 10, keep)[1]


def test_places_that_no_row_fills_are_minus_one_and_minus_infinity(flat: Built) -> None:
    shard = Shard.open(flat.uri, flat.manifest, 0)
    scores, keys = shard.search(flat.vectors[:2], 500)
    assert sorted(keys[0, :333].tolist()) == list(range(333))
    assert (keys[:, 333:] == -1).all()
    assert np.isneginf(scores[:, 333:]).all()
    scores, keys = shard.search(flat.vectors[:2], 3, {"group": "nobody"})
    assert (keys == -1).all()
    assert np.isneginf(scores).all()
    assert shard.search(np.zeros((0, 8), np.float32), 3)[1].shape == (0, 3)


@pytest.mark.parametrize(
    ("vectors", "k", "message"),
    [
        (np.full((1, 8), np.nan), 3, "vector 0 holds NaN or infinity"),
        ([[0.0] * 8, [np.inf] + [0.0] * 7], 3, "vector 1 holds NaN or infinity"),
        (np.zeros((1, 9)), 3, r"expected vectors of shape \(N, 8\), got \(1, 9\)"),
        (np.zeros(8), 3, r"got \(8,\)"),
        ([[1.0], [1.0, 2.0]], 3, "all of one length"),
        (np.zeros((1, 8)), 0, "k must be at least 1"),
    ],
)
def test_a_query_that_cannot_be_answered_is_an_error(flat: Built, vectors: Any, k: int, message: str) -> None:
    with pytest.raises(QueryError, match=message):
        Shard.open(flat.uri, flat.manifest, 0).search(vectors, k)


def test_a_filter_on_an_unknown_field_names_the_fields(flat: Built) -> None:
    shard = Shard.open(flat.uri, flat.manifest, 0)
    with pytest.raises(FilterError, match="fields: group, parity, price, sold"):
        shard.search(flat.vectors[:1], 3, {"colour": "red"})


def test_a_flipped_byte_is_refused_and_the_file_named(flat: Built, tmp_path: Path) -> None:
    damaged = flat.copy(tmp_path)
    path = damaged.shard_path(1)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    Shard.open(damaged.uri, damaged.manifest, 0)
    with pytest.raises(IndexArtefactError, match="checksum differs") as caught:
        Shard.open(damaged.uri, damaged.manifest, 1)
    assert caught.value.where == str(path)


@pytest.mark.parametrize("content", [None, b""])
def test_a_missing_or_empty_file_is_refused_and_named(flat: Built, tmp_path: Path, content: bytes | None) -> None:
    damaged = flat.copy(tmp_path)
    path = damaged.shard_path(2)
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(IndexArtefactError, match=r"shard-00002\.faiss"):
        Shard.open(damaged.uri, damaged.manifest, 2)


def test_a_manifest_that_overstates_a_shard_is_refused(flat: Built, tmp_path: Path) -> None:
    # The right checksum of the wrong file: shard 0, of 333 rows, named as shard 2, of 334.
    first, second, third = flat.manifest.shards
    longer = third.model_copy(update={"file": first.file, "sha256": first.sha256})
    manifest = flat.manifest.model_copy(update={"shards": (first, second, longer)})
    with pytest.raises(IndexArtefactError, match=r"333 vectors .* the manifest says 334"):
        Shard.open(flat.uri, manifest, 2)


def test_threads_share_a_shard(flat: Built) -> None:
    shard = Shard.open(flat.uri, flat.manifest, 1)
    filters: list[dict[str, Any] | None] = [None, {"parity": 0}, {"group": "g5"}, {"sold": True}]
    tasks = [(row, filters[row % 4]) for row in range(200)]
    expected = [shard.search(flat.vectors[row : row + 1], 7, chosen)[1].tolist() for row, chosen in tasks]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda task: shard.search(flat.vectors[task[0]][None], 7, task[1])[1].tolist(), tasks))
    assert found == expected


def _one_shard(folder: Path, factory: str, nprobe: int = 16) -> tuple[Shard, np.ndarray]:
    """A shard over 600 random vectors with a column that 1 % share, built in this process."""
    vectors = random_vectors(600)
    embeddings = write_table(folder / "e", vectors, {"rare": [row % 100 == 3 for row in range(600)]})
    manifest = build_here(embeddings, folder, IndexConfig(factory=factory, nprobe=nprobe, shards=1))
    return Shard.open(str(folder), manifest, 0), vectors


@pytest.mark.parametrize("factory", ["IVF32,Flat", "HNSW16", "PQ8x4"])
def test_one_percent_is_found_whole_by_any_type(factory: str, tmp_path: Path) -> None:
    # With nprobe=1 an IVF search that probed no more under a filter would find a row or none.
    shard, vectors = _one_shard(tmp_path, factory, nprobe=1)
    _, keys = shard.search(vectors[:20], 6, {"rare": True})
    rare = [row % 100 == 3 for row in range(600)]
    assert keys.tolist() == naive_search(vectors, vectors[:20], 6, rare)[1]


def test_ties_for_the_last_place_go_to_the_lowest_keys_whatever_their_number(tmp_path: Path) -> None:
    # Five better rows come last and push five of the ties that came first out of FAISS's heap.
    tied, better = np.repeat(np.array([[0.5], [1.0]], np.float32), 4, axis=1) * [[1, 1, 1, 1], [1, 0, 0, 0]]
    vectors = np.concatenate([np.tile(tied, (595, 1)), np.tile(better, (5, 1))]).astype(np.float32)
    embeddings = write_table(tmp_path / "e", vectors)
    manifest = build_here(embeddings, tmp_path, IndexConfig(factory="Flat", shards=1))
    _, keys = Shard.open(str(tmp_path), manifest, 0).search(np.tile(better, (3, 1)), 10)
    assert keys.tolist() == [[595, 596, 597, 598, 599, 0, 1, 2, 3, 4]] * 3
