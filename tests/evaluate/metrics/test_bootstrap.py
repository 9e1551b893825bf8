"""Bootstrap intervals: against a naive loop, the normal theory, and their own promise of coverage."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayemb.evaluate.metrics import MetricError, bootstrap_interval, paired_bootstrap


def families(seed: int, clusters: int, size: int, shared: float) -> tuple[np.ndarray, np.ndarray]:
    """Values with true mean 0 and variance 1, of which `shared` is common to a cluster."""
    rng = np.random.default_rng(seed)
    common = rng.normal(scale=np.sqrt(shared), size=(clusters, 1))
    own = rng.normal(scale=np.sqrt(1 - shared), size=(clusters, size))
    return (common + own).ravel(), np.repeat(np.arange(clusters), size)


def test_equals_the_naive_loop_on_the_same_draws() -> None:
    rng = np.random.default_rng(0)
    clusters = rng.integers(0, 9, 60) * 7 - 3  # any integers, of any size
    values = rng.normal(size=60)
    got = bootstrap_interval(values, clusters, seed=5, samples=300, confidence=0.9)

    members = [values[clusters == c] for c in sorted(set(clusters.tolist()))]
    draws = np.random.default_rng(5).integers(0, len(members), size=(300, len(members)))
    means = [np.concatenate([members[j] for j in row]).mean() for row in draws]
    assert got.mean == pytest.approx(values.mean())
    assert (got.low, got.high) == pytest.approx((np.percentile(means, 5), np.percentile(means, 95)))


def test_agrees_with_normal_theory_for_independent_values() -> None:
    values = np.random.default_rng(1).normal(3.0, 2.0, 2000)
    mean, low, high = bootstrap_interval(values, seed=0)
    half = 1.96 * values.std(ddof=1) / np.sqrt(2000)
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((mean - half, mean + half), abs=0.1 * half)


def test_covers_the_truth_as_often_as_it_says_and_single_queries_do_not() -> None:
    """Half of the variance is the cluster's: intervals over clusters hold, over queries they lie."""
    covered = {"clusters": 0, "queries": 0}
    trials = 300
    for seed in range(trials):
        values, clusters = families(seed, clusters=40, size=10, shared=0.5)
        for name, families_ in (("clusters", clusters), ("queries", None)):
            _, low, high = bootstrap_interval(values, families_, seed=seed, samples=400)
            covered[name] += low <= 0 <= high
    assert 0.90 <= covered["clusters"] / trials <= 0.98
    assert covered["queries"] / trials < 0.75


def test_pairing_cancels_what_makes_a_query_hard() -> None:
    rng = np.random.default_rng(2)
    hard, clusters = families(3, clusters=50, size=4, shared=0.8)
    a, b = hard + 0.05 + rng.normal(scale=0.05, size=200), hard + rng.normal(scale=0.05, size=200)
    mean, low, high = paired_bootstrap(a, b, clusters, seed=0)
    assert mean == pytest.approx((a - b).mean())
    assert 0 < low < 0.05 < high
    assert (mean, low, high) == bootstrap_interval(a - b, clusters, seed=0)
    one, other = bootstrap_interval(a, clusters, seed=0), bootstrap_interval(b, clusters, seed=0)
    assert one.low < other.high  # apart, the two intervals overlap


def test_paired_of_a_system_with_itself_is_zero() -> None:
    values, clusters = families(0, 10, 3, 0.5)
    assert paired_bootstrap(values, values, clusters, seed=0) == (0.0, 0.0, 0.0)


def test_the_same_seed_gives_the_same_interval() -> None:
    values, clusters = families(0, 30, 3, 0.5)
    first = bootstrap_interval(values, clusters, seed=1)
    assert bootstrap_interval(values, clusters, seed=1) == first
    assert bootstrap_interval(values, clusters, seed=2) != first


def test_singleton_clusters_equal_no_clusters() -> None:
    values = np.random.default_rng(0).normal(size=50)
    assert bootstrap_interval(values, np.arange(50), seed=3) == pytest.approx(bootstrap_interval(values, seed=3))


def test_more_samples_than_one_chunk_holds() -> None:
    values = np.random.default_rng(0).normal(size=30_000)  # 33 samples a chunk
    mean, low, high = bootstrap_interval(values, seed=0, samples=100)
    assert low < mean < high
    assert high - low == pytest.approx(2 * 1.96 / np.sqrt(30_000), rel=0.3)


@settings(max_examples=40, deadline=None)
@given(
    values=st.lists(st.floats(-1e3, 1e3, allow_subnormal=False), min_size=2, max_size=40),
    seed=st.integers(0, 2**32),
    shift=st.integers(-1000, 1000),
)
def test_shifts_with_the_values_and_stays_within_them(values: list[float], seed: int, shift: int) -> None:
    array = np.array(values)
    mean, low, high = bootstrap_interval(array, seed=seed, samples=50)
    assert array.min() - 1e-9 <= low <= high <= array.max() + 1e-9
    moved = bootstrap_interval(array + shift, seed=seed, samples=50)
    assert moved == pytest.approx((mean + shift, low + shift, high + shift), abs=1e-6)


@pytest.mark.parametrize(
    ("values", "clusters", "options", "message"),
    [
        ([], None, {}, "Q > 0"),
        ([[1.0]], None, {}, "expected floats"),
        ([1.0, np.nan], None, {}, "1 values are NaN"),
        ([1.0, 2.0], [1], {}, "expected"),
        ([1.0, 2.0], [1, 1], {}, "one cluster"),
        ([1.0, 2.0], None, {"confidence": 1.0}, "confidence"),
        ([1.0, 2.0], None, {"samples": 0}, "samples"),
    ],
)
def test_refuses_what_has_no_interval(values: list, clusters: list | None, options: dict, message: str) -> None:
    families_ = None if clusters is None else np.array(clusters)
    with pytest.raises(MetricError, match=message):
        bootstrap_interval(np.array(values), families_, seed=0, **options)


def test_refuses_to_pair_different_queries() -> None:
    with pytest.raises(MetricError, match="different queries"):
        paired_bootstrap(np.zeros(3), np.zeros(4), seed=0)
