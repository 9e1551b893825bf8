"""SVCCA against scipy's principal angles and the generalised eigenproblem, and on real digits."""

import numpy as np
import pytest
from scipy.linalg import eigh, subspace_angles
from sklearn.datasets import load_digits

from rayemb.evaluate.diagnostics.svcca import svcca
from rayemb.evaluate.metrics import MetricError


def test_it_is_the_cosines_of_the_principal_angles() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(80, 6))
    y = np.concatenate([x[:, :3] + rng.normal(size=(80, 3)), rng.normal(size=(80, 2))], axis=1)
    found = svcca(x, y, variance=1.0)
    angles = subspace_angles(x - x.mean(0), y - y.mean(0))
    np.testing.assert_allclose(found.correlations, np.sort(np.cos(angles))[::-1], atol=1e-9)
    assert (found.kept, found.kept_other) == (6, 5)
    assert found.mean == pytest.approx(np.cos(angles).mean(), abs=1e-9)


def test_it_is_the_textbook_eigenproblem() -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(60, 4)) * [9, 1, 1, 1], rng.normal(size=(60, 3))
    y[:, 0] += x[:, 1]
    a, b = x - x.mean(0), y - y.mean(0)
    squares = eigh(a.T @ b @ np.linalg.solve(b.T @ b, b.T @ a), a.T @ a, eigvals_only=True)
    expected = np.sqrt(np.sort(squares)[::-1][:3])
    np.testing.assert_allclose(svcca(x, y, variance=1.0).correlations, expected, atol=1e-9)


def test_any_invertible_map_of_what_is_kept_is_seen_through() -> None:
    rng = np.random.default_rng(2)
    x = rng.normal(size=(200, 5))
    skew = rng.normal(size=(5, 5)) + 3 * np.eye(5)
    assert svcca(x, x @ skew - 4, variance=1.0).mean == pytest.approx(1, abs=1e-9)


def test_it_keeps_the_fewest_directions_that_hold_the_variance() -> None:
    rng = np.random.default_rng(3)
    x = np.linalg.qr(rng.normal(size=(300, 4)) - 0)[0]
    x -= x.mean(0)
    x = np.linalg.qr(x)[0] * np.sqrt([90, 8, 1.5, 0.5])  # shares of variance, in per cent
    for variance, kept in ((0.9, 1), (0.95, 2), (0.99, 3), (0.999, 4), (1.0, 4)):
        assert svcca(x, x, variance=variance).kept == kept
    assert svcca(x, x, variance=1.0, most=2).kept == 2


def test_copied_columns_are_one_direction() -> None:
    x = np.random.default_rng(4).normal(size=(50, 3))
    assert svcca(np.concatenate([x, x], axis=1), x, variance=1.0).kept == 3


def test_noise_stays_at_chance_and_too_few_items_are_refused() -> None:
    for seed in range(3):
        rng = np.random.default_rng(seed)
        found = svcca(rng.normal(size=(1000, 40)), rng.normal(size=(1000, 60)), variance=1.0)
        rms = float(np.sqrt((found.correlations**2).mean()))
        assert rms == pytest.approx(found.chance, rel=0.1)
        assert found.mean < found.chance
    with pytest.raises(MetricError, match=r"60 items cannot tell 40 directions from 40.*more than 80"):
        svcca(rng.normal(size=(60, 40)), rng.normal(size=(60, 40)), variance=1.0)


def test_on_digits_a_rotation_keeps_all_and_a_shuffle_nothing() -> None:
    x = load_digits().data
    for seed in range(3):
        rng = np.random.default_rng(seed)
        rotation = np.linalg.qr(rng.normal(size=(64, 64)))[0]
        assert svcca(x, x @ rotation).mean == pytest.approx(1, abs=1e-8)
        other = svcca(x, x[rng.permutation(len(x))])
        assert other.mean < other.chance


def test_bad_tables_and_settings_are_named() -> None:
    x = np.random.default_rng(5).normal(size=(30, 3))
    with pytest.raises(MetricError, match="variance"):
        svcca(x, x, variance=0)
    with pytest.raises(MetricError, match="most"):
        svcca(x, x, most=0)
    with pytest.raises(MetricError, match="vectors have 30 rows, other 29"):
        svcca(x, x[1:])
    with pytest.raises(MetricError, match="other: all 30 vectors are one"):
        svcca(x, np.ones((30, 2)))
    x[3] = np.inf
    with pytest.raises(MetricError, match="vectors: row 3"):
        svcca(x, x)
