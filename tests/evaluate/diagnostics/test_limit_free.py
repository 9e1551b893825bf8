"""What vectors can return: the card's figures (S031), brute force over separable sets, and an exact construction."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.optimize import linprog

from rayemb.evaluate.diagnostics.limit import limit_recall
from rayemb.evaluate.diagnostics.limit_free import (
    critical_n,
    cyclic_embeddings,
    free_embeddings,
    limit_sets,
    reachable,
)
from rayemb.evaluate.metrics import MetricError

Array = NDArray[np.float64]


def margins(queries: Array, documents: Array, sets: NDArray[np.int64]) -> Array:
    scores = queries @ documents.T
    worst = [
        min(row[list(chosen)]) - max(np.delete(row, chosen), default=-9)
        for row, chosen in zip(scores, sets, strict=True)
    ]
    return np.array(worst)


def test_all_sets_are_there_once_and_draws_are_of_them() -> None:
    assert limit_sets(6, 2).tolist() == [list(pair) for pair in itertools.combinations(range(6), 2)]
    assert limit_sets(5, 5).tolist() == [[0, 1, 2, 3, 4]]
    for n, k, most in ((46, 2, 1000), (2000, 3, 500), (60, 30, 40)):
        drawn = limit_sets(n, k, most, seed=3)
        assert drawn.shape == (most, k)
        assert len({tuple(row) for row in drawn}) == most
        assert (np.diff(drawn) > 0).all()
        assert drawn.min() >= 0
        assert drawn.max() < n
        np.testing.assert_array_equal(drawn, limit_sets(n, k, most, seed=3))
    assert len(limit_sets(46, 2, 99_999)) == math.comb(46, 2) == 1035


@pytest.mark.parametrize(("n", "gap"), [(20, 8.6e-4), (50, 2.1e-5), (100, 1.3e-6), (200, 8.4e-8)])
def test_four_dimensions_serve_all_pairs_with_the_margins_of_the_card(n: int, gap: float) -> None:
    sets = limit_sets(n, 2)
    queries, documents = cyclic_embeddings(n, 2, sets)
    assert queries.shape == (math.comb(n, 2), 4)
    np.testing.assert_allclose(np.linalg.norm(queries, axis=1), 1)
    np.testing.assert_allclose(np.linalg.norm(documents, axis=1), 1)
    assert margins(queries, documents, sets).min() == pytest.approx(gap, rel=0.03)
    assert limit_recall(queries @ documents.T, sets, cuts=(2,), tie=1e-12) == {2: 1.0}
    half = queries.astype(np.float16) @ documents.astype(np.float16).T
    found = limit_recall(half.astype(np.float32), sets, cuts=(2,), tie=0)[2]
    assert found == 1 if n == 20 else found < 0.95  # two bytes are too few from about 50 on


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(0, 6))
def test_twice_k_dimensions_serve_all_k_sets(k: int, more: int) -> None:
    n = k + more
    sets = limit_sets(n, k)
    queries, documents = cyclic_embeddings(n, k, sets)
    assert documents.shape == (n, 2 * k)
    assert margins(queries, documents, sets).min() > 0


def separable(points: Array, chosen: tuple[int, ...]) -> bool:
    """Is there a direction in which all chosen points are beyond all others? A linear programme."""
    n, d = points.shape
    inside = np.isin(np.arange(n), chosen)
    sign = np.where(inside, -1.0, 1.0)[:, None]
    answer = linprog(np.zeros(d + 1), A_ub=sign * np.c_[points, -np.ones(n)], b_ub=-np.ones(n), bounds=(None, None))
    return bool(answer.status == 0)


@pytest.mark.parametrize(("n", "k", "dim"), [(4, 2, 2), (5, 2, 3), (6, 3, 3), (8, 3, 5), (5, 3, 2), (3, 1, 1)])
def test_no_points_on_a_sphere_do_what_is_called_unreachable(n: int, k: int, dim: int) -> None:
    assert reachable(n, k, dim) is False
    rng = np.random.default_rng(0)
    for _ in range(5):
        points = rng.normal(size=(n, dim))
        points /= np.linalg.norm(points, axis=1, keepdims=True)
        assert not all(separable(points, chosen) for chosen in itertools.combinations(range(n), k))


def test_what_is_called_reachable_is_shown_by_vectors() -> None:
    assert reachable(10_000_000, 2, 4) is True
    assert reachable(10_000_000, 2, 3) is False
    for n, k, dim in ((3, 2, 2), (4, 2, 3), (7, 5, 4), (9, 3, 6)):
        assert reachable(n, k, dim) is True
    corners = np.eye(4) - 0.25  # a simplex: four documents in three dimensions
    assert all(separable(corners, chosen) for k in (1, 2, 3) for chosen in itertools.combinations(range(4), k))
    # 5 of 7 in four dimensions: the cyclic polytope's query of the two left out, turned round.
    sets = limit_sets(7, 2)
    queries, documents = cyclic_embeddings(7, 2, sets)
    rest = np.array([[i for i in range(7) if i not in pair] for pair in sets])
    assert margins(-queries, documents, rest).min() > 0
    assert reachable(7, 3, 5) is None  # neither argument reaches


def test_free_embeddings_reach_what_the_card_says() -> None:
    assert critical_n(2, most=5, steps=800)[0] == 3
    assert critical_n(3, most=6, steps=800)[0] == 4
    pairs = free_embeddings(limit_sets(4, 2), 4, 2, steps=600)
    assert pairs.solved == pytest.approx(2 / 3)  # the four neighbours on the circle, of six
    assert free_embeddings(limit_sets(8, 2), 8, 4).solved == 1


def test_free_embeddings_are_what_they_say_and_the_same_for_the_same_seed() -> None:
    sets = limit_sets(9, 2)
    fit = free_embeddings(sets, 9, 3, steps=300, seed=5)
    np.testing.assert_allclose(np.linalg.norm(fit.documents, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(fit.queries, axis=1), 1, rtol=1e-5)
    found = margins(fit.queries.astype(float), fit.documents.astype(float), sets)
    assert fit.solved == pytest.approx((found > 0).mean(), abs=1.5 / len(sets))
    top = np.argsort(-(fit.queries @ fit.documents.T), axis=1)[:, :2]
    recall = np.mean([len({*a} & {*b}) / 2 for a, b in zip(top, sets, strict=True)])
    assert fit.recall == pytest.approx(recall)
    np.testing.assert_array_equal(fit.queries, free_embeddings(sets, 9, 3, steps=300, seed=5).queries)
    assert free_embeddings(sets, 9, 3, steps=300, seed=5, seeds=1).steps == 300
    assert free_embeddings(sets, 9, 9).steps < 200  # one dimension a document: solved at once


def test_gallop_and_bisection_find_the_same_n_as_a_walk() -> None:
    low, tried = critical_n(4, most=12, steps=1000)
    assert tried[low] == 1
    assert all(solved < 1 for n, solved in tried.items() if n > low)
    assert 7 <= low <= 9  # the card's probe reached 8
    assert critical_n(12, most=10, steps=500)[0] == 10  # most is reached and not passed


def test_settings_without_sense_are_named() -> None:
    with pytest.raises(MetricError, match="3 documents have no sets of 4"):
        limit_sets(3, 4)
    with pytest.raises(MetricError, match="no sets of 0"):
        reachable(3, 0, 2)
    with pytest.raises(MetricError, match="dim"):
        reachable(3, 1, 0)
    with pytest.raises(MetricError, match="too many to hold"):
        limit_sets(100_000, 2)
    with pytest.raises(MetricError, match="set 0 names a document twice"):
        cyclic_embeddings(5, 2, np.array([[1, 1]]))
    with pytest.raises(MetricError, match=r"relevant: expected integers \(Q, 2\) in 0 .. 4"):
        cyclic_embeddings(5, 2, np.array([[1, 5]]))
    with pytest.raises(MetricError, match="relevant"):
        free_embeddings(np.array([[0, 9]]), 5, 2)
    with pytest.raises(MetricError, match="seeds: is at least 1"):
        free_embeddings(limit_sets(4, 2), 4, 2, seeds=0)
    with pytest.raises(MetricError, match="temperature"):
        free_embeddings(limit_sets(4, 2), 4, 2, temperature=0)
    with pytest.raises(MetricError, match="most: is above k = 2"):
        critical_n(2, most=2)
