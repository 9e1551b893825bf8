"""Ranks, recall and MRR against naive loops and torchmetrics; chance against binomials and simulation."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torchmetrics.functional.retrieval import retrieval_hit_rate, retrieval_reciprocal_rank

from rayemb.evaluate.metrics import (
    MetricError,
    chance_mrr,
    chance_recall_at,
    hits_at,
    mrr,
    ranks,
    recall_at,
    reciprocal_ranks,
)

Case = tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]


def unit(rng: np.random.Generator, rows: int, dim: int) -> NDArray[np.float32]:
    x = rng.normal(size=(rows, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def case(seed: int, n_queries: int = 37, n_candidates: int = 53, dim: int = 8, groups: int = 11) -> Case:
    """Random vectors; every group has a candidate, so that every query has an answer."""
    rng = np.random.default_rng(seed)
    groups_c = np.concatenate([np.arange(groups), rng.integers(0, groups, n_candidates - groups)])
    return (
        unit(rng, n_queries, dim),
        unit(rng, n_candidates, dim),
        rng.integers(0, groups, n_queries),
        rng.permutation(groups_c),
    )


def naive_rank(scores: list[float], relevant: list[bool], skip: int = -1) -> int:
    """The worst place that the best relevant candidate can take, by explicit counting."""
    places = [j for j in range(len(scores)) if j != skip]
    best = max(scores[j] for j in places if relevant[j])
    return 1 + sum(1 for j in places if not relevant[j] and scores[j] >= best)


@pytest.mark.parametrize("seed", range(5))
def test_ranks_equal_the_naive_loop(seed: int) -> None:
    q, c, gq, gc = case(seed)
    found = ranks(q, c, gq, gc, block=7)
    for i in range(len(q)):
        scores = [math.fsum(float(a) * float(b) for a, b in zip(q[i], row, strict=True)) for row in c]
        assert found[i] == naive_rank(scores, [bool(g == gq[i]) for g in gc])
    assert found.dtype == np.int64


@pytest.mark.parametrize("k", [1, 5, 10, 53, 1000])
def test_recall_and_mrr_equal_torchmetrics(k: int) -> None:
    q, c, gq, gc = case(7)
    found = ranks(q, c, gq, gc)
    hits, reciprocal = [], []
    for i in range(len(q)):
        # + 2: the MRR of torchmetrics takes a score of 0 or less for "not retrieved" and gives 0.
        scores = 2 + torch.from_numpy((c.astype(np.float64) * q[i].astype(np.float64)).sum(axis=1))
        target = torch.from_numpy(gc == gq[i])
        hits.append(retrieval_hit_rate(scores, target, top_k=min(k, len(c))).item())
        reciprocal.append(retrieval_reciprocal_rank(scores, target).item())
    np.testing.assert_array_equal(hits_at(found, k), hits)
    np.testing.assert_allclose(reciprocal_ranks(found), reciprocal, rtol=1e-6)
    assert recall_at(found, k) == pytest.approx(np.mean(hits))
    assert mrr(found) == pytest.approx(np.mean(reciprocal), rel=1e-6)


def test_any_hit_counts_once_with_five_captions_an_image() -> None:
    """The image-text dialect: one of five captions in the top 1 is a full hit, not a fifth."""
    image = np.array([[1, 0]], np.float32)
    captions = np.array([[0.9, 0], [0.5, 0], [0.4, 0], [0.3, 0], [0.2, 0], [0.8, 0]], np.float32)
    found = ranks(image, captions, np.array([4]), np.array([4, 4, 4, 4, 4, 9]))
    assert found.tolist() == [1]
    assert recall_at(found, 1) == 1.0


def test_a_tied_irrelevant_candidate_ranks_before_the_relevant_one() -> None:
    q = np.array([[1, 0]], np.float32)
    c = np.array([[1, 0], [1, 0], [0.5, 0], [1, 0]], np.float32)
    assert ranks(q, c, np.array([1]), np.array([1, 2, 3, 4])).tolist() == [3]
    assert ranks(q, c, np.array([1]), np.array([1, 1, 3, 1])).tolist() == [1]  # ties among relevant ones are free


@pytest.mark.parametrize("noise", [0.0, 1e-8])
def test_a_constant_encoder_earns_less_than_chance(noise: float) -> None:
    """Also when batching adds a rounding's worth of noise, in which a sort would find an order."""
    rng = np.random.default_rng(0)
    groups = np.arange(300)
    one = unit(rng, 1, 128)
    q = (one + rng.normal(scale=noise, size=(300, 128))).astype(np.float32)
    c = (one + rng.normal(scale=noise, size=(300, 128))).astype(np.float32)
    found = ranks(q, c, groups, groups)
    assert (found == 300).all()
    assert recall_at(found, 1) == 0.0 < chance_recall_at(groups, groups, 1)
    assert mrr(found) < chance_mrr(groups, groups)


