"""The nearest neighbours against scikit-learn; oneself is left out by row, and duplicates lie at 0."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.neighbors import NearestNeighbors

from rayemb.evaluate.diagnostics.neighbours import nearest
from rayemb.evaluate.metrics import MetricError


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(3, 40),
    dim=st.integers(1, 5),
    block=st.integers(1, 50),
    shift=st.sampled_from([0.0, 1e4]),
    seed=st.integers(0, 99),
)
def test_distances_are_those_of_scikit_learn(rows: int, dim: int, block: int, shift: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, dim)) + shift
    x[rng.integers(rows)] = x[0]
    k = int(rng.integers(1, rows))
    at, distances = nearest(x, k, block=block)
    # Its brute force takes distances from products, so that duplicates lie apart; a tree does not.
    expected = NearestNeighbors(algorithm="kd_tree").fit(x).kneighbors(n_neighbors=k)[0]
    np.testing.assert_allclose(distances, expected, atol=1e-9)
    np.testing.assert_array_equal(distances, np.linalg.norm(x[:, None] - x[at], axis=2))
    assert (at != np.arange(rows)[:, None]).all()
    assert all(len(set(row)) == k for row in at.tolist())


def test_another_set_leaves_nobody_out() -> None:
    x = np.random.default_rng(0).normal(size=(9, 3))
    at, distances = nearest(x, 1, among=x)
    assert at[:, 0].tolist() == list(range(9))
    assert (distances == 0).all()


def test_who_has_no_such_neighbours_is_told() -> None:
    x = np.eye(3)
    with pytest.raises(MetricError, match="k: 3 neighbours are wanted of 2 others"):
        nearest(x, 3)
    with pytest.raises(MetricError, match="among: vectors have 3 dimensions, these 2"):
        nearest(x, 1, among=np.eye(2))
