"""Clusters against classes: brute force over assignments, naive sums, scikit-learn, torchmetrics and real digits."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torchmetrics.functional import clustering as torch_clustering

from rayemb.evaluate.metrics import (
    MetricError,
    cluster_accuracy,
    cluster_scores,
    kmeans_clusters,
    matched_hits,
)
from rayemb.evaluate.metrics.clustering import _distinct
from tests.memory import traced_peak

Case = tuple[np.ndarray, np.ndarray]


def cases() -> list[Case]:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 5, 80)
    return [
        (y, rng.integers(0, 5, 80)),  # chance
        (y, np.where(rng.random(80) < 0.7, y, rng.integers(0, 5, 80))),
        (y, rng.integers(0, 9, 80)),  # more clusters than classes
        (y, y // 2),  # fewer
        (y, np.zeros(80, int)),  # one
        (y, np.arange(80)),  # each item its own
        (y * 1000 - 7, -y),  # perfect under other names
        (np.array([0, 1]), np.array([3, 3])),
    ]


def brute(labels: np.ndarray, clusters: np.ndarray, new: set[int]) -> tuple[int, int]:
    """The most hits over all one-to-one matchings, and of those matchings the fewest hits on new classes."""
    names, groups = sorted(set(labels.tolist())), sorted(set(clusters.tolist()))
    slots: list[int | None] = [*names, *[None] * len(groups)]
    best = (-1, 0)
    for chosen in set(itertools.permutations(slots, len(groups))):
        match = dict(zip(groups, chosen, strict=True))
        right = [y for y, c in zip(labels.tolist(), clusters.tolist(), strict=True) if match[c] == y]
        best = max(best, (len(right), -sum(y in new for y in right)))
    return best[0], -best[1]


def entropies(y: np.ndarray, c: np.ndarray) -> tuple[float, float, float]:
    """H(y), H(c), I(y; c), by the letter."""

    def h(values: list) -> float:
        return -sum(values.count(v) / len(values) * math.log(values.count(v) / len(values)) for v in set(values))

    both = list(zip(y.tolist(), c.tolist(), strict=True))
    return h(y.tolist()), h(c.tolist()), h(y.tolist()) + h(c.tolist()) - h(both)


@pytest.mark.parametrize("case", cases())
def test_information_and_pairs_by_the_letter(case: Case) -> None:
    y, c = case
    found = cluster_scores(y, c)
    h_y, h_c, mutual = entropies(y, c)
    homogeneity, completeness = mutual / h_y, mutual / h_c if h_c else 1.0
    total = homogeneity + completeness
    assert found.homogeneity == pytest.approx(homogeneity, abs=1e-9)
    assert found.completeness == pytest.approx(completeness, abs=1e-9)
    assert found.v_measure == pytest.approx(2 * homogeneity * completeness / total if total else 0, abs=1e-9)
    assert found.nmi == pytest.approx(mutual / ((h_y + h_c) / 2), abs=1e-9)

    pairs = list(itertools.combinations(range(len(y)), 2))
    same_y, same_c = (np.array([v[i] == v[j] for i, j in pairs]) for v in (y, c))
    expected = same_y.mean() * same_c.mean()
    highest = (same_y.mean() + same_c.mean()) / 2
    assert found.ari == pytest.approx(((same_y & same_c).mean() - expected) / (highest - expected), abs=1e-9)
    purity = sum(max(np.bincount(np.unique(y, return_inverse=True)[1][c == g])) for g in set(c.tolist())) / len(y)
    assert found.purity == pytest.approx(purity)
    assert (found.clusters, found.classes) == (len(set(c.tolist())), len(set(y.tolist())))


@pytest.mark.parametrize("case", cases()[:4])
def test_torchmetrics_says_the_same(case: Case) -> None:
    found = cluster_scores(*case)
    y, c = (torch.from_numpy(np.unique(v, return_inverse=True)[1]) for v in case)
    # Its sums are float32.
    assert found.nmi == pytest.approx(float(torch_clustering.normalized_mutual_info_score(c, y)), abs=1e-5)
    assert found.ami == pytest.approx(float(torch_clustering.adjusted_mutual_info_score(c, y)), abs=1e-5)
    assert found.ari == pytest.approx(float(torch_clustering.adjusted_rand_score(c, y)), abs=1e-5)


def test_chance_is_nothing_to_ami_and_ari_but_something_to_nmi() -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, 500)
    scores = [cluster_scores(y, rng.integers(0, k, 500)) for k in (10, 100)]
    assert scores[1].nmi > 2.5 * scores[0].nmi > 0
    assert all(abs(s.ami) < 0.02 and abs(s.ari) < 0.01 for s in scores)


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 3)), min_size=2, max_size=14),
    st.sets(st.integers(0, 3), min_size=1, max_size=3),
)
def test_accuracy_is_that_of_the_best_of_all_matchings(items: list[tuple[int, int]], known: set[int]) -> None:
    y, c = (np.array(column) for column in zip(*items, strict=True))
    if len(set(y.tolist())) < 2:
        return
    most, _ = brute(y, c, set())
    assert cluster_accuracy(y, c).all == pytest.approx(most / len(y))
    old = np.isin(y, list(known))
    if old.all() or not old.any():
        return
    found = cluster_accuracy(y, c, known)
    most, new_hits = brute(y, c, set(y.tolist()) - known)
    assert found.all == pytest.approx(most / len(y))
    assert found.new == pytest.approx(new_hits / (~old).sum())
    assert found.old == pytest.approx((most - new_hits) / old.sum())

    first = cluster_accuracy(y, c, known, version=1)
    assert first.old == pytest.approx(brute(y[old], c[old], set())[0] / old.sum())
    assert first.new == pytest.approx(brute(y[~old], c[~old], set())[0] / (~old).sum())
    assert first.all == pytest.approx((first.old * old.sum() + first.new * (~old).sum()) / len(y))
    assert first.all >= found.all - 1e-12  # version 1 flatters, never the other way


def test_a_cluster_shared_by_an_old_and_a_new_class_serves_one_of_them() -> None:
    y = np.repeat([0, 1, 2], [10, 10, 10])
    c = np.repeat([0, 1, 1], [10, 10, 10])
    known = {0, 1}
    assert cluster_accuracy(y, c, known, version=1) == (1, 1, 1)
    assert cluster_accuracy(y, c, known) == (pytest.approx(2 / 3), 1.0, 0.0)  # the tie goes against the discovery
    assert cluster_accuracy(y, -c, known) == cluster_accuracy(y, c, known)  # however clusters are numbered


def test_hits_are_per_item_and_surplus_clusters_are_errors() -> None:
    y, c = np.array([0, 0, 0, 1, 1]), np.array([5, 5, 9, 7, 8])
    hits = matched_hits(y, c)
    assert hits[:3].tolist() == [1, 1, 0]
    assert hits.sum() == 3
    assert cluster_scores(y, c).purity == 1  # majority vote is not accuracy


def test_kmeans_finds_digits_and_the_same_again() -> None:
    x, y = load_digits(return_X_y=True)
    x, y = x[:600].astype(np.float32), y[:600]
    found = kmeans_clusters(x, 10, seed=0, n_init=3)
    scores = cluster_scores(y, found)
    assert scores.nmi > 0.65
    assert scores.accuracy > 0.65
    assert (kmeans_clusters(x, 10, seed=0, n_init=3) == found).all()
    # Lloyd's fixed point: each vector is with the nearest mean.
    means = np.stack([x[found == k].mean(axis=0) for k in range(10)])
    nearest = ((x[:, None] - means) ** 2).sum(axis=2).argmin(axis=1)
    assert (nearest == found).mean() > 0.995


def test_kmeans_needs_little_more_than_two_copies_of_the_vectors() -> None:
    x = np.random.default_rng(0).normal(size=(100_000, 64)).astype(np.float32)
    kmeans_clusters(x[:100], 4, seed=0, n_init=1)  # what is imported is not counted
    _, peak = traced_peak(lambda: kmeans_clusters(x, 4, seed=0, n_init=1, max_iter=2))
    assert peak < 2.5 * x.nbytes


def test_constant_and_repeated_vectors_make_no_clusters_of_noise() -> None:
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], 20)
    noise = (np.ones((40, 4)) + 1e-8 * (rng.normal(size=(40, 4)) + y[:, None])).astype(np.float64)
    assert kmeans_clusters(noise, 2, seed=0).tolist() == [0] * 40
    assert cluster_scores(y, kmeans_clusters(noise, 2, seed=0)).ami == pytest.approx(0, abs=1e-9)
    assert kmeans_clusters(np.zeros((3, 2)), 3, seed=0).tolist() == [0, 0, 0]
    repeated = np.repeat(np.eye(2), 5, axis=0)
    assert len(set(kmeans_clusters(repeated, 4, seed=0).tolist())) == 2
    repeated[1, 1] = -0.0
    assert [_distinct(repeated, most) for most in (1, 2, 4)] == [1, 2, 2]


@pytest.mark.parametrize(
    ("labels", "clusters", "options", "message"),
    [
        ([], [], {}, "labels: there are no items"),
        ([7, 7, 7], [0, 1, 2], {}, "labels: all 3 items are of class 7"),
        ([0, 1], [0], {}, "clusters: expected 2 entries"),
        ([0.5, np.nan], [0, 1], {}, "labels: expected integers"),
        ([0, 1], [0, 1], {"version": 3}, "no version 3"),
        ([0, 1], [0, 1], {"known": [0, 1]}, "no item is of a new class; known are 0, 1"),
        ([0, 1], [0, 1], {"known": [5]}, "no item is of a known class; known are 5"),
        ([0, 1], [0, 1], {"known": []}, "known are none"),
    ],
)
def test_refuses_what_has_no_accuracy(labels: list, clusters: list, options: dict, message: str) -> None:
    with pytest.raises(MetricError, match=message):
        cluster_accuracy(np.array(labels), np.array(clusters), **options)


def test_kmeans_refuses_bad_vectors_and_numbers() -> None:
    x = np.ones((4, 2))
    x[2, 1] = np.nan
    with pytest.raises(MetricError, match="1 of 4 vectors hold NaN or infinity, the first in row 2"):
        kmeans_clusters(x, 2, seed=0)
    with pytest.raises(MetricError, match="no 5 clusters of 4 vectors"):
        kmeans_clusters(np.ones((4, 2)), 5, seed=0)
    with pytest.raises(MetricError, match="0 starts"):
        kmeans_clusters(np.ones((4, 2)), 2, seed=0, n_init=0)
