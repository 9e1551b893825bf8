"""Wherever the rows lie, the answers are those of one naive search over all of them."""

import hashlib
import tempfile
from pathlib import Path
from typing import Literal

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rayemb.index import Effort, Index, IndexArtefactError, IndexConfig, build_index, load_manifest, measure_recall
from rayemb.index.faiss_index import found_by
from rayemb.index.placement import Router, cell_shards, hashed_shards

from .tables import build_here, exact_vectors, naive_search, random_vectors, write_table

By = Literal["rows", "hash", "cell"]


def _corner(rows: int) -> NDArray[np.float32]:
    """Three of four rows are one and the same vector: ties without end, and a cell that holds nearly all."""
    vectors = exact_vectors(rows, seed=rows)
    vectors[np.arange(rows) % 4 != 0] = vectors[0]
    return vectors


@settings(max_examples=15)
@given(
    st.sampled_from(["rows", "hash"]),
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(1, 60),
    st.booleans(),
    st.booleans(),
)
def test_an_exact_index_is_the_naive_search_however_it_is_sharded(
    by: By, rows: int, shards: int, k: int, twins: bool, filtered: bool
) -> None:
    # Hashed, few rows leave shards empty; twins tie across shards; k goes beyond the rows.
    vectors = _corner(rows) if twins else exact_vectors(rows)
    with tempfile.TemporaryDirectory() as folder:
        odd = [row % 3 == 1 for row in range(rows)]
        table = write_table(f"{folder}/e", vectors, {"odd": odd})
        build_here(table, f"{folder}/i", IndexConfig(factory="Flat", by=by, shards=min(shards, rows)))
        with Index.open(f"{folder}/i") as index:
            hits = index.search(vectors[:7], k, {"odd": True} if filtered else None)
            scores, keys = naive_search(vectors, vectors[:7], k, odd if filtered else None)
            assert hits.keys.tolist() == keys
            assert hits.scores.tolist() == scores
            everyone = [row["id"] for row in index.payload(np.arange(rows))]
            assert everyone == [f"item-{row}" for row in range(rows)]
            assert [index.key(each) for each in everyone] == list(range(rows))


@settings(max_examples=8)
@given(st.sampled_from(["rows", "hash", "cell"]), st.integers(1, 5), st.integers(1, 12), st.booleans())
def test_ivf_shards_find_what_one_index_finds_with_the_same_probes(
    by: By, shards: int, nprobe: int, twins: bool
) -> None:
    vectors = _corner(200) if twins else random_vectors(200, 8)
    with tempfile.TemporaryDirectory() as folder:
        table = write_table(f"{folder}/e", vectors)
        config = IndexConfig(factory="IVF12,Flat", by=by, shards=shards, nprobe=nprobe)
        manifest = build_here(table, f"{folder}/i", config)
        assert sum(shard.rows for shard in manifest.shards) == 200
        whole = faiss.read_index(f"{folder}/i/{manifest.trained.file}")
        whole.add(vectors)
        probes = faiss.SearchParametersIVF(nprobe=nprobe)
        with Index.open(f"{folder}/i") as index:
            for queries in (vectors[:30], vectors[3:4]):
                # All of them, ties broken by key: FAISS alone leaves the order among equals open.
                scores, keys = found_by(whole, queries, 200, probes)
                hits = index.search(queries, 10)
                for query in range(len(queries)):
                    ranked = sorted(
                        (-score, key)
                        for score, key in zip(scores[query].tolist(), keys[query].tolist(), strict=True)
                        if key >= 0
                    )[:10]
                    assert hits.keys[query].tolist() == [key for _, key in ranked] + [-1] * (10 - len(ranked))


def test_by_cell_a_query_asks_the_shards_of_the_lists_that_it_probes(tmp_path: Path) -> None:
    centres = random_vectors(24, 8, seed=1) * 3
    vectors = np.repeat(centres, 40, axis=0) + random_vectors(960, 8, seed=2)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    config = IndexConfig(factory="IVF24,Flat", by="cell", shards=4, nprobe=2)
    manifest = build_here(write_table(tmp_path / "e", vectors), tmp_path / "i", config)
    router = Router(str(tmp_path / "i"), manifest)
    asked = [router.shards(query[None], 2) for query in vectors[::10]]
    assert {len(each) for each in asked} <= {1, 2}
    assert np.mean([len(each) for each in asked]) < 1.6  # lists side by side lie together; at random: 1.75
    assert router.shards(vectors[:1], 24) == [0, 1, 2, 3]
    rows = [shard.rows for shard in manifest.shards]
    assert max(rows) <= 1.5 * 240
    assert measure_recall(str(tmp_path / "i"), manifest, k=5, queries=50) is not None
    searched: list[int] = []
    with Index.open(str(tmp_path / "i")) as index:
        for number, shard in enumerate(index.shards):
            original = shard.answer
            shard.answer = lambda *a, n=number, o=original, **kw: (searched.append(n), o(*a, **kw))[1]  # type: ignore
        for query, expected in zip(vectors[::10], asked, strict=True):
            searched.clear()
            index.search(query[None], 5)
            assert sorted(searched) == expected
        searched.clear()
        index.search(vectors[:1], 5, effort=Effort(nprobe=24))
        assert sorted(searched) == [0, 1, 2, 3]