def test_zero_vectors_are_ties_not_hits() -> None:
    zeros = np.zeros((4, 3), np.float32)
    assert ranks(zeros, zeros, np.arange(4), np.arange(4)).tolist() == [4] * 4


def test_a_query_is_not_its_own_answer() -> None:
    rng = np.random.default_rng(3)
    x, groups = unit(rng, 40, 6), np.repeat(np.arange(10), 4)
    own = np.arange(40)
    assert recall_at(ranks(x, x, groups, groups), 1) == 1.0  # the pitfall
    found = ranks(x, x, groups, groups, exclude=own, block=3)
    scores = x.astype(np.float64) @ x.T.astype(np.float64)
    for i in range(40):
        assert found[i] == naive_rank(scores[i].tolist(), (groups == groups[i]).tolist(), skip=i)


def test_exclusion_goes_by_index_so_that_a_duplicate_still_counts() -> None:
    x = np.array([[1, 0], [1, 0], [0, 1]], np.float32)
    found = ranks(x[:1], x, np.array([5]), np.array([5, 5, 6]), exclude=np.array([0]))
    assert found.tolist() == [1]  # row 1, the duplicate
    found = ranks(x[:1], x, np.array([5]), np.array([6, 6, 5]), exclude=np.array([0]))
    assert found.tolist() == [2]  # the excluded row is not in the way, its duplicate is


def test_minus_one_excludes_nothing() -> None:
    q, c, gq, gc = case(1)
    np.testing.assert_array_equal(ranks(q, c, gq, gc, exclude=np.full(len(q), -1)), ranks(q, c, gq, gc))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    n_queries=st.integers(1, 12),
    n_candidates=st.integers(4, 20),
    groups=st.integers(1, 4),
    levels=st.sampled_from([1, 2, 1000]),  # few levels make many exact ties
    block=st.integers(1, 15),
)
def test_ranks_do_not_depend_on_order_or_block(
    seed: int, n_queries: int, n_candidates: int, groups: int, levels: int, block: int
) -> None:
    rng = np.random.default_rng(seed)
    _, _, gq, gc = case(seed, n_queries, n_candidates, 3, groups)
    q = rng.integers(-levels, levels + 1, (n_queries, 3)).astype(np.float32)
    c = rng.integers(-levels, levels + 1, (n_candidates, 3)).astype(np.float32)
    found = ranks(q, c, gq, gc)
    rows, columns = rng.permutation(n_queries), rng.permutation(n_candidates)
    np.testing.assert_array_equal(ranks(q[rows], c[columns], gq[rows], gc[columns], block=block), found[rows])
    scores = q.astype(np.int64) @ c.astype(np.int64).T  # exact
    for i in range(n_queries):
        assert found[i] == naive_rank(scores[i].tolist(), (gc == gq[i]).tolist())


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), dim=st.integers(1, 64), block=st.integers(1, 80), scale=st.floats(1e-3, 1e3))
def test_ranks_of_real_vectors_do_not_depend_on_block_or_scale(seed: int, dim: int, block: int, scale: float) -> None:
    q, c, gq, gc = case(seed, 60, 90, dim)
    found = ranks(q, c, gq, gc, block=60)
    np.testing.assert_array_equal(ranks(q, c, gq, gc, block=block), found)
    power = np.float32(2.0 ** round(math.log2(scale)))  # a power of two rounds nothing
    np.testing.assert_array_equal(ranks(q * power, c * power, gq, gc), found)


