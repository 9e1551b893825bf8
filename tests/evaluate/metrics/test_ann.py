"""Recall of approximate search against faiss' own measures, ann-benchmarks' rule and real indexes."""

from typing import Any

import faiss
import numpy as np
import pytest
from faiss.contrib.evaluation import check_ref_knn_with_draws, knn_intersection_measure
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rayemb.evaluate.metrics import MetricError, ann_overlap_at, ann_recall_at, exact_scores

Found = tuple[NDArray[np.int64], NDArray[np.float64]]


def exact(q: NDArray[np.float32], c: NDArray[np.float32], k: int, similarity: Any = "dot") -> Found:
    """The true list, padded with -1 where there are fewer than k."""
    every = np.tile(np.arange(len(c)), (len(q), 1))
    scores = exact_scores(q, c, every, similarity)
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    scores = np.take_along_axis(scores, ids, axis=1)
    short = ((0, 0), (0, k - ids.shape[1]))
    return np.pad(ids, short, constant_values=-1), np.pad(scores, short, constant_values=-np.inf)


def ann_benchmarks(true_distances: NDArray[np.float64], found_distances: NDArray[np.float64], k: int) -> list[float]:
    """`knn` of ann_benchmarks/plotting/metrics.py, its absolute epsilon replaced by the relative one."""
    recalls = []
    for true, found in zip(true_distances, found_distances, strict=True):
        threshold = true[k - 1] * (1 + 1e-5)
        recalls.append(sum(1 for d in found[:k] if d <= threshold) / k)
    return recalls


@pytest.mark.parametrize("similarity", ["dot", "euclidean"])
@pytest.mark.parametrize("nprobe", [1, 4, 16])
@pytest.mark.parametrize("copies", [1, 3])
def test_a_real_index_equals_the_rule_of_ann_benchmarks(copies: int, nprobe: int, similarity: Any) -> None:
    rng = np.random.default_rng(0)
    c = np.repeat(rng.normal(size=(500, 16)), copies, axis=0).astype(np.float32)
    q = rng.normal(size=(40, 16)).astype(np.float32)
    index = faiss.index_factory(
        16, "IVF16,Flat", faiss.METRIC_L2 if similarity == "euclidean" else faiss.METRIC_INNER_PRODUCT
    )
    index.train(c)
    index.add(c)
    index.nprobe = nprobe
    _, found = index.search(q, 10)
    true_ids, true = exact(q, c, 10, similarity)
    scores = exact_scores(q, c, found, similarity)
    recall = ann_recall_at(found, scores, true_ids, true, 10)
    if similarity == "euclidean":
        theirs = np.array(ann_benchmarks(-true, -scores, 10))
        if copies == 1:
            _, one_more = exact(q, c, 11, similarity)
            clear = np.abs(one_more[:, 10] / one_more[:, 9] - 1) > 2e-5  # no tie at the cut
            assert clear.sum() > 35
            np.testing.assert_allclose(recall[clear], theirs[clear], atol=1e-12)
        assert (recall <= theirs + 1e-12).all()  # see below for the one difference
    overlap = ann_overlap_at(found, true_ids, 10)
    assert overlap.mean() == pytest.approx(knn_intersection_measure(found, true_ids), abs=1e-12)
    assert (recall >= overlap).all()
    if nprobe == 16:  # all of it: only ties differ
        assert (recall == 1).all()
        check_ref_knn_with_draws(np.abs(true), true_ids, *self_sorted(found, scores))
    else:
        assert recall.mean() < 1


def test_ties_do_not_make_up_for_a_nearer_neighbour() -> None:
    """The three found are as far as the third neighbour; ann-benchmarks gives 1, although the nearest is missing."""
    true_ids, true = np.array([[0, 1, 2]]), np.array([[-1.0, -2, -2]])
    found, scores = np.array([[1, 2, 3]]), np.full((1, 3), -2.0)
    assert ann_benchmarks(-true, -scores, 3) == [1.0]
    assert ann_recall_at(found, scores, true_ids, true, 3).tolist() == pytest.approx([2 / 3])


