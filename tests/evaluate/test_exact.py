"""Exact search against brute force: the same bits whatever the block, in process, over a table and on Ray."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from rayemb.evaluate import exact
from rayemb.evaluate.errors import EvaluateError
from rayemb.evaluate.exact import ArrayVectors, Neighbours, TableVectors, exact_search
from rayemb.evaluate.exact_ranks import exact_ranks
from rayemb.evaluate.metrics import ranks


def brute(queries: NDArray, corpus: NDArray, k: int, exclude: NDArray | None = None) -> Neighbours:
    """Every product by itself, every order by Python's own sort."""
    rows, scores = np.full((len(queries), k), -1), np.full((len(queries), k), -np.inf)
    for q, query in enumerate(queries.astype(np.float64)):
        gone = set() if exclude is None else set(exclude[q].tolist())
        found = [(-float((query * row).sum()), m) for m, row in enumerate(corpus.astype(np.float64)) if m not in gone]
        for place, (minus, m) in enumerate(sorted(found)[:k]):
            rows[q, place], scores[q, place] = m, -minus
    return Neighbours(rows, scores)


def unit(rng: np.random.Generator, rows: int, dim: int) -> NDArray[np.float32]:
    x = rng.standard_normal((rows, dim))
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def same(found: Neighbours, expected: Neighbours) -> None:
    assert np.array_equal(found.rows, expected.rows)
    assert found.scores.tobytes() == expected.scores.tobytes()


KINDS = ("random", "duplicates", "constant", "collapsed", "zero", "long")


