"""The tree against SciPy's single linkage; on digits the figures follow the silhouette, their plateau the accuracy."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.cluster.hierarchy import linkage
from scipy.stats import spearmanr
from sklearn.metrics import silhouette_score

from rayemb.evaluate.diagnostics import persistence, plateau, separability
from rayemb.evaluate.metrics import MetricError, knn_hits


@given(rows=st.integers(2, 40), dim=st.integers(1, 5), seed=st.integers(0, 999), grid=st.booleans())
def test_the_edges_are_the_merge_heights_of_single_linkage(rows: int, dim: int, seed: int, grid: bool) -> None:
    rng = np.random.default_rng(seed)
    # On a grid all is ties and duplicates.
    x = rng.integers(0, 3, (rows, dim)).astype(float) if grid else rng.normal(size=(rows, dim)) + 100
    np.testing.assert_allclose(persistence(x), np.sort(linkage(x, "single")[:, 2]), atol=1e-9)


def test_two_tight_clusters_have_one_long_edge() -> None:
    rng = np.random.default_rng(0)
    x = 0.01 * rng.normal(size=(60, 4))
    x[30:] += [10, 0, 0, 0]
    edges = persistence(x)
    assert edges[-1] == pytest.approx(10, abs=0.1)
    assert edges[-2] < 0.1
    two = separability(x, unit=False, clusters=2, trim=0)
    assert two.tail == pytest.approx(edges[-1] / edges.sum(), rel=1e-12)
    assert two.concentration > 5 * separability(x[:30], unit=False, trim=0).concentration


def test_the_figures_are_those_of_their_definition() -> None:
    x = np.random.default_rng(1).normal(size=(50, 3))
    p = np.sort(linkage(x / np.linalg.norm(x, axis=1, keepdims=True), "single")[:, 2])
    found = separability(x, trim=0.1)
    np.testing.assert_allclose(found.edges, p, atol=1e-12)
    p = p[:-4]
    q = p / p.sum()
    assert found.concentration == pytest.approx(1 + (q * np.log(q)).sum() / np.log(45), rel=1e-9)
    assert found.mean == pytest.approx((p / p.max()).mean(), rel=1e-9)
    assert found.spread == pytest.approx((p / p.max()).std(), rel=1e-9)
    assert found.tail == pytest.approx(p[p > p.mean() + 2 * p.std()].sum() / p.sum(), rel=1e-9)


def test_it_does_not_see_scale_rotation_or_order_and_samples_by_seed() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(80, 4))
    rotation = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    for other in (1e3 * x, x @ rotation, x[rng.permutation(80)], x * rng.uniform(1, 9, (80, 1))):
        assert separability(other)[:4] == pytest.approx(separability(x)[:4], rel=1e-9)
    few = [separability(x, samples=40, seed=seed)[:4] for seed in (3, 3, 4)]
    assert few[0] == few[1] != few[2]
    assert len(separability(x, samples=40).edges) == 39


def test_on_digits_it_follows_the_labels_and_its_plateau_is_a_good_checkpoint(checkpoints: Callable) -> None:
    for seed in range(3):
        run = checkpoints(seed)
        figures = [separability(c.test, samples=600) for c in run]
        silhouettes = [silhouette_score(c.test, c.test_labels, metric="cosine") for c in run]
        for name, least in (("concentration", 0.95), ("tail", 0.85), ("mean", -0.8)):
            follows = spearmanr([getattr(f, name) for f in figures], silhouettes)[0]
            assert follows / least >= 1, (seed, name, follows)
        accuracy = [knn_hits(c.test, c.train, c.test_labels, c.train_labels).mean() for c in run]
        at = plateau([f.concentration for f in figures], tolerance=0.1)
        assert at is not None
        assert accuracy[at] > max(accuracy) - 0.01
        assert accuracy[0] < max(accuracy) - 0.03  # there was something to stop at


def test_a_plateau_is_the_first_window_of_small_steps() -> None:
    assert plateau([1, 2, 2.01, 2.02, 2.03, 9]) == 4
    assert plateau([1, 2, 2.01, 2.02, 3, 3, 3, 3]) == 7
    assert plateau([1, 2, 4, 8]) is None
    assert plateau([]) is None
    assert plateau([0, 0], window=1) == 1
    with pytest.raises(MetricError, match=r"scores\[1\]: is not finite"):
        plateau([1, np.nan])
    with pytest.raises(MetricError, match="no plateau with window 0"):
        plateau([1], window=0)


def test_what_has_no_tree_is_refused() -> None:
    with pytest.raises(MetricError, match="all vectors are one"):
        separability(np.ones((9, 2)))
    with pytest.raises(MetricError, match="three vectors, got 2"):
        separability(np.eye(2))
    with pytest.raises(MetricError, match=r"clusters: expected 2 .. 4, got 1"):
        separability(np.eye(5), clusters=1)
    with pytest.raises(MetricError, match="1 of 4 vectors hold NaN"):
        separability(np.where(np.eye(4) * np.arange(4) == 2, np.nan, 1.0))
    with pytest.raises(MetricError, match="trim: expected a share"):
        separability(np.eye(5), trim=1)