def self_sorted(ids: NDArray[np.int64], scores: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    order = np.argsort(-scores, axis=1, kind="stable")
    scores, ids = np.take_along_axis(scores, order, axis=1), np.take_along_axis(ids, order, axis=1)
    return np.abs(scores), ids


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 12), k=st.integers(1, 15), levels=st.integers(1, 4))
def test_full_recall_is_what_faiss_calls_the_same_answer(seed: int, n: int, k: int, levels: int) -> None:
    """Over random answers to a question full of ties, k > n among them: recall is 1 where faiss' check passes.

    The lists go in by distance, as the check wants them; both see the k first of a common truth.
    """
    rng = np.random.default_rng(seed)
    distances = rng.integers(1, levels + 1, n).astype(np.float64)
    order, answer = np.argsort(distances, kind="stable"), rng.permutation(n)
    kept = min(k, n)
    true_ids, found = order[:kept][None], answer[:kept][None]
    found = found[:, np.argsort(distances[found[0]], kind="stable")]
    padded = ((0, 0), (0, k - kept))
    recall = ann_recall_at(
        np.pad(found, padded, constant_values=-1),
        np.pad(-distances[found], padded, constant_values=-np.inf),
        np.pad(true_ids, padded, constant_values=-1),
        np.pad(-distances[true_ids], padded, constant_values=-np.inf),
        k,
    )[0]
    try:
        check_ref_knn_with_draws(distances[true_ids], true_ids, distances[found], found)
        same = True
    except AssertionError:
        same = False
    assert (recall == 1.0) == same
    last = distances[true_ids[0, -1]]
    nearer = sum(distances[i] < last for i in found[0])
    ties = min(sum(distances[i] == last for i in found[0]), sum(distances[i] == last for i in true_ids[0]))
    assert recall == pytest.approx((nearer + ties) / kept, abs=1e-12)


def test_any_of_the_duplicates_will_do() -> None:
    c = np.ones((100, 4), np.float32)
    q = np.ones((1, 4), np.float32)
    true_ids, true = exact(q, c, 10)
    found = np.arange(90, 100)[None]
    assert ann_recall_at(found, exact_scores(q, c, found), true_ids, true, 10).tolist() == [1.0]
    assert ann_overlap_at(found, true_ids, 10).tolist() == [0.0]


def test_the_tolerance_is_relative_and_tight() -> None:
    true_ids, true = np.array([[0, 1]]), np.array([[0.9, 0.8]])
    found = np.array([[0, 7]])
    for gap, recall in ((4e-6, 1.0), (5e-4, 0.5)):  # the second passes ann-benchmarks' 1e-3
        assert ann_recall_at(found, np.array([[0.9, 0.8 - gap]]), true_ids, true, 2).tolist() == [recall]
    scaled = ann_recall_at(found, 1e6 * np.array([[0.9, 0.8 - 4e-6]]), true_ids, 1e6 * true, 2)
    assert scaled.tolist() == [1.0]


def test_fewer_survivors_than_k_are_the_denominator() -> None:
    true_ids, true = np.array([[4, 2, -1], [-1, -1, -1]]), np.array([[0.9, 0.8, 0], [0, 0, 0]])
    found, scores = np.array([[2, -1, -1], [-1, -1, -1]]), np.array([[0.8, np.nan, np.nan]] * 2)
    for recall in (ann_recall_at(found, scores, true_ids, true, 3), ann_overlap_at(found, true_ids, 3)):
        assert recall[0] == 0.5
        assert np.isnan(recall[1])


def test_only_the_first_k_count_and_gaps_are_passed_over() -> None:
    true_ids, true = np.array([[1, 2, 3]]), np.array([[3.0, 2, 1]])
    found, scores = np.array([[-1, 9, 1, 2]]), np.array([[0, 0.5, 3, 2]])
    assert ann_recall_at(found, scores, true_ids, true, 2).tolist() == [0.5]
    assert ann_overlap_at(found, true_ids, 2).tolist() == [0.5]
    assert ann_recall_at(found, scores, true_ids, true, 3).tolist() == pytest.approx([2 / 3])