@pytest.mark.parametrize("share", [0.5, 0.1, 0.02])
def test_by_cell_a_filtered_search_finds_what_one_shard_finds(tmp_path: Path, share: float) -> None:
    vectors, queries = random_vectors(3000, 8), random_vectors(40, 8, seed=5)
    # What passes lies far from the queries: their own lists hold little of it.
    far = (np.argsort(np.argsort(vectors @ queries[0])) / len(vectors)).tolist()
    queries = np.ascontiguousarray(queries[np.argsort(-(queries @ queries[0]))[:15]])
    table = write_table(tmp_path / "e", vectors, {"far": far})
    _, exact = naive_search(vectors, queries, 10, [each < share for each in far])
    found = {}
    for by, shards in (("rows", 1), ("cell", 4)):
        config = IndexConfig(factory="IVF48,SQ8", by=by, shards=shards, nprobe=6)
        build_here(table, tmp_path / by, config)
        with Index.open(str(tmp_path / by)) as index:
            hits = index.search(queries, 10, {"far": {"lt": share}})
            assert set(hits.strategies) <= {"selector", "exact"}
            found[by] = sum(len({*mine} & {*right}) for mine, right in zip(hits.keys.tolist(), exact, strict=True))
    assert found["cell"] >= 0.97 * found["rows"] >= 0.8 * 150


@given(st.lists(st.integers(0, 50), min_size=1, max_size=40), st.integers(1, 6))
def test_every_cell_has_a_shard_and_no_shard_has_much_more_than_its_share(sizes: list[int], shards: int) -> None:
    rows = np.array(sizes)
    found = cell_shards(random_vectors(len(sizes), 4, seed=len(sizes)), rows, shards)
    assert ((found >= 0) & (found < shards)).all()
    load = np.bincount(found, rows, minlength=shards)
    assert load.sum() == rows.sum()
    # A cell is never cut: each halving can miss its mark by no more than the largest cell.
    assert load.max() <= rows.sum() / shards + 3 * rows.max()


def test_the_hash_of_an_id_is_even_and_the_same_everywhere() -> None:
    ids = [f"https://pictures.example/{i:08d}.jpg" for i in range(8000)]
    found = hashed_shards(ids, 8)
    digests = [int(hashlib.sha256(each.encode()).hexdigest()[:15], 16) % 8 for each in ids]
    assert found.tolist() == digests
    counts = np.bincount(found, minlength=8)
    assert counts.min() > 1000 - 4 * 31  # four standard deviations
    assert counts.max() < 1000 + 4 * 31


def test_altered_keys_or_quantiser_are_refused(tmp_path: Path) -> None:
    table = write_table(tmp_path / "e", random_vectors(200))
    manifest = build_here(table, tmp_path / "i", IndexConfig(factory="IVF4,Flat", by="cell"))
    assert manifest.shards[1].keys is not None
    for file in (manifest.shards[1].keys, manifest.trained):
        path = tmp_path / "i" / file.file
        data = path.read_bytes()
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(IndexArtefactError, match="checksum differs") as caught:
            Index.open(str(tmp_path / "i"))
        assert caught.value.where == str(path)
        path.write_bytes(data)


@pytest.mark.parametrize("by", ["hash", "cell"])
def test_a_build_on_ray_places_rows_as_the_tasks_do_here(
    ray_cluster: str, tmp_path: Path, by: By, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayemb.index.build._PLACED", 170)
    table = write_table(tmp_path / "e", random_vectors(500))
    config = IndexConfig(factory="IVF8,Flat", by=by, shards=3, train_rows=300, recall_queries=20, nprobe=8)
    manifest = build_index(table, str(tmp_path / "ray"), config)
    here = build_here(table, tmp_path / "here", config)
    assert [shard.sha256 for shard in manifest.shards] == [shard.sha256 for shard in here.shards]
    assert [shard.keys.sha256 for shard in manifest.shards if shard.keys] == [
        shard.keys.sha256 for shard in here.shards if shard.keys
    ]
    assert load_manifest(str(tmp_path / "ray")).sharding == here.sharding
    assert manifest.recall is not None
    assert manifest.recall.recall == 1.0
    assert manifest.curve[-1].recall == 1.0