def test_a_rounding_of_float32_decides_no_rank() -> None:
    """Candidates crowd the edge of a tie; exact sums say on which side each one lies."""
    rng = np.random.default_rng(4)
    q = unit(rng, 1, 64)
    right = q + 0.3 * unit(rng, 1, 64)  # a similarity near 1, where float32 steps by 6e-8
    wrong = right - (rng.uniform(0.5, 1.5, (400, 1)) * 1e-6 * q).astype(np.float32)
    c = np.concatenate([right, wrong])
    exact = [math.fsum(float(a) * float(b) for a, b in zip(q[0], row, strict=True)) for row in c]
    edge = exact[0] - 1e-6 * max(np.linalg.norm(row.astype(np.float64)) for row in c) * np.linalg.norm(
        q[0].astype(np.float64)
    )
    before = sum(score >= edge for score in exact[1:])
    assert 50 < before < 350
    assert ranks(q, c, np.array([0]), np.arange(401)).tolist() == [1 + before]


@pytest.mark.parametrize("block", [1, 2])
def test_a_tie_is_measured_at_the_length_of_its_own_query(block: int) -> None:
    q = np.array([[1024, 0], [1, 0]], np.float32)
    c = np.array([[1, 0], [1 - 1e-4, 0]], np.float32)
    assert ranks(q, c, np.array([0, 0]), np.array([0, 1]), block=block).tolist() == [1, 1]


def test_recall_grows_with_k_and_ends_at_one() -> None:
    found = ranks(*case(5))
    values = [recall_at(found, k) for k in range(1, 54)]
    assert values == sorted(values)
    assert values[-1] == 1.0


def test_no_queries_have_no_ranks_and_no_mean() -> None:
    _, c, _, gc = case(0)
    none = ranks(np.zeros((0, 8), np.float32), c, np.zeros(0, np.int64), gc)
    assert none.shape == (0,)
    with pytest.raises(MetricError, match="no queries"):
        mrr(none)


def test_queries_without_an_answer_are_refused_and_counted() -> None:
    q, c, gq, gc = case(0)
    gq[[3, 4]] = 99
    with pytest.raises(MetricError, match="2 of 37 queries"):
        ranks(q, c, gq, gc)
    with pytest.raises(MetricError, match="2 of 37 queries"):
        chance_recall_at(gq, gc, 5)
    lone = np.arange(5)  # each alone in its group: nothing is left once itself is excluded
    with pytest.raises(MetricError, match="5 of 5 queries"):
        ranks(q[:5], q[:5], lone, lone, exclude=lone)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", [0, 1])
def test_non_finite_vectors_are_refused(value: float, side: int) -> None:
    arrays = list(case(0))
    arrays[side][2, 1] = value
    with pytest.raises(MetricError, match=r"1 of \d+ vectors"):
        ranks(*arrays)


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda q, c, gq, gc: (q[:, :4], c, gq, gc), "candidates"),
        (lambda q, c, gq, gc: (q[0], c, gq, gc), "queries"),
        (lambda q, c, gq, gc: (q.astype(np.int64), c, gq, gc), "queries"),
        (lambda q, c, gq, gc: (q, c, gq[:-1], gc), "groups_q"),
        (lambda q, c, gq, gc: (q, c, gq, gc.astype(float)), "groups_c"),
    ],
)
def test_wrong_shapes_are_named(change: object, where: str) -> None:
    with pytest.raises(MetricError) as error:
        ranks(*change(*case(0)))  # type: ignore[operator]
    assert error.value.where == where


def test_wrong_arguments_are_named() -> None:
    q, c, gq, gc = case(0)
    with pytest.raises(MetricError, match="exclude"):
        ranks(q, c, gq, gc, exclude=np.full(len(q), len(c)))
    with pytest.raises(MetricError, match="block"):
        ranks(q, c, gq, gc, block=0)
    with pytest.raises(MetricError, match="k counts from 1"):
        recall_at(np.array([1]), 0)
    with pytest.raises(MetricError, match="ranks count from 1"):
        mrr(np.array([0]))


