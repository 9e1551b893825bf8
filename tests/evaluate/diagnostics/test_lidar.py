"""LiDAR against SciPy's generalised eigenvalues; directions of noise do not count, as they do for RankMe."""

import numpy as np
import pytest
import scipy.linalg
from numpy.typing import NDArray

from rayemb.evaluate.diagnostics import lidar, rankme
from rayemb.evaluate.metrics import MetricError

Array = NDArray[np.float64]


def views(seed: int, signal: int = 8, noise: int = 0, items: int = 300, each: int = 20) -> Array:
    """Items that differ in `signal` directions, with a little noise, and `noise` directions of nothing else."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(items, 1, signal)) + 0.2 * rng.normal(size=(items, each, signal))
    return np.concatenate([x, rng.normal(size=(items, each, noise))], axis=2)


@pytest.mark.parametrize("items", [300, 6])
def test_it_is_the_entropy_of_the_generalised_eigenvalues(items: int) -> None:
    x = views(0, 5, 4, items)
    means = x.mean(axis=1)
    between = np.cov(means.T, ddof=0)
    within = sum(np.cov(item.T, ddof=0) for item in x) / items
    within += 1e-4 * np.trace(within) / 9 * np.eye(9)
    values = scipy.linalg.eigh(between, within, eigvals_only=True).clip(min=0)[::-1][: min(9, items - 1)]
    p = values / values.sum() + 1e-7
    assert lidar(x, block=7) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-9)


def test_by_hand() -> None:
    # Two directions, items at ±1 in each, views at ±1 around them: both eigenvalues are alike.
    items = np.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    steps = np.array([[0.1, 0.1], [0.1, -0.1], [-0.1, 0.1], [-0.1, -0.1]])
    x = items[:, None] + steps
    assert lidar(x, eps=0) == pytest.approx(2, abs=1e-12)
    # Shares 9/10 and 1/10: the second direction is three times less of the noise.
    assert lidar(x * [1, 1] + [0, 0] + (items * [2, 0])[:, None], eps=0, ridge=0) == pytest.approx(
        np.exp(-(0.9 * np.log(0.9) + 0.1 * np.log(0.1))), abs=1e-12
    )


def test_it_does_not_see_order_shift_scale_or_rotation_nor_stretching_but_for_the_ridge() -> None:
    x = views(1, 4, 3)
    rng = np.random.default_rng(1)
    rotation = np.linalg.qr(rng.normal(size=(7, 7)))[0]
    for other in (x[rng.permutation(300)], x[:, rng.permutation(20)], x + 5, 1e-4 * x, x @ rotation):
        assert lidar(other) == pytest.approx(lidar(x), rel=1e-8)
    assert lidar(x * np.arange(1, 8), ridge=0) == pytest.approx(lidar(x, ridge=0), rel=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_noise_raises_rankme_but_not_lidar(seed: int) -> None:
    clean, noisy = views(seed), views(seed, noise=24)
    assert rankme(noisy[:, 0]) > 3 * rankme(clean[:, 0])
    assert lidar(noisy) == pytest.approx(lidar(clean), rel=0.05)
    assert lidar(views(seed, signal=16)) > 1.9 * lidar(clean)


def test_what_has_no_figure_is_refused() -> None:
    x = views(2)
    with pytest.raises(MetricError, match="the views of each item are one vector"):
        lidar(np.repeat(x[:, :1], 3, axis=1))
    with pytest.raises(MetricError, match="all items have one mean"):
        lidar(np.repeat(x[:1], 5, axis=0))
    for shape in ((1, 5, 3), (5, 1, 3), (5, 5, 0)):
        with pytest.raises(MetricError, match="two items of two views"):
            lidar(np.ones(shape))
    with pytest.raises(MetricError, match=r"expected floats \(N, V, D\), got float64 \(3, 3\)"):
        lidar(np.eye(3))
    x[17, 3, 2] = np.inf
    with pytest.raises(MetricError, match="views, item 17: holds NaN"):
        lidar(x, block=5)