def test_a_leaking_filter_is_not_a_hit() -> None:
    """Candidate 7 is nearer than the second survivor and does not survive: by distance alone it would count."""
    with pytest.raises(MetricError, match="'q' finds candidate 7, which is nearer than a true neighbour but is none"):
        ann_recall_at(
            np.array([[0, 7]]), np.array([[0.9, 0.85]]), np.array([[0, 1]]), np.array([[0.9, 0.8]]), 2, queries=["q"]
        )
    with pytest.raises(MetricError, match="query 0 has 1 true neighbours, but more were found"):
        ann_recall_at(np.array([[0, 7]]), np.array([[0.9, 0.1]]), np.array([[0, -1]]), np.array([[0.9, 0]]), 2)
    with pytest.raises(MetricError, match="query 0 has 1 true neighbours, but more were found"):
        ann_overlap_at(np.array([[0, 7]]), np.array([[0, -1]]), 2)


def test_exact_scores_equal_the_definitions() -> None:
    rng = np.random.default_rng(0)
    q, c = rng.normal(size=(7, 5)).astype(np.float32), rng.normal(size=(30, 5)).astype(np.float32)
    ids = np.argsort(rng.random((7, 30)), axis=1)[:, :6]
    ids[2, 3:] = -1
    c[ids[0, 0]] = q[0]
    dot, distance = exact_scores(q, c, ids), exact_scores(q, c, ids, "euclidean")
    for i, row in enumerate(ids):
        for j, at in enumerate(row):
            if at < 0:
                assert dot[i, j] == distance[i, j] == -np.inf
                continue
            x, y = q[i].astype(np.float64), c[at].astype(np.float64)
            assert dot[i, j] == pytest.approx(sum(x * y), abs=1e-12)
            assert -distance[i, j] == pytest.approx(sum((x - y) ** 2) ** 0.5, abs=1e-12)
    assert distance[0, 0] == 0.0


def test_bad_input_is_named() -> None:
    ids, scores = np.array([[0, 1], [2, 3]]), np.array([[2.0, 1.0], [2.0, 1.0]])
    broken = scores.copy()
    broken[1, 0] = np.nan
    with pytest.raises(MetricError, match="found_scores: query 'b' gives document 2 the score nan"):
        ann_recall_at(ids, broken, ids, scores, 2, queries=["a", "b"])
    with pytest.raises(MetricError, match="true_scores: query 1 gives document 2 the score nan"):
        ann_recall_at(ids, scores, ids, broken, 2)
    with pytest.raises(MetricError, match="found_ids: query 1 has document 5 more than once"):
        ann_recall_at(np.array([[0, 1], [5, 5]]), scores, ids, scores, 2)
    with pytest.raises(MetricError, match="the true list of query 0 is not best first"):
        ann_recall_at(ids, scores, ids, scores[:, ::-1], 2)
    with pytest.raises(MetricError, match="2 found lists, 1 true ones"):
        ann_recall_at(ids, scores, ids[:1], scores[:1], 2)
    with pytest.raises(MetricError, match="a true list goes on after its end"):
        ann_recall_at(ids, scores, np.array([[-1, 1], [2, 3]]), scores, 2)
    with pytest.raises(MetricError, match="k counts from 1"):
        ann_recall_at(ids, scores, ids, scores, 0)
    q, c = np.ones((2, 3), np.float32), np.ones((3, 3), np.float32)
    with pytest.raises(MetricError, match="candidate 3 is unknown, there are 3"):
        exact_scores(q, c, ids)
    with pytest.raises(MetricError, match="no similarity 'cosine'"):
        exact_scores(q, c, ids[:, :1], "cosine")  # type: ignore[arg-type]
    with pytest.raises(MetricError, match="2 lists for 1 queries"):
        exact_scores(q[:1], c, ids[:, :1])
