"""The Schur complement against least squares and closed forms; a prompt's content is taken out of digits."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from rayemb.evaluate.diagnostics.schur import (
    Decomposition,
    Moments,
    decompose,
    entropies,
    fourier_features,
    frequencies,
    moments,
    residual_map,
    residualize,
    schur_entropy,
)
from rayemb.evaluate.metrics import MetricError

Array = NDArray[np.float64]


def unit(x: Array) -> Array:
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def pair(seed: int, rows: int = 200) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 4))
    return unit(x), unit(x @ rng.normal(size=(4, 7)) + rng.normal(size=(rows, 7)))


def test_the_parts_are_those_of_least_squares() -> None:
    x, y = pair(0)
    fitted = x @ np.linalg.lstsq(x, y, rcond=None)[0]
    parts = decompose(moments(x, y))
    np.testing.assert_allclose(parts.explained, fitted.T @ fitted / 200, atol=1e-12)
    np.testing.assert_allclose(parts.residual, (y - fitted).T @ (y - fitted) / 200, atol=1e-12)
    for part in parts:
        assert np.linalg.eigvalsh(part).min() > -1e-12
    assert np.trace(parts.explained) + np.trace(parts.residual) == pytest.approx(1, abs=1e-12)
    assert schur_entropy(y, x).share == pytest.approx(np.trace(parts.explained), rel=1e-8)


def test_shards_add_up() -> None:
    x, y = pair(1)
    whole = Moments(*map(sum, zip(*(moments(x[a:b], y[a:b]) for a, b in ((0, 60), (60, 60), (60, 200))), strict=True)))
    assert whole.rows == 200
    assert entropies(decompose(whole)) == pytest.approx(schur_entropy(y, x), rel=1e-9)


def test_what_is_explained_wholly_or_not_at_all() -> None:
    rng = np.random.default_rng(2)
    x = unit(rng.normal(size=(500, 6)))
    all_of = decompose(moments(x, x @ rng.normal(size=(6, 6))))
    assert abs(np.trace(all_of.residual)) < 1e-8
    rotated = schur_entropy(x @ np.linalg.qr(rng.normal(size=(6, 6)))[0], x)
    assert rotated.residual == 1
    assert rotated.share == pytest.approx(1, abs=1e-9)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        a, b = (unit(rng.normal(size=(4000, 16))) for _ in range(2))
        parts = decompose(moments(a, b))
        assert np.trace(parts.explained) == pytest.approx(16 / 4000, rel=0.3)
        np.testing.assert_allclose(parts.residual, b.T @ b / 4000, atol=2e-3)


def test_the_entropy_is_normalised_within_the_logarithm_alone() -> None:
    half, tiny = np.diag([0.25, 0.25, -1e-15, 1e-12]), np.diag([0.5, 0, 0, 0])
    found = entropies(Decomposition(explained=tiny, residual=half))
    assert found.residual == pytest.approx(math.exp(0.5 * math.log(2)), rel=1e-12)
    assert found.explained == pytest.approx(1)
    assert found.share == pytest.approx(0.5)
    # Eight equal directions of trace 1: a diversity of 8.
    x = np.repeat(np.eye(8), 5, axis=0)
    assert schur_entropy(x, np.ones((40, 1))).residual < 8
    assert entropies(Decomposition(np.zeros((8, 8)), np.eye(8) / 8)).residual == pytest.approx(8)


def test_few_distinct_prompts_and_duplicated_columns_are_no_trouble() -> None:
    rng = np.random.default_rng(3)
    prompts = unit(rng.normal(size=(3, 20)))[rng.integers(0, 3, 300)]
    y = unit(rng.normal(size=(300, 5)))
    once = schur_entropy(y, prompts)
    assert once.share < 0.05
    assert schur_entropy(y, np.concatenate([prompts, prompts], axis=1)) == pytest.approx(once, rel=1e-9)


def test_the_rest_has_no_moment_with_the_prompt() -> None:
    x, y = pair(4)
    rest = residualize(y, x)
    assert abs(x.T @ rest / 200).max() < 1e-12
    fitted = residual_map(moments(x[:120], y[:120]))
    np.testing.assert_allclose(fitted, np.linalg.lstsq(x[:120], y[:120], rcond=None)[0], atol=1e-10)
    np.testing.assert_allclose(residualize(y[120:], x[120:], fitted), y[120:] - x[120:] @ fitted)
    ridged = np.linalg.solve(x.T @ x / 200 + 0.1 * np.eye(4), x.T @ y / 200)
    np.testing.assert_allclose(residual_map(moments(x, y), ridge=0.1), ridged, atol=1e-10)


def test_fourier_features_are_those_of_the_gaussian_kernel() -> None:
    x = np.random.default_rng(5).normal(size=(30, 4))
    features = fourier_features(x, frequencies(4, seed=0, sigma=1.5, count=20_000))
    squares = ((x[:, None] - x) ** 2).sum(2)
    np.testing.assert_allclose(features @ features.T, np.exp(-squares / (2 * 1.5**2)), atol=0.03)
    np.testing.assert_allclose((features**2).sum(1), 1, atol=1e-12)
    np.testing.assert_array_equal(frequencies(4, seed=1, count=9), frequencies(4, seed=1, count=9))


@pytest.mark.parametrize("seed", range(3))
def test_parity_is_taken_out_of_digits_and_the_digits_stay(digits, seed: int) -> None:
    rng = np.random.default_rng(seed)
    y, labels = unit(digits.pixels - digits.pixels.mean(0)), digits.labels
    prompts = unit(rng.normal(size=(2, 16)))[labels % 2] + 0.05 * rng.normal(size=(len(y), 16))
    order = rng.permutation(len(y))
    fit, rest = order[: len(y) * 6 // 10], order[len(y) * 6 // 10 :]
    gamma = residual_map(moments(prompts[fit], y[fit]))
    before, after = y[rest], residualize(y[rest], prompts[rest], gamma)
    half = len(rest) // 2

    def probe(x: Array, of: NDArray[np.int64]) -> float:
        probe = LogisticRegression(C=10, max_iter=1000).fit(x[:half], of[rest][:half])
        return float(probe.score(x[half:], of[rest][half:]))

    parity = labels[rest][half:] % 2
    majority = max(parity.mean(), 1 - parity.mean())
    assert probe(before, labels % 2) > 0.85
    assert probe(after, labels % 2) < majority + 0.05
    assert probe(after, labels) > probe(before, labels) - 0.03
    found = schur_entropy(y, prompts)
    assert 0.05 < found.share < 0.1
    assert found.residual > 10 * found.explained


def test_what_are_no_pairs_is_refused() -> None:
    x, y = pair(6)
    with pytest.raises(MetricError, match="got 199 conditions of 200 vectors"):
        schur_entropy(y, x[1:])
    with pytest.raises(MetricError, match="there are no pairs"):
        decompose(moments(x[:0], y[:0]))
    with pytest.raises(MetricError, match="conditions: 1 of 200 vectors hold NaN"):
        moments(np.where(np.arange(200)[:, None] == 3, np.nan, x), y)
    with pytest.raises(MetricError, match="gamma: no map"):
        residualize(y, x, np.zeros((7, 4)))
    with pytest.raises(MetricError, match="ridge: a ridge is not negative"):
        residual_map(moments(x, y), ridge=-1)
    with pytest.raises(MetricError, match="all vectors are zero"):
        entropies(decompose(moments(x, 0 * y)))
    with pytest.raises(MetricError, match="sigma: a width is positive"):
        frequencies(3, seed=0, sigma=0)