def vectors(kind: str, rng: np.random.Generator, rows: int, dim: int) -> NDArray[np.float32]:
    x = unit(rng, rows, dim)
    if kind == "duplicates":
        return x[rng.integers(0, max(1, rows // 4), rows)]
    if kind == "constant":
        return np.repeat(x[:1], rows, axis=0)
    if kind == "collapsed":  # differences that float32 products cannot tell
        return x[:1] + 1e-6 * x
    return 0 * x if kind == "zero" else 1e6 * x if kind == "long" else x


@given(
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(KINDS),
    rows=st.integers(1, 60),
    dim=st.integers(1, 40),
    k=st.integers(1, 70),
    block=st.integers(1, 70),
)
def test_it_is_brute_force_whatever_the_block(seed: int, kind: str, rows: int, dim: int, k: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    corpus = vectors(kind, rng, rows, dim)
    queries = np.concatenate([corpus[:3], unit(rng, 4, dim)])
    exclude = rng.integers(-1, rows, (len(queries), 2))
    same(exact_search(queries, corpus, k, exclude=exclude, block=block), brute(queries, corpus, k, exclude))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 10])
def test_blocks_of_real_size_change_no_bit(kind: str, k: int) -> None:
    rng = np.random.default_rng(1)
    corpus, queries = vectors(kind, rng, 3000, 48), unit(rng, 37, 48)
    expected = brute(queries, corpus, k)
    for block in (3000, 1024, 333, 17):
        same(exact_search(queries, corpus, k, block=block), expected)


def test_a_corpus_in_the_order_of_its_scores_is_no_trap() -> None:
    rng = np.random.default_rng(2)
    query = unit(rng, 1, 16)
    corpus = unit(rng, 2000, 16)
    corpus = corpus[np.argsort(corpus @ query[0])]
    same(exact_search(query, corpus, 5, block=100), brute(query, corpus, 5))


def test_a_collapsed_space_is_done_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(3)
    corpus = vectors("collapsed", rng, 5000, 32)
    scored = []
    kept = exact.fixed_scores
    monkeypatch.setattr(exact, "fixed_scores", lambda q, c, a, b: scored.append(len(a)) or kept(q, c, a, b))
    found = exact_search(corpus[:20], corpus, 5)
    same(found, brute(corpus[:20], corpus, 5))
    assert sum(scored) < 20 * 5000 / 10


def test_more_neighbours_than_rows_and_no_rows_at_all() -> None:
    queries = np.ones((2, 3), np.float32)
    found = exact_search(queries, np.ones((1, 3), np.float32), 3)
    assert found.rows.tolist() == [[0, -1, -1]] * 2
    assert found.scores.tolist() == [[3.0, -np.inf, -np.inf]] * 2
    assert exact_search(queries, np.empty((0, 3), np.float32), 2).rows.tolist() == [[-1, -1]] * 2
    assert exact_search(queries[:0], queries, 2).rows.shape == (0, 2)


def test_errors_name_the_row() -> None:
    good = np.ones((3, 2), np.float32)
    bad = good.copy()
    bad[2, 1] = np.nan
    with pytest.raises(EvaluateError, match=r"corpus: row 2 holds NaN"):
        exact_search(good, bad, 1, block=2)
    with pytest.raises(EvaluateError, match=r"queries: row 2 holds NaN"):
        exact_search(bad, good, 1)
    with pytest.raises(EvaluateError, match=r"expected float32 \(N, D\), got float64"):
        exact_search(good, good.astype(np.float64), 1)
    with pytest.raises(EvaluateError, match="3 dimensions"):
        exact_search(np.ones((1, 3), np.float32), good, 1)
    with pytest.raises(EvaluateError, match="count from 1"):
        exact_search(good, good, 0)
    with pytest.raises(EvaluateError, match=r"exclude: expected \(Q, E\) for 3 queries"):
        exact_search(good, good, 1, exclude=np.zeros(3, np.int64))
    with pytest.raises(EvaluateError, match="overflow"):
        exact_search(1e19 * good, 1e20 * good, 1)


@given(seed=st.integers(0, 10_000), kind=st.sampled_from(KINDS), block=st.integers(1, 50), groups=st.integers(1, 9))
def test_exact_ranks_are_the_metric(seed: int, kind: str, block: int, groups: int) -> None:
    rng = np.random.default_rng(seed)
    corpus = vectors(kind, rng, 40, 8)
    groups_c = np.concatenate([np.arange(groups), rng.integers(0, groups, 40 - groups)])
    groups_c[:groups] = np.arange(groups)
    queries = np.concatenate([corpus[-5:], unit(rng, 5, 8)])
    groups_q = np.concatenate([groups_c[-5:], rng.integers(0, groups, 5)])
    own = np.concatenate([np.arange(35, 40), np.full(5, -1)])
    found = exact_ranks(queries, corpus, groups_q, groups_c, exclude=own, block=block)
    assert np.array_equal(found, ranks(queries, corpus, groups_q, groups_c, exclude=own))


def test_a_query_without_a_relevant_row_is_named() -> None:
    x = np.eye(3, dtype=np.float32)
    with pytest.raises(EvaluateError, match="1 of 3 queries have no relevant row, query 2 first"):
        exact_ranks(x, x, np.array([0, 1, 9]), np.array([0, 1, 2]))
    with pytest.raises(EvaluateError, match=r"groups_c: expected \(3,\), got \(2,\)"):
        exact_ranks(x, x, np.array([0, 1, 2]), np.array([0, 1]))


def table(folder: Path, x: NDArray[np.float32]) -> str:
    import lance
    import pyarrow as pa

    from rayemb.data.embeddings import embeddings_schema

    schema = embeddings_schema([], x.shape[1], "digest", images=False)
    column = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])
    uri = str(folder / "embeddings.lance")
    lance.write_dataset(pa.table([[str(n) for n in range(len(x))], column], schema=schema), uri)
    return uri


def test_on_ray_and_over_a_table_it_is_the_same(ray_cluster: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    corpus, queries = vectors("duplicates", rng, 1500, 24), unit(rng, 40, 24)
    exclude = rng.integers(-1, 1500, (40, 3))
    here = exact_search(queries, corpus, 7, exclude=exclude)
    same(here, brute(queries, corpus, 7, exclude))
    there = TableVectors(table(tmp_path, corpus))
    told: list[tuple[int, int]] = []
    for tasks in (1, 2, 7):
        same(exact_search(queries, corpus, 7, exclude=exclude, tasks=tasks, block=100), here)
    same(exact_search(queries, there, 7, exclude=exclude, block=311), here)
    same(
        exact_search(queries, there, 7, exclude=exclude, tasks=6, progress=lambda n, all, _: told.append((n, all))),
        here,
    )
    assert told[-1] == (6, 6)
    groups_q, groups_c = rng.integers(0, 9, 40), rng.integers(0, 9, 1500)
    expected = ranks(queries, corpus, groups_q, groups_c)
    assert np.array_equal(exact_ranks(queries, there, groups_q, groups_c, tasks=5, block=64), expected)
    bad = corpus.copy()
    bad[1203, 4] = np.inf
    with pytest.raises(EvaluateError, match="row 1,203 holds NaN or infinity"):
        exact_search(queries, ArrayVectors(bad), 7, tasks=3)
