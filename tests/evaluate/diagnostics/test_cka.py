"""Linear CKA against its definition with N × N matrices, on shapes either side of N = D, and on real digits."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from rayemb.evaluate.diagnostics.cka import linear_cka
from rayemb.evaluate.metrics import MetricError

Array = NDArray[np.float64]


def by_definition(x: Array, y: Array) -> tuple[float, float]:
    """Biased and unbiased, from the kernels: Kornblith et al. and equation 5 of Song et al., as written."""
    n = len(x)
    one, h = np.ones(n), np.eye(n) - 1 / n

    def biased(k: Array, m: Array) -> float:
        return float(np.trace(k @ h @ m @ h) / (n - 1) ** 2)

    def unbiased(k: Array, m: Array) -> float:
        k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
        total = np.trace(k @ m) + one @ k @ one * (one @ m @ one) / ((n - 1) * (n - 2))
        return float((total - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3)))

    k, m = x @ x.T, y @ y.T
    return tuple(hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m)) for hsic in (biased, unbiased))  # type: ignore[return-value]


@pytest.mark.parametrize(("n", "d", "e"), [(4, 2, 3), (30, 5, 8), (30, 5, 400), (12, 40, 40), (60, 1, 1)])
def test_it_is_the_definition_whatever_the_shape(n: int, d: int, e: int) -> None:
    rng = np.random.default_rng(n + d)
    x, y = rng.normal(size=(n, d)) + 3, rng.normal(size=(n, e)) * 7 - 2
    biased, unbiased = by_definition(x, y)
    assert linear_cka(x, y, unbiased=False) == pytest.approx(biased, abs=1e-9)
    assert linear_cka(x, y) == pytest.approx(unbiased, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(4, 40), st.integers(1, 12), st.integers(1, 12))
def test_it_is_symmetric_bounded_and_blind_to_rotation_scale_and_shift(seed: int, n: int, d: int, e: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, d)), rng.normal(size=(n, e))
    rotation = np.linalg.qr(rng.normal(size=(d, d)))[0]
    for unbiased in (True, False):
        value = linear_cka(x, y, unbiased=unbiased)
        assert -1 - 1e-9 <= value <= 1 + 1e-9
        assert unbiased or value >= -1e-12
        assert linear_cka(y, x, unbiased=unbiased) == pytest.approx(value, abs=1e-9)
        assert linear_cka(1e6 * x @ rotation + 5e6, y, unbiased=unbiased) == pytest.approx(value, abs=1e-6)
        assert linear_cka(x, 3 * x @ rotation - 1, unbiased=unbiased) == pytest.approx(1, abs=1e-9)


def test_an_invertible_map_that_is_no_rotation_changes_it() -> None:
    x = np.random.default_rng(0).normal(size=(200, 4))
    assert linear_cka(x, x * [1, 1, 1, 20]) < 0.7


def test_noise_has_none_only_in_the_unbiased_form() -> None:
    values: dict[bool, list[float]] = {True: [], False: []}
    for seed, unbiased in itertools.product(range(20), (True, False)):
        rng = np.random.default_rng(seed)
        values[unbiased].append(linear_cka(rng.normal(size=(100, 100)), rng.normal(size=(100, 100)), unbiased=unbiased))
    assert np.mean(values[True]) == pytest.approx(0, abs=0.01)
    assert np.mean(values[False]) == pytest.approx(0.5, abs=0.02)  # of nothing


def test_on_digits_a_projection_keeps_what_shuffled_rows_lose() -> None:
    x = load_digits().data[:600]
    near = PCA(16, random_state=0).fit_transform(x)
    for seed in range(3):
        shuffled = x[np.random.default_rng(seed).permutation(len(x))]
        assert linear_cka(x, near) > 0.95
        assert abs(linear_cka(x, shuffled)) < 0.05


def test_extremes_of_float32_neither_overflow_nor_vanish() -> None:
    x = np.random.default_rng(1).normal(size=(50, 6)).astype(np.float32)
    for scale in (1e30, 1e-30):
        assert linear_cka(x * np.float32(scale), x) == pytest.approx(1, abs=1e-6)


def test_bad_tables_are_named() -> None:
    x = np.random.default_rng(2).normal(size=(9, 3))
    with pytest.raises(MetricError, match="vectors have 9 rows, other 8"):
        linear_cka(x, x[:8])
    broken = x.copy()
    broken[6, 1] = np.nan
    with pytest.raises(MetricError, match="other: row 6 holds NaN"):
        linear_cka(x, broken)
    with pytest.raises(MetricError, match="vectors: all 9 vectors are one and the same"):
        linear_cka(np.full((9, 3), 0.1), x)
    with pytest.raises(MetricError, match="needs 4 vectors"):
        linear_cka(x[:3], x[:3])
    with pytest.raises(MetricError, match="expected floats"):
        linear_cka(np.arange(12).reshape(4, 3), x[:4])  # type: ignore[arg-type]
