"""The distance to the nearest vector of training, against SciPy; it never rises as vectors are added."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from rayemb.evaluate.diagnostics import utilisation
from rayemb.evaluate.metrics import MetricError


@given(seed=st.integers(0, 999), block=st.integers(1, 40))
def test_it_is_that_of_scipy_and_never_rises_as_vectors_are_added(seed: int, block: int) -> None:
    rng = np.random.default_rng(seed)
    queries, train, more = (rng.normal(size=(rows, 4)) for rows in (17, 23, 9))
    nearest = cdist(queries, train).min(axis=1)
    found = utilisation(queries, train, block=block)
    assert found == pytest.approx((nearest.mean(), (nearest**2).mean(), nearest.max(), nearest.argmax()), rel=1e-9)
    wider = utilisation(queries, np.concatenate([train, more]), block=block)
    assert wider.distance <= found.distance
    assert wider.squared <= found.squared
    assert wider.farthest <= found.farthest


def test_what_was_trained_on_is_at_no_distance() -> None:
    x = np.random.default_rng(0).normal(size=(30, 5))
    assert utilisation(x[:7], x)[:3] == (0, 0, 0)


@pytest.mark.parametrize("seed", range(3))
def test_mixed_vectors_come_nearer_to_unseen_classes(digits, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = digits.pixels / np.linalg.norm(digits.pixels, axis=1, keepdims=True)
    train, unseen = x[digits.labels < 5], x[digits.labels >= 5]
    share = rng.beta(2, 2, size=(2 * len(train), 1))
    a, b = (train[rng.integers(len(train), size=len(share))] for _ in range(2))
    mixed = share * a + (1 - share) * b
    mixed /= np.linalg.norm(mixed, axis=1, keepdims=True)
    before, after = utilisation(unseen, train), utilisation(unseen, np.concatenate([train, mixed]))
    assert after.distance < 0.97 * before.distance
    assert utilisation(train, train).distance == 0


def test_without_either_side_there_is_no_figure() -> None:
    with pytest.raises(MetricError, match="queries: a mean needs 1 vectors"):
        utilisation(np.zeros((0, 3)), np.eye(3))
    with pytest.raises(MetricError, match="train: a nearest needs 1 vectors"):
        utilisation(np.eye(3), np.zeros((0, 3)))
    with pytest.raises(MetricError, match="train: 1 of 3 vectors hold NaN"):
        utilisation(np.eye(3), np.where(np.eye(3), 1.0, [0, 0, np.nan])[[0, 1, 2]][[2, 2, 0]][:, :3] * np.eye(3))
