"""Every way of answering under a filter, against every pair scored."""

from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rayemb.index import Effort
from rayemb.index.faiss_index import FaissShard, load_index, make_index, seed_training, serialise
from rayemb.index.selection import Selection
from rayemb.index.stored import best_of
from rayemb.index.strategy import FilteredSearch

from .tables import exact_vectors, naive_search, random_vectors

ROWS, DIM = 3000, 16
X = random_vectors(ROWS, DIM)
EFFORT = Effort(nprobe=4)
RNG = np.random.default_rng(7)
WHOLE = ("Flat", "IVF16,Flat", "HNSW16")


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, FilteredSearch]:
    return {}


def _search(made: dict[str, FilteredSearch], factory: str, folder: Path) -> FilteredSearch:
    if factory not in made:
        index = make_index(DIM, factory)
        seed_training(index, 0)
        index.train(X)
        index.add(X)
        path = folder / "index.faiss"
        path.write_bytes(serialise(index).tobytes())
        shard = FaissShard(load_index(str(path)))

        def from_table(
            x_ND: NDArray[np.float32], k: int, positions: NDArray[np.int64]
        ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
            return best_of(x_ND @ X[positions].T, positions, k)

        made[factory] = FilteredSearch(shard, from_table)
    return made[factory]


def _far_from(queries: NDArray[np.float32], share: float) -> NDArray[np.bool_]:
    """The rows furthest from the mean of the queries: a filter that fails whatever is near them."""
    scores = X @ queries.mean(axis=0)
    return scores <= np.quantile(scores, share)


def _recall(keys: NDArray[np.int64], expected: list[list[int]]) -> float:
    pairs = zip(keys.tolist(), expected, strict=True)
    found = [len({key for key in row if key >= 0} & set(wanted)) for row, wanted in pairs]
    return sum(found) / sum(map(len, expected))


@pytest.mark.parametrize("factory", [*WHOLE, "IVF16_HNSW16,Flat", "PCA16,IVF16,Flat", "SQfp16", "PQ16x6", "NSG16"])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.1, 0.02, 0.001])
@pytest.mark.parametrize("correlated", [False, True])
def test_recall_does_not_fall_with_selectivity(
    made: dict[str, FilteredSearch], factory: str, share: float, correlated: bool, tmp_path: Path
) -> None:
    search = _search(made, factory, tmp_path)
    queries = X[:1] + 0.2 * random_vectors(20, DIM, seed=3) if correlated else random_vectors(20, DIM, seed=3)
    queries = np.ascontiguousarray(queries / np.linalg.norm(queries, axis=1, keepdims=True), np.float32)
    mask = _far_from(queries, share) if correlated else np.random.default_rng(1).random(ROWS) < share
    mask[11] = True
    selection = Selection(mask)
    planned = search.plan(selection, len(queries), 10, EFFORT)
    # Four of sixteen lists find 0.7 of the neighbours without a filter; product quantisers mistake some.
    floor = {"SQfp16": 0.99, "PQ16x6": 0.7}.get(factory, 0.7 if "IVF" in factory else 0.95)
    scores = np.where(mask, queries @ X.T, -np.inf)
    expected = [[key for key in row if mask[key]] for row in np.argsort(-scores, axis=1)[:, :10].tolist()]
    in_index = "selector" if search.shard.takes_selector and not search.shard.is_graph else "overfetch"
    for strategy in {planned, in_index}:
        _, keys = search.search(queries, 10, selection, strategy, EFFORT)
        assert mask[keys[keys >= 0]].all()
        assert _recall(keys, expected) >= floor, strategy


@pytest.mark.parametrize("factory", WHOLE)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_exact_is_exact_in_order_and_ties(made: dict[str, FilteredSearch], factory: str, data: st.DataObject) -> None:
    vectors = exact_vectors(64)
    name = f"ties {factory}"
    if name not in made:
        index = make_index(8, factory)
        index.train(vectors)
        index.add(vectors)
        made[name] = FilteredSearch(FaissShard(index), lambda *_: pytest.fail("read the table"))
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=64, max_size=64)))
    k = data.draw(st.integers(1, 70))
    scores, keys = made[name].search(vectors[:5], k, Selection(mask), "exact", EFFORT)
    expected_scores, expected = naive_search(vectors, vectors[:5], k, mask.tolist())
    assert scores.tolist() == expected_scores
    assert keys.tolist() == expected


@pytest.mark.parametrize("factory", WHOLE)
def test_stored_vectors_are_those_that_were_added(
    made: dict[str, FilteredSearch], factory: str, tmp_path: Path
) -> None:
    stored = _search(made, factory, tmp_path).stored
    assert stored is not None
    positions = RNG.permutation(ROWS)[:500]
    assert (stored.take(positions) == X[positions]).all()
    assert np.allclose(stored.scores(X[:3], np.arange(ROWS)), X[:3] @ X.T, atol=1e-6)


@pytest.mark.parametrize("factory", ["SQ8", "IVF16,PQ16x4", "PQ16x4", "PCA15,IVF16,Flat", "HNSW16_SQ8"])
def test_codes_are_no_stored_vectors(made: dict[str, FilteredSearch], factory: str, tmp_path: Path) -> None:
    search = _search(made, factory, tmp_path)
    assert search.stored is None
    selection = Selection(np.arange(ROWS) % 30 == 7)
    _, keys = search.search(X[7:307:30], 3, selection, search.plan(selection, 10, 3, EFFORT), EFFORT)
    assert (keys % 30 == 7).all()
    assert (keys[:, 0] == np.arange(7, 307, 30)).mean() >= 0.8


def test_the_plan_goes_by_what_passes(made: dict[str, FilteredSearch], tmp_path: Path) -> None:
    def plan(factory: str, share: float, queries: int = 1) -> str:
        selection = Selection(np.random.default_rng(0).random(ROWS) < share)
        return _search(made, factory, tmp_path).plan(selection, queries, 10, EFFORT)

    for factory in WHOLE:
        assert plan(factory, 0.01) == "exact"
    assert plan("PQ16x6", 0.9) == "overfetch"
    assert plan("PQ16x6", 0.003) == "exact"
    assert plan("SQ8", 0.01) == "selector"


@pytest.mark.parametrize("factory", [*WHOLE, "SQ8", "PQ16x6"])
def test_all_rows_passing_is_no_filter(made: dict[str, FilteredSearch], factory: str, tmp_path: Path) -> None:
    search = _search(made, factory, tmp_path)
    everything = Selection(np.ones(ROWS, np.bool_))
    _, keys = search.search(X[:20], 5, everything, search.plan(everything, 20, 5, EFFORT), EFFORT)
    _, plain = search.shard.search(X[:20], 5, EFFORT)
    if "Flat" in factory or "HNSW" in factory:
        assert [row[0] for row in keys.tolist()] == [row[0] for row in plain.tolist()]
        plain = np.array(naive_search(X, X[:20], 5)[1])
    assert (keys == plain).mean() > 0.95
