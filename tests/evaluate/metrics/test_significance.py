"""Tests and intervals of differences: scipy and the closure principle as oracles, and their promises by simulation."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from rayemb.evaluate.metrics import (
    Comparison,
    MetricError,
    compare,
    holm,
    holm_corrected,
    minimum_detectable_difference,
    paired_bootstrap,
    sign_flip_test,
)

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("rows", [2, 5, 13])
@pytest.mark.parametrize("discrete", [False, True])
def test_all_sign_flips_are_scipys_permutation_test(rows: int, discrete: bool) -> None:
    d = RNG.integers(-1, 3, rows).astype(float) if discrete else RNG.normal(0.4, 1, rows)
    theirs = stats.permutation_test(
        (d,), lambda x, axis: x.mean(axis=axis), permutation_type="samples", vectorized=True, n_resamples=np.inf
    )
    assert sign_flip_test(d, np.zeros(rows), seed=0) == pytest.approx(theirs.pvalue, abs=1e-9)


def test_clusters_flip_together() -> None:
    d, clusters = RNG.normal(0.3, 1, 30), np.repeat([9, -4, 2, 7, 5], [2, 10, 3, 9, 6])
    sums = [d[clusters == c].sum() for c in set(clusters.tolist())]
    flips = [abs(np.dot(signs, sums)) for signs in itertools.product([1, -1], repeat=5)]
    expected = np.mean([flip >= abs(sum(sums)) - 1e-12 for flip in flips])
    assert sign_flip_test(d, np.zeros(30), clusters, seed=0) == pytest.approx(expected, abs=1e-9)


def test_random_flips_come_near_all_flips() -> None:
    for d in (RNG.normal(0.5, 1, 13), RNG.choice([-1, 0, 0, 1, 1], 13).astype(float), np.array([1.0] * 9 + [-1] * 4)):
        exact, drawn = (sign_flip_test(d, 0 * d, seed=0, samples=samples) for samples in (9_999, 8_000))
        assert drawn == pytest.approx(exact, abs=4 * np.sqrt(exact * (1 - exact) / 8_000) + 2e-4)
    assert sign_flip_test(d, 0 * d, seed=0, samples=500) == sign_flip_test(d, 0 * d, seed=0, samples=500)


def test_hits_make_mcnemars_test() -> None:
    """Differences of hits are -1, 0 and 1: the sign-flip test is then McNemar's, a binomial one."""
    a, b = np.array([1.0] * 400 + [0] * 60 + [1] * 90), np.array([1.0] * 400 + [1] * 60 + [0] * 90)
    exact = stats.binomtest(60, 150).pvalue
    assert sign_flip_test(a, b, seed=0, samples=100_000) == pytest.approx(exact, rel=0.1)


def test_no_difference_is_no_evidence_and_p_is_never_zero() -> None:
    same = RNG.random(50)
    assert sign_flip_test(same, same, seed=0) == 1
    assert sign_flip_test(same + 1, same, seed=0) == 1e-4
    assert sign_flip_test(np.ones(4), np.zeros(4), seed=0) == 2 / 16
    assert sign_flip_test(np.ones(4), np.zeros(4), np.array([0, 0, 1, 1]), seed=0) == 2 / 4


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_holm_is_the_closure_of_bonferroni(p: list[float]) -> None:
    """A hypothesis falls only with every set that holds it, each tested at the smallest p times its size."""
    sets = [s for n in range(1, len(p) + 1) for s in itertools.combinations(range(len(p)), n)]
    expected = [max(min(1, len(s) * min(p[j] for j in s)) for s in sets if i in s) for i in range(len(p))]
    assert holm(np.array(p)) == pytest.approx(np.array(expected), abs=1e-12)


