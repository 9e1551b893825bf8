"""Retrieval within classes against naive loops and pytorch-metric-learning's AccuracyCalculator."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

from rayemb.evaluate.metrics import MetricError, class_retrieval, class_retrieval_of_lists, hits_at, ranks
from rayemb.evaluate.metrics.metric_learning import ClassRetrieval

METRICS = ("precision_at_1", "r_precision", "map_at_r", "mrr")


def unit(rng: np.random.Generator, rows: int, dim: int) -> NDArray[np.float32]:
    x = rng.normal(size=(rows, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def lattice(rng: np.random.Generator, rows: int) -> NDArray[np.float32]:
    """Small whole numbers: duplicates, zero vectors and ties everywhere, and products without rounding."""
    return rng.integers(-1, 2, size=(rows, 3)).astype(np.float32)


def naive(scores: list[float], own: list[bool]) -> tuple[float, float, float, int]:
    """R-precision, MAP@R, reciprocal rank and first place, in the worst order, by the definitions."""
    order = sorted(range(len(scores)), key=lambda j: (-scores[j], own[j]))
    hits, r = [own[j] for j in order], sum(own)
    first = hits.index(True) + 1
    precisions = [sum(hits[: i + 1]) / (i + 1) for i in range(r) if hits[i]]
    return sum(hits[:r]) / r, sum(precisions) / r, 1 / first, first


def assert_naive(
    found: ClassRetrieval,
    q: NDArray[np.float32],
    c: NDArray[np.float32],
    lq: NDArray[np.int64],
    lc: NDArray[np.int64],
    skip: NDArray[np.int64],
) -> None:
    scores = q.astype(np.float64) @ c.T.astype(np.float64)
    for i in range(len(q)):
        others = [j for j in range(len(c)) if j != skip[i]]
        own = [bool(lc[j] == lq[i]) for j in others]
        assert found.relevant[i] == sum(own)
        if not any(own):
            assert np.isnan([found.r_precision[i], found.map_at_r[i], found.reciprocal_rank[i]]).all()
            assert all(np.isnan(values[i]) for values in found.recall.values())
            continue
        r_precision, map_at_r, reciprocal, first = naive([float(scores[i, j]) for j in others], own)
        assert found.r_precision[i] == pytest.approx(r_precision, abs=1e-12)
        assert found.map_at_r[i] == pytest.approx(map_at_r, abs=1e-12)
        assert found.reciprocal_rank[i] == pytest.approx(reciprocal, abs=1e-12)
        assert all(values[i] == (first <= k) for k, values in found.recall.items())


@pytest.mark.parametrize("average", ["sample", "class"])
@pytest.mark.parametrize("seed", range(3))
def test_equals_pytorch_metric_learning(seed: int, average: str) -> None:
    rng = np.random.default_rng(seed)
    x, labels = unit(rng, 150, 16), rng.integers(0, 20, 150)
    labels[:3] = [100, 101, 102]  # alone in their classes
    found = class_retrieval(x, labels)
    theirs = AccuracyCalculator(
        include=("precision_at_1", "r_precision", "mean_average_precision_at_r", "mean_reciprocal_rank"),
        k=None,
        avg_of_avgs=average == "class",
        device=torch.device("cpu"),
    ).get_accuracy(torch.tensor(x), torch.tensor(labels))
    for ours, name in (
        ("precision_at_1", "precision_at_1"),
        ("r_precision", "r_precision"),
        ("map_at_r", "mean_average_precision_at_r"),
    ):
        mean = found.mean(ours, average)  # type: ignore[arg-type]
        assert mean.value == pytest.approx(theirs[name], abs=1e-9)
        assert (mean.queries, mean.left_out) == (147, 3)
    mean = found.mean("mrr", average)  # type: ignore[arg-type]
    assert mean.value == pytest.approx(theirs["mean_reciprocal_rank"], abs=1e-6)  # theirs is summed in float32


def test_equals_pytorch_metric_learning_with_other_candidates() -> None:
    rng = np.random.default_rng(7)
    q, c = unit(rng, 40, 8), unit(rng, 90, 8)
    lq, lc = rng.integers(0, 12, 40), rng.integers(0, 10, 90)  # classes 10 and 11 have no candidate
    found = class_retrieval(q, lq, c, lc)
    theirs = AccuracyCalculator(
        include=("precision_at_1", "r_precision", "mean_average_precision_at_r"), k=None, device=torch.device("cpu")
    ).get_accuracy(torch.tensor(q), torch.tensor(lq), torch.tensor(c), torch.tensor(lc))
    assert found.mean("map_at_r").value == pytest.approx(theirs["mean_average_precision_at_r"], abs=1e-9)
    assert found.mean("r_precision").value == pytest.approx(theirs["r_precision"], abs=1e-9)
    assert found.mean("recall@1").value == pytest.approx(theirs["precision_at_1"], abs=1e-9)
    assert found.mean("recall@1").left_out == (lq >= 10).sum() > 0


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(2, 25),
    classes=st.integers(1, 6),
    block=st.integers(1, 30),
    ties=st.booleans(),
)
def test_equals_the_naive_loop_whatever_the_block(seed: int, rows: int, classes: int, block: int, ties: bool) -> None:
    rng = np.random.default_rng(seed)
    x = lattice(rng, rows) if ties else unit(rng, rows, 5)
    labels = rng.integers(0, classes, rows)
    labels[:2] = 0  # at least one query has an answer
    ks = (1, 3, rows, 1000)  # k > n as well
    found = class_retrieval(x, labels, ks=ks, block=block)
    assert_naive(found, x, x, labels, labels, np.arange(rows))
    q, lq = (lattice(rng, 7) if ties else unit(rng, 7, x.shape[1])), rng.integers(0, classes + 1, 7)
    lq[0] = 0
    skip = rng.integers(-1, rows, 7)
    skip[0] = -1
    other = class_retrieval(q, lq, x, labels, exclude=skip, ks=ks, block=block)
    assert_naive(other, q, x, lq, labels, skip)


def test_a_constant_encoder_earns_the_worst_place_in_every_figure() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(50), 4)
    for noise in (0.0, 1e-8):
        x = (unit(rng, 1, 64) + rng.normal(scale=noise, size=(200, 64))).astype(np.float32)
        found = class_retrieval(x, labels)
        assert found.mean("mrr").value == pytest.approx(1 / 197)
        assert [found.mean(name).value for name in ("recall@8", "r_precision", "map_at_r")] == [0.0] * 3
    zeros = class_retrieval(np.zeros((200, 3), np.float32), labels)
    assert zeros.mean("map_at_r").value == 0.0


def test_a_duplicate_is_an_answer_the_query_itself_is_not() -> None:
    x = np.array([[1, 0], [1, 0], [0.6, 0.8], [0.6, 0.8]], np.float32)
    found = class_retrieval(x, np.array([1, 1, 2, 3]), ks=(1,))
    assert found.recall[1][:2].tolist() == [1.0, 1.0]  # the other one, although both are at distance 0
    assert np.isnan(found.recall[1][2:]).all()


def test_recall_is_that_of_any_hit_and_equals_the_house_ranks() -> None:
    rng = np.random.default_rng(4)
    x, labels = unit(rng, 80, 6), np.repeat(np.arange(8), 10)
    own = np.arange(80)
    found = class_retrieval(x, labels, ks=(1, 8))
    np.testing.assert_array_equal(found.recall[8], hits_at(ranks(x, x, labels, labels, exclude=own), 8))


def test_averages_say_which_they_are() -> None:
    x = np.array([[1, 0], [0.99, 0.14], [0.98, 0.2], [0, 1], [0.5, 0.86]], np.float32)
    found = class_retrieval(x, np.array([1, 1, 1, 2, 2]), ks=(1,))
    assert found.recall[1].tolist() == [1, 1, 1, 1, 1]
    worse = ClassRetrieval({1: np.array([1, 1, 1, 0, 0.0])}, *[np.zeros(5)] * 3, np.ones(5, int), found.labels)
    assert worse.mean("precision_at_1") == (0.6, 5, 0)
    assert worse.mean("precision_at_1", "class") == (0.5, 5, 0)
    with pytest.raises(MetricError, match=r"'recall@2' was not measured.*recall@1, r_precision"):
        worse.mean("recall@2")
    with pytest.raises(MetricError, match="no average 'macro'"):
        worse.mean("mrr", "macro")  # type: ignore[arg-type]


def exact_lists(x: NDArray[np.float32], depth: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    scores = x.astype(np.float64) @ x.T.astype(np.float64)
    ids = np.argsort(-scores, axis=1, kind="stable")[:, :depth]
    return ids, np.take_along_axis(scores, ids, axis=1)


@pytest.mark.parametrize("ties", [False, True])
def test_lists_give_the_same_as_vectors(ties: bool) -> None:
    rng = np.random.default_rng(8)
    labels = rng.integers(0, 15, 120)
    labels[:2] = [77, 78]
    x = lattice(rng, 120) if ties else unit(rng, 120, 8)
    depth = 120 if ties else 1 + max(8, int(np.bincount(labels[2:]).max()) - 1)  # a tie at the end is the search's
    ids, scores = exact_lists(x, depth)
    a = class_retrieval(x, labels)
    b = class_retrieval_of_lists(ids, scores, labels, labels, exclude=np.arange(120))
    for name in ("recall@1", "recall@8", "r_precision", "map_at_r"):
        assert a.mean(name) == b.mean(name)
    np.testing.assert_array_equal(a.map_at_r, b.map_at_r)
    shown = b.reciprocal_rank > 0  # of first places within the list
    assert shown.sum() > 60
    np.testing.assert_array_equal(a.reciprocal_rank[shown], b.reciprocal_rank[shown])


def test_lists_that_are_too_short_have_no_figure() -> None:
    """pytorch-metric-learning gives a wrong MAP@R there."""
    rng = np.random.default_rng(1)
    x, labels = unit(rng, 30, 4), np.repeat(np.arange(3), 10)
    ids, scores = exact_lists(x, 9)
    with pytest.raises(
        MetricError, match=r"query 0 of class 0 has 8 candidates, but its class has 9 others \(30 lists"
    ):
        class_retrieval_of_lists(ids, scores, labels, labels, exclude=np.arange(30))
    ids, scores = exact_lists(x, 10)
    with pytest.raises(MetricError, match=r"query 0 of class 0 has 9 candidates, but k is 16.*search deeper"):
        class_retrieval_of_lists(ids, scores, labels, labels, exclude=np.arange(30), ks=(16,))
    ids, scores = exact_lists(x, 30)
    whole = class_retrieval_of_lists(ids, scores, labels, labels, exclude=np.arange(30), ks=(1000,))
    assert whole.mean("recall@1000").value == 1.0


def test_bad_input_is_named() -> None:
    rng = np.random.default_rng(1)
    x, labels = unit(rng, 6, 4), np.array([0, 0, 1, 1, 2, 2])
    with pytest.raises(MetricError, match="each of 6 queries is alone in its class"):
        class_retrieval(x, np.arange(6))
    broken = x.copy()
    broken[3, 1] = np.nan
    with pytest.raises(MetricError, match="queries: 1 of 6 vectors hold NaN"):
        class_retrieval(broken, labels)
    with pytest.raises(MetricError, match="the candidates have no labels"):
        class_retrieval(x, labels, x)
    with pytest.raises(MetricError, match="without candidates the queries are their own"):
        class_retrieval(x, labels, exclude=np.arange(6))
    with pytest.raises(MetricError, match="queries have 4 dimensions, candidates 3"):
        class_retrieval(x, labels, x[:, :3], labels)
    with pytest.raises(MetricError, match="k counts from 1"):
        class_retrieval(x, labels, ks=(0,))
    ids, scores = exact_lists(x, 6)
    scores[4, 2] = np.nan
    with pytest.raises(MetricError, match=r"query 4 gives document \d the score nan"):
        class_retrieval_of_lists(ids, scores, labels, labels)
    with pytest.raises(MetricError, match="candidate 5 has no label, there are 5"):
        class_retrieval_of_lists(ids, np.ones(ids.shape), labels, labels[:5])
