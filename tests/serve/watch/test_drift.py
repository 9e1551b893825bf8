"""Drift: nothing where nothing moved, the closed form where something did."""

import numpy as np
import pytest

from rayemb.serve.watch.drift import Reference


def unit(x: np.ndarray) -> np.ndarray:
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float32)


def test_the_same_distribution_has_not_moved() -> None:
    rng = np.random.default_rng(0)
    x = unit(rng.normal(size=(3000, 24)) + 1)
    drift = Reference.of(x[:2000]).drift(x[2000:])
    expected = 1 / 2000 + 1 / 1000
    # Of N - 1 dimensions' worth of squared normals: five standard deviations.
    assert drift.shift < expected * 3
    assert drift.stability < 9 * expected * 3


def test_a_shift_is_the_closed_form() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(4000, 8)).astype(np.float32)
    moved = x + np.float32(0.5)
    drift = Reference.of(x).drift(moved)
    # The mean moved by 0.5 in each of 8 coordinates; the variance is theirs together.
    assert drift.shift == pytest.approx(8 * 0.25 / x.var(axis=0).sum(), rel=1e-4)


def test_stability_is_the_naive_sum_and_sees_what_the_mean_does_not() -> None:
    from rayemb.serve.watch.drift import _directions

    rng = np.random.default_rng(2)
    then, now = rng.normal(size=(1000, 4)), 3 * rng.normal(size=(700, 4))
    drift = Reference.of(then.astype(np.float32)).drift(now.astype(np.float32))
    assert drift.shift < 0.05
    total = 0.0
    for direction in _directions(4):
        a, b = sorted(then.astype(np.float32) @ direction), now.astype(np.float32) @ direction
        edges = [np.quantile(a, i / 10) for i in range(1, 10)]
        for low, high in zip([-np.inf, *edges], [*edges, np.inf], strict=True):
            share = max(sum(low <= value < high for value in b) / len(b), 5e-4)
            total += (share - 0.1) * np.log(share / 0.1)
    assert drift.stability == pytest.approx(total / 16, rel=0.02)
    assert drift.stability > 0.25


def test_a_reference_survives_as_a_file() -> None:
    x = unit(np.random.default_rng(3).normal(size=(200, 6)))
    first = Reference.of(x)
    again = Reference.from_bytes(first.to_bytes())
    assert again.drift(x) == first.drift(x)
    with pytest.raises((ValueError, OSError)):
        Reference.from_bytes(b"no file")