def world(
    seed: int, seeds: int, clusters: int, size: int, *, by_seed: float, by_cluster: float = 0.3, shift: float = 0.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two systems whose true difference is `shift`: seeds, clusters and single queries vary, and hardness is shared."""
    rng = np.random.default_rng([seed, seeds, clusters])
    member = np.repeat(np.arange(clusters), size)
    hard = rng.normal(size=clusters * size)

    def side() -> np.ndarray:
        own = rng.normal(scale=by_cluster, size=clusters)[member] + rng.normal(scale=by_seed, size=(seeds, 1))
        return hard + own + rng.normal(scale=0.5, size=(seeds, clusters * size))

    return side() + shift, side(), member


@pytest.mark.parametrize(
    ("seeds", "by_seed", "by_cluster", "paired"),
    [
        (1, 0.0, 0.3, True),
        (3, 0.5, 0.1, True),
        (3, 0.1, 0.3, False),
        (5, 0.1, 0.3, True),
        (5, 0.1, 0.3, False),
        (5, 0.0, 0.3, True),
    ],
)
def test_covers_the_truth_and_errs_as_often_as_it_says(
    seeds: int, by_seed: float, by_cluster: float, paired: bool
) -> None:
    trials, covered, wrong = 200, 0, 0
    for trial in range(trials):
        a, b, clusters = world(trial, seeds, 40, 3, by_seed=by_seed, by_cluster=by_cluster)
        found = compare(a, b, clusters, seed=trial, samples=300, paired_seeds=paired)
        covered += found.low <= 0 <= found.high
        wrong += found.verdict != "no difference shown"
    assert covered / trials >= 0.90
    assert wrong / trials <= 0.09


def test_queries_alone_would_lie_about_training() -> None:
    """The seeds' mean, tested over queries as if it were one model: what the two-way error is for."""
    wrong = {"queries": 0, "seeds": 0}
    for trial in range(100):
        a, b, clusters = world(trial, 3, 40, 3, by_seed=0.5, by_cluster=0.1)
        wrong["queries"] += sign_flip_test(a.mean(axis=0), b.mean(axis=0), clusters, seed=0, samples=500) <= 0.05
        wrong["seeds"] += compare(a, b, clusters, seed=0, samples=200).verdict != "no difference shown"
    assert wrong["queries"] > 60
    assert wrong["seeds"] <= 10


@pytest.mark.parametrize(("seeds", "paired"), [(1, True), (5, True), (5, False)])
def test_the_detectable_difference_is_detected_in_four_of_five(seeds: int, paired: bool) -> None:
    options = {"by_seed": 0.1 if seeds > 1 else 0.0}
    sizes = [minimum_detectable_difference(*world(t, seeds, 50, 2, **options), paired_seeds=paired) for t in range(100)]
    shown = 0
    for trial in range(100):
        a, b, clusters = world(1000 + trial, seeds, 50, 2, shift=float(np.mean(sizes)), **options)
        shown += compare(a, b, clusters, seed=trial, samples=300, paired_seeds=paired).verdict == "better"
    assert 68 <= shown <= 93


def test_one_model_a_side_is_the_paired_bootstrap() -> None:
    a, b, clusters = world(0, 1, 40, 3, by_seed=0, shift=0.2)
    found = compare(a, b, clusters, seed=4, samples=500)
    assert (found.difference, found.low, found.high) == paired_bootstrap(a[0], b[0], clusters, seed=4, samples=500)
    assert found.p == sign_flip_test(a[0], b[0], clusters, seed=4)
    assert found == compare(a[0], b[0], clusters, seed=4, samples=500)
    assert (found.queries, found.clusters, found.seeds) == (120, 40, (1, 1))


def test_detectable_is_the_t_test_s_for_single_queries() -> None:
    a, b = RNG.normal(size=(2, 80))
    error = stats.sem(a - b)
    expected = (stats.t.ppf(0.995, 79) + stats.t.ppf(0.9, 79)) * error
    assert minimum_detectable_difference(a, b, confidence=0.99, power=0.9) == pytest.approx(expected, abs=1e-9)


def test_the_interval_of_many_seeds_is_that_of_two_way_theory() -> None:
    """Balanced, with all three parts of the variance: mean squares of a two-way analysis of variance."""
    a, b, clusters = world(7, 6, 60, 1, by_seed=0.2, shift=0.3)
    d = a - b
    rows, columns, total = d.mean(axis=1), d.mean(axis=0), d.mean()
    rest = d - rows[:, None] - columns + total
    ms_s, ms_c = 60 * rows.var(ddof=1), 6 * columns.var(ddof=1)
    ms_e = (rest**2).sum() / (5 * 59)
    error = np.sqrt((ms_s + ms_c - ms_e) / 360)
    freedom = (ms_s + ms_c - ms_e) ** 2 / (ms_s**2 / 5 + ms_c**2 / 59 + ms_e**2 / 295)
    found = compare(a, b, clusters, seed=0, samples=20_000)
    half = stats.t.ppf(0.975, freedom) * error
    assert (found.low, found.high) == pytest.approx((total - half, total + half), abs=0.05 * half)
    assert found.p == pytest.approx(2 * stats.t.sf(abs(total) / error, freedom), abs=1e-9)
    power = (stats.t.ppf([0.975, 0.8], freedom)).sum() * error
    assert found.detectable == pytest.approx(power, abs=1e-9)


def test_verdicts_are_plain_and_turn_with_the_sides() -> None:
    a, b, clusters = world(0, 5, 40, 3, by_seed=0.05, shift=0.6)
    assert compare(a, b, clusters, seed=0).verdict == "better"
    turned = compare(b, a, clusters, seed=0)
    assert turned.verdict == "worse"
    assert turned.difference == pytest.approx(-compare(a, b, clusters, seed=0).difference)
    assert compare(a, b, clusters, seed=0, higher_is_better=False).verdict == "worse"
    assert compare(a, a, clusters, seed=0)[:5] == ("no difference shown", 0, 0, 0, 1)
    # All queries and seeds differ by exactly as much: no spread, but p has its floor and is not 0.
    exact = compare(b + 0.5, b, clusters, seed=0, samples=200)
    assert (exact.verdict, exact.low, exact.high) == ("better", pytest.approx(0.5), pytest.approx(0.5))
    assert exact.p == 1e-4
    # Three queries can show nothing, however large the difference.
    assert compare(np.ones(3), np.zeros(3), seed=0).verdict == "no difference shown"


def test_a_fixed_side_has_no_seeds_of_its_own() -> None:
    a, b, clusters = world(0, 4, 40, 3, by_seed=0.3)
    fixed = b[0]
    found = compare(a, fixed, clusters, seed=0)
    assert found.seeds == (4, 1)
    assert found.difference == pytest.approx((a - fixed).mean())
    as_pairs = compare(a, np.tile(fixed, (4, 1)), clusters, seed=0)
    assert found.detectable == pytest.approx(as_pairs.detectable)
    unpaired = compare(a, b[:3], clusters, seed=0, paired_seeds=False)
    assert unpaired.seeds == (4, 3)
    assert unpaired.detectable > found.detectable


def test_pairs_of_seeds_cancel_what_they_share() -> None:
    a, b, clusters = world(0, 5, 40, 3, by_seed=0)
    shared = np.random.default_rng(0).normal(size=(5, 1))
    paired, apart = (compare(a + shared, b + shared, clusters, seed=0, paired_seeds=p) for p in (True, False))
    assert paired.detectable < 0.3 * apart.detectable


def test_many_metrics_are_judged_together() -> None:
    def one(p: float, mean: float = 0.1) -> Comparison:
        return Comparison("better", mean, mean - 0.05, mean + 0.05, p, 0.1, 100, 100, (1, 1), 0.95, True)

    found = holm_corrected({"a": one(0.001), "b": one(0.03), "c": one(0.04, -0.1)})
    assert [c.p for c in found.values()] == pytest.approx([0.003, 0.06, 0.06])
    assert [c.verdict for c in found.values()] == ["better", "no difference shown", "no difference shown"]
    assert holm_corrected({"c": one(0.04, -0.1)})["c"].verdict == "worse"
    assert found["a"]._replace(p=0.001, verdict="better") == one(0.001)


def test_the_same_seed_gives_the_same_comparison() -> None:
    case = world(0, 3, 40, 3, by_seed=0.1)
    assert compare(*case, seed=1) == compare(*case, seed=1) != compare(*case, seed=2)


@pytest.mark.parametrize(
    ("a", "b", "clusters", "options", "message"),
    [
        ([1.0, np.nan], [0, 0], None, {}, "a: 1 values are NaN or infinite, the first at query 1"),
        ([[1, 2], [3, np.inf]], [0, 0], None, {}, "the first at query 1 of seed 1"),
        ([1, 2], [0, 0, 0], None, {}, "answered 2 and 3 queries"),
        (np.ones((3, 4)), np.ones((2, 4)), None, {}, "3 seeds of a and 2 of b cannot be paired"),
        ([1, 2], [0, 0], [5, 5], {}, "one cluster"),
        ([1.0], [0.0], None, {}, "one cluster"),
        ([1, 2], [0, 0], [1], {}, "expected one entry a query"),
        ([], [], None, {}, "Q > 0"),
        (np.ones((2, 2, 2)), [0, 0], None, {}, "expected floats"),
        ([1, 2], [0, 0], None, {"confidence": 1.0}, "confidence 1.0"),
        ([1, 2], [0, 0], None, {"samples": 0}, "0 samples"),
    ],
)
def test_refuses_what_cannot_be_compared(a: list, b: list, clusters: list | None, options: dict, message: str) -> None:
    groups = None if clusters is None else np.array(clusters)
    with pytest.raises(MetricError, match=message):
        compare(np.array(a), np.array(b), groups, seed=0, **options)


def test_refuses_what_is_no_probability_or_power() -> None:
    with pytest.raises(MetricError, match="nan at place 1"):
        holm(np.array([0.1, np.nan]))
    with pytest.raises(MetricError, match="M > 0"):
        holm(np.array([]))
    with pytest.raises(MetricError, match=r"no power 1.0"):
        minimum_detectable_difference(np.arange(3), np.zeros(3), power=1.0)
    with pytest.raises(MetricError, match=r"expected floats \(Q,\)"):
        sign_flip_test(np.ones((2, 3)), np.ones((2, 3)), seed=0)
