"""Neighbours' votes against a naive loop and scikit-learn; ties against the model."""

import math

import numpy as np
import pytest
from sklearn.model_selection import LeaveOneOut, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier

from rayemb.evaluate.metrics import MetricError, knn_hits

Case = tuple[np.ndarray, np.ndarray]


def case(rows: int = 60, dim: int = 4, classes: int = 5) -> Case:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, classes, rows)
    x = rng.normal(size=(rows, dim)) + rng.normal(size=(classes, dim))[labels]
    return x / np.linalg.norm(x, axis=1, keepdims=True), labels


def test_the_nearest_class_wins_as_in_a_naive_loop() -> None:
    x, labels = case()
    for k, temperature in ((1, 0.07), (5, 0.07), (20, 0.5), (500, 0.1)):
        expected = []
        for i in range(len(x)):
            near = sorted((j for j in range(len(x)) if j != i), key=lambda j: -x[i] @ x[j])[:k]
            votes: dict[int, float] = {}
            for j in near:
                votes[labels[j]] = votes.get(labels[j], 0.0) + math.exp(x[i] @ x[j] / temperature)
            expected.append(max(votes, key=lambda label: votes[label]) == labels[i])
        found = knn_hits(x, x, labels, labels, exclude=np.arange(len(x)), k=k, temperature=temperature, block=7)
        assert found.tolist() == [float(hit) for hit in expected], k
        assert 0.3 < found.mean() < 1


def test_one_neighbour_is_that_of_scikit_learn() -> None:
    x, labels = case()
    found = cross_val_predict(KNeighborsClassifier(1), x, labels, cv=LeaveOneOut())
    hits = knn_hits(x, x, labels, labels, exclude=np.arange(len(x)), k=1)
    assert hits.mean() == pytest.approx((found == labels).mean())


def test_a_constant_encoder_is_never_right() -> None:
    x = np.tile([[1.0, 0.0]], (8, 1)) + np.random.default_rng(1).normal(size=(8, 2)) * 1e-8
    labels = np.array([0, 0, 0, 0, 0, 0, 1, 1])
    hits = knn_hits(x, x, labels, labels, exclude=np.arange(8), k=2)
    assert hits.tolist() == [0] * 8
    # With all neighbours the larger class has the more votes, and that is no tie.
    assert knn_hits(x, x, labels, labels, exclude=np.arange(8), k=8).tolist() == [1] * 6 + [0, 0]


def test_nobody_to_ask_is_refused() -> None:
    with pytest.raises(MetricError, match="no candidates"):
        knn_hits(np.ones((1, 2)), np.ones((1, 2)), np.zeros(1, int), np.zeros(1, int), exclude=np.zeros(1, int))
