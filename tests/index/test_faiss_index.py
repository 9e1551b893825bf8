from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayemb.index.faiss_index import (
    FaissShard,
    KeySelector,
    deserialise,
    load_index,
    make_index,
    rows_to_train,
    seed_training,
    serialise,
    with_keys,
)

from .tables import naive_search, random_vectors

ROWS, DIM, START = 2000, 16, 10_003
X = random_vectors(ROWS, DIM)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """FAISS's k-means on busy cores takes ten times as long on two threads as on one."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


def _shard(factory: str, folder: Path, nprobe: int = 4) -> FaissShard:
    index = make_index(DIM, factory)
    seed_training(index, 0)
    index.train(X[:600])
    index = deserialise(serialise(with_keys(index)))
    index.add_with_ids(X, np.arange(START, START + ROWS))
    path = folder / "index.faiss"
    path.write_bytes(serialise(index).tobytes())
    return FaissShard(load_index(str(path)), START, nprobe, 64)


@pytest.mark.parametrize(
    ("factory", "filter_by"),
    [
        ("Flat", "selector"),
        ("IDMap2,Flat", "selector"),
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
def test_every_type_keeps_keys_and_says_how_it_filters(factory: str, filter_by: str, tmp_path: Path) -> None:
    shard = _shard(factory, tmp_path)
    assert (shard.rows, shard.dim, shard.filter_by) == (ROWS, DIM, filter_by)
    _, keys = shard.search(X[:40], 3)
    assert (keys[:, 0] == np.arange(40) + START).mean() >= (0.8 if "P" in factory else 1.0)
    if filter_by != "none":
        mask = np.arange(ROWS) % 7 == 3
        _, keys = shard.search(X[:40], 3, KeySelector(mask, START))
        assert ((keys - START) % 7 == 3).all()


@pytest.mark.parametrize("factory", ["Flat", "IVF64,Flat", "HNSW32"])
@pytest.mark.parametrize("share", [0.001, 0.01, 0.1, 0.9])
def test_a_filtered_search_is_exact_however_few_rows_pass(factory: str, share: float, tmp_path: Path) -> None:
    shard = _shard(factory, tmp_path)
    mask = np.random.default_rng(1).random(ROWS) < share
    mask[5] = True
    _, keys = shard.search(X[:20], 10, KeySelector(mask, START))
    _, expected = naive_search(X, X[:20], 10, mask.tolist())
    assert np.where(keys >= 0, keys - START, -1).tolist() == expected


@settings(max_examples=50)
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(0, 100))
def test_a_selector_passes_the_rows_of_its_mask(mask: list[bool], start: int) -> None:
    selector = KeySelector(np.array(mask), start)
    by_key, by_position = selector.by_key(), selector.by_position()
    assert [by_key.is_member(start + i) for i in range(len(mask))] == mask
    assert [by_position.is_member(i) for i in range(len(mask))] == mask
    assert selector.positions.tolist() == [i for i, passes in enumerate(mask) if passes]


def test_a_search_leaves_the_index_as_it_is(tmp_path: Path) -> None:
    shard = _shard("IVF16,Flat", tmp_path, nprobe=16)
    before = shard.index.nprobe
    assert before != 16
    shard.search(X[:4], 3)
    shard.search(X[:4], 3, KeySelector(np.ones(ROWS, bool), START))
    assert shard.index.nprobe == before


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
