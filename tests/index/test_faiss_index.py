from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayemb.index import Effort
from rayemb.index.faiss_index import (
    FaissShard,
    KeySelector,
    deserialise,
    load_index,
    make_index,
    parts_of,
    reserve,
    rows_to_train,
    seed_training,
    serialise,
)

from .tables import naive_search, random_vectors

ROWS, DIM = 2000, 16
X = random_vectors(ROWS, DIM)
EFFORT = Effort(nprobe=4)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """FAISS's k-means on busy cores takes ten times as long on two threads as on one."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


def _shard(factory: str, folder: Path, prefix: int | None = None) -> FaissShard:
    index = make_index(DIM, factory, prefix)
    seed_training(index, 0)
    index.train(X[:600])
    index = deserialise(serialise(index))
    reserve(index, ROWS)
    for block in np.split(X, 1 if factory.startswith("NSG") else 4):  # NSG takes all rows in one call
        index.add(block)
    path = folder / "index.faiss"
    path.write_bytes(serialise(index).tobytes())
    return FaissShard(load_index(str(path)))


@pytest.mark.parametrize(
    ("factory", "filter_by"),
    [
        ("Flat", "selector"),
        ("IVF16,Flat", "selector"),
        ("IVF16_HNSW32,Flat", "selector"),
        ("IVF16,PQ16x4", "selector"),
        ("PCA15,IVF16,SQ8", "selector"),
        ("SQ8", "selector"),
        ("HNSW32", "storage"),
        ("PQ16x4", "none"),
        ("PQ16x4fs", "none"),
        ("IVF16,PQ16x4,RFlat", "none"),
        ("PCA15,HNSW16", "none"),
        ("NSG16", "none"),
    ],
)
def test_every_type_numbers_its_rows_and_says_how_it_filters(factory: str, filter_by: str, tmp_path: Path) -> None:
    shard = _shard(factory, tmp_path)
    assert (shard.rows, shard.dim, shard.filter_by) == (ROWS, DIM, filter_by)
    _, keys = shard.search(X[:40], 3, EFFORT)
    assert (keys[:, 0] == np.arange(40)).mean() >= (0.8 if "P" in factory else 1.0)
    if filter_by != "none":
        mask = np.arange(ROWS) % 7 == 3
        _, keys = shard.search(X[:40], 3, EFFORT, KeySelector(mask, 0))
        assert (keys % 7 == 3).all()


@pytest.mark.parametrize("factory", ["Flat", "IVF64,Flat", "HNSW32"])
@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.9])
def test_a_filtered_search_is_exact_however_few_rows_pass(factory: str, share: float, tmp_path: Path) -> None:
    shard = _shard(factory, tmp_path)
    mask = np.random.default_rng(1).random(ROWS) < share
    mask[5] = True
    _, keys = shard.search(X[:20], 10, EFFORT, KeySelector(mask, 0))
    _, expected = naive_search(X, X[:20], 10, mask.tolist())
    assert keys.tolist() == expected


@settings(max_examples=50)
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(0, 100))
def test_a_selector_passes_the_rows_of_its_mask(mask: list[bool], start: int) -> None:
    selector = KeySelector(np.array(mask), start)
    by_key, by_position = selector.by_key(), selector.by_position()
    assert [by_key.is_member(start + i) for i in range(len(mask))] == mask
    assert [by_position.is_member(i) for i in range(len(mask))] == mask
    assert selector.positions.tolist() == [i for i, passes in enumerate(mask) if passes]


def test_a_search_leaves_the_index_as_it_is(tmp_path: Path) -> None:
    shard = _shard("IVF16,PQ16x4,RFlat", tmp_path)
    ivf = faiss.downcast_index(shard.index.base_index)
    before = (ivf.nprobe, shard.index.k_factor)
    assert before not in ((16, 8), (4, 4))
    shard.search(X[:4], 3, Effort(16, 16, 8))
    shard.search(X[:4], 3, EFFORT)
    assert (ivf.nprobe, shard.index.k_factor) == before


def test_the_seed_decides_the_quantiser() -> None:
    def trained(seed: int) -> bytes:
        index = make_index(DIM, "IVF16,Flat")
        seed_training(index, seed)
        index.train(X)
        return serialise(index).tobytes()

    assert trained(1) == trained(1)
    assert trained(1) != trained(2)


@pytest.mark.parametrize(
    ("factory", "needed"),
    [("Flat", 0), ("HNSW32", 0), ("IVF100,Flat", 100), ("IVF16,PQ8", 256), ("OPQ8,IVF512,PQ8x4fs", 512)],
)
def test_rows_to_train_is_what_faiss_asks_for(factory: str, needed: int) -> None:
    index = make_index(DIM, factory)
    assert rows_to_train(index) == needed
    if needed:
        with pytest.raises(RuntimeError, match="training points"):
            index.train(X[: needed - 1])


# Of the issue: flat, scalar and product quantisers, fast scan, RaBitQ, graphs, each alone, under IVF and after OPQ.
TYPES = [
    *("Flat", "SQ8", "SQfp16", "PQ8x4", "PQ16x4fs", "RaBitQ", "HNSW16", "HNSW16,SQ8"),
    *(f"IVF16,{code}" for code in ("Flat", "SQ8", "SQfp16", "PQ8x4", "PQ16x4fs", "RaBitQ")),
    *("IVF16_HNSW16,Flat", "OPQ8,PQ8x4", "OPQ8,IVF16,PQ8x4", "OPQ16,IVF16,PQ16x4fs", "OPQ8,HNSW16", "OPQ8,RaBitQ"),
    *("IVF16,RaBitQ,Refine(SQfp16)", "PQ16x4fs,Refine(SQ8)", "IVF16,PQ16x4fs,RFlat", "OPQ8,IVF16,PQ8x4,RFlat"),
]


@pytest.mark.parametrize("factory", TYPES)
def test_every_type_searches_at_the_effort_of_the_call(factory: str, tmp_path: Path) -> None:
    shard = _shard(factory, tmp_path)
    _, expected = naive_search(X, X[:50], 10)

    def recall(effort: Effort) -> float:
        found = shard.search(X[:50], 10, effort)[1].tolist()
        return float(np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found, expected, strict=True)]))

    low, high = recall(Effort(1, 1, 1)), recall(Effort(16, 512, 64))
    lists, graph, refine = parts_of(shard.index)
    assert (lists == 16) == ("IVF" in factory)
    assert graph == (factory.split(",")[-1].startswith("HNSW") or factory.startswith("HNSW"))
    assert refine == ("Refine" in factory or "RFlat" in factory)
    if refine or "Flat" in factory or (graph and "SQ8" not in factory):
        assert high >= 0.95
    if factory == "IVF16,RaBitQ":
        assert low != high  # more lists, more rows whose 16 bits look good: alone it gets no better
    elif lists or refine or graph:
        assert low < high
    else:
        assert low == high >= (0.95 if factory in ("Flat", "SQ8", "SQfp16") else 0.2)


def test_a_prefix_finds_by_the_first_coordinates_and_ranks_by_all(tmp_path: Path) -> None:
    shard = _shard("Flat,RFlat", tmp_path, prefix=6)
    assert shard.dim == DIM
    cut = X[:, :6] / np.linalg.norm(X[:, :6], axis=1, keepdims=True)
    _, candidates = naive_search(cut, cut[:20], 5 * 4)
    scores, keys = shard.search(X[:20], 5, Effort(rerank=4))
    for query, (own, found) in enumerate(zip(candidates, keys.tolist(), strict=True)):
        assert found == sorted(own, key=lambda row: -float(X[query] @ X[row]))[:5]
    np.testing.assert_allclose(scores, np.einsum("nd,nkd->nk", X[:20], X[keys]), atol=1e-6)
    everything = shard.search(X[:20], 5, Effort(rerank=ROWS // 5))[1]
    assert everything.tolist() == naive_search(X, X[:20], 5)[1]


@pytest.mark.parametrize(
    ("factory", "prefix", "message"),
    [("Flat", 8, "has no refine stage"), ("Flat,RFlat", 16, "no part of 16"), ("IDMap2,Flat", None, "leave IDMap out")],
)
def test_what_cannot_be_made_says_why(factory: str, prefix: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_index(DIM, factory, prefix)
