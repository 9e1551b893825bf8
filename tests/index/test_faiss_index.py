from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayemb.index.faiss_index import (
    FaissShard,
    deserialise,
    load_index,
    make_index,
    rows_to_train,
    seed_training,
    serialise,
    with_keys,
)
from rayemb.index.selection import Selection

from .tables import random_vectors

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
    ("factory", "takes_selector"),
    [
        ("Flat", True),
        ("IDMap2,Flat", True),
        ("IVF16,Flat", True),
        ("IVF16_HNSW32,Flat", True),
        ("IVF16,PQ16x4", True),
        ("PCA15,IVF16,SQ8", True),
        ("SQ8", True),
        ("HNSW32", True),
        ("HNSW32_SQ8", True),
        ("PQ16x4", False),
        ("PQ16x4fs", False),
        ("IVF16,PQ16x4,RFlat", False),
        ("PCA15,HNSW16", False),
        ("NSG16", False),
    ],
)
def test_every_type_keeps_keys_and_says_whether_it_skips_rows(
    factory: str, takes_selector: bool, tmp_path: Path
) -> None:
    shard = _shard(factory, tmp_path)
    assert (shard.rows, shard.dim, shard.takes_selector) == (ROWS, DIM, takes_selector)
    _, keys = shard.search(X[:40], 3)
    assert (keys[:, 0] == np.arange(40) + START).mean() >= (0.8 if "P" in factory else 1.0)
    if takes_selector:
        _, keys = shard.search(X[:40], 3, Selection(np.arange(ROWS) % 7 == 3, START))
        assert ((keys - START) % 7 == 3)[keys >= 0].all()
        assert (keys >= 0).mean() > 0.5


@settings(max_examples=50)
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(0, 100))
def test_a_selector_passes_the_rows_of_its_mask(mask: list[bool], start: int) -> None:
    selector = Selection(np.array(mask), start)
    by_key, by_position = selector.by_key, selector.by_position
    assert [by_key.is_member(start + i) for i in range(len(mask))] == mask
    assert [by_position.is_member(i) for i in range(len(mask))] == mask
    assert selector.positions.tolist() == [i for i, passes in enumerate(mask) if passes]


def test_a_search_leaves_the_index_as_it_is(tmp_path: Path) -> None:
    shard = _shard("IVF16,Flat", tmp_path, nprobe=16)
    before = shard.index.nprobe
    assert before != 16
    shard.search(X[:4], 3)
    shard.search(X[:4], 3, Selection(np.ones(ROWS, bool), START))
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