@pytest.mark.parametrize("k", [1, 3, 10])
def test_chance_is_that_of_every_ordering(k: int) -> None:
    """All orders of 6 candidates enumerated, two sizes of group."""
    gq, gc = np.array([0, 1, 1]), np.array([0, 0, 1, 1, 1, 2])
    firsts = {g: [min(order.index(j) for j in np.flatnonzero(gc == g)) + 1 for order in orders()] for g in (0, 1)}
    hit = [Fraction(sum(f <= k for f in firsts[g]), len(firsts[g])) for g in gq.tolist()]
    reciprocal = [sum(Fraction(1, f) for f in firsts[g]) / len(firsts[g]) for g in gq.tolist()]
    assert chance_recall_at(gq, gc, k) == pytest.approx(float(sum(hit) / 3), abs=1e-14)
    assert chance_mrr(gq, gc) == pytest.approx(float(sum(reciprocal) / 3), abs=1e-14)


def orders() -> list[tuple[int, ...]]:
    return list(itertools.permutations(range(6)))


@pytest.mark.parametrize(("m", "r", "k"), [(10, 1, 1), (10, 10, 1), (5000, 1, 10), (5000, 37, 5), (200_000, 3, 10)])
def test_chance_equals_the_binomials(m: int, r: int, k: int) -> None:
    groups_c = np.concatenate([np.zeros(r), np.ones(m - r)]).astype(np.int64)
    exact = 1 - Fraction(math.comb(m - r, k), math.comb(m, k))
    assert chance_recall_at(np.zeros(4, np.int64), groups_c, k) == pytest.approx(float(exact), rel=1e-12)


def test_chance_mrr_of_one_relevant_candidate_is_a_harmonic_number() -> None:
    m = 1000
    expected = sum(1 / i for i in range(1, m + 1)) / m
    assert chance_mrr(np.array([0]), np.arange(m)) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("own", [False, True])
def test_chance_is_what_random_vectors_score(own: bool) -> None:
    """Monte Carlo, through `ranks` itself; with self-exclusion one candidate and one relevant one fewer."""
    rng = np.random.default_rng(11)
    groups = np.repeat(np.arange(20), [2] * 10 + [4] * 10)
    exclude = np.arange(len(groups)) if own else None
    found = []
    for _ in range(400):
        order = rng.normal(size=(len(groups), 1, len(groups))).astype(np.float32)
        for i in rng.choice(len(groups), 10, replace=False):
            skip = None if exclude is None else exclude[i : i + 1]
            one_hot = np.eye(len(groups), dtype=np.float32)  # similarities are then the drawn numbers themselves
            found.append(ranks(order[i], one_hot, groups[i : i + 1], groups, exclude=skip)[0])
    sample = np.array(found)
    error = 4 * 0.5 / math.sqrt(len(sample))
    for k in (1, 5, 10):
        assert recall_at(sample, k) == pytest.approx(chance_recall_at(groups, groups, k, exclude=exclude), abs=error)
    assert mrr(sample) == pytest.approx(chance_mrr(groups, groups, exclude=exclude), abs=error)


def test_chance_leaves_out_the_query_itself() -> None:
    groups = np.array([0, 0, 0, 1, 1])
    own = np.arange(5)  # of the 4 others, 2 are relevant to each of the first three, 1 to each of the last two
    assert chance_recall_at(groups, groups, 1, exclude=own) == pytest.approx((3 * 2 / 4 + 2 * 1 / 4) / 5)
    foreign = np.array([3, 3, 3, 0, 0])  # left out, though not relevant: 4 others with 3, or with 2
    assert chance_recall_at(groups, groups, 1, exclude=foreign) == pytest.approx((3 * 3 / 4 + 2 * 2 / 4) / 5)


def test_chance_with_k_beyond_the_candidates_is_certain() -> None:
    assert chance_recall_at(np.array([0]), np.array([0, 1, 2]), 50) == pytest.approx(1.0)


def test_chance_of_no_queries_is_refused() -> None:
    with pytest.raises(MetricError, match="no queries"):
        chance_mrr(np.zeros(0, np.int64), np.array([1]))
