import subprocess
import sys
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
    deserialise,
    load_index,
    make_index,
    parts_of,
    reserve,
    rows_to_train,
    seed_training,
    serialise,
)
from rayemb.index.selection import Selection

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
    ("factory", "takes_selector"),
    [
        ("Flat", True),
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
def test_every_type_numbers_its_rows_and_says_whether_it_skips_some(
    factory: str, takes_selector: bool, tmp_path: Path
) -> None:
    shard = _shard(factory, tmp_path)
    assert (shard.rows, shard.dim, shard.takes_selector) == (ROWS, DIM, takes_selector)
    _, keys = shard.search(X[:40], 3, EFFORT)
    assert (keys[:, 0] == np.arange(40)).mean() >= (0.8 if "P" in factory else 1.0)
    if takes_selector:
        _, keys = shard.search(X[:40], 3, EFFORT, Selection(np.arange(ROWS) % 7 == 3).selector)
        assert (keys % 7 == 3)[keys >= 0].all()
        assert (keys >= 0).mean() > 0.5


@settings(max_examples=50)
@given(st.lists(st.booleans(), min_size=1, max_size=40))
def test_a_selector_passes_the_rows_of_its_mask(mask: list[bool]) -> None:
    selection = Selection(np.array(mask))
    assert [selection.selector.is_member(i) for i in range(len(mask))] == mask
    assert selection.positions.tolist() == [i for i, passes in enumerate(mask) if passes]


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


def test_a_library_that_patches_faiss_for_torch_breaks_no_search() -> None:
    # In a process of its own: the patch stays.
    code = """
import faiss.contrib.torch_utils
import numpy as np
from rayemb.index import Effort
from rayemb.index.faiss_index import FaissShard, centroids
index = faiss.index_factory(8, "IVF4,Flat", faiss.METRIC_INNER_PRODUCT)
x = np.eye(8, dtype=np.float32).repeat(20, axis=0)
index.train(x)
index.add(x)
selector = faiss.IDSelectorRange(40, 45)
scores, found = FaissShard(index).search(x[40:41], 3, Effort(nprobe=4), selector)
assert set(found[0].tolist()) <= set(range(40, 45)) and scores[0, 0] == 1, found
assert type(centroids(index)) is np.ndarray and centroids(index).shape == (4, 8)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
