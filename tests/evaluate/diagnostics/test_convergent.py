"""Matching, sparse prediction and joint clusters: card S090's checks, brute force, scikit-learn, and MiniLM."""

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.linear_model import Lasso

from rayemb.evaluate.diagnostics.cka import linear_cka
from rayemb.evaluate.diagnostics.convergent import (
    convergent_learning,
    sparse_prediction,
    spectral_overlap,
    unit_matching,
)
from rayemb.evaluate.diagnostics.svcca import svcca
from rayemb.evaluate.metrics import MetricError

Array = NDArray[np.float64]
Encode = Callable[[list[str]], NDArray[np.float32]]


def test_a_permuted_copy_is_recovered_unit_by_unit() -> None:
    for seed in range(3):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(200, 24)) @ rng.normal(size=(24, 24))  # correlated units
        order = rng.permutation(24)
        found = unit_matching(x, (7 * x - 3)[:, order])
        assert found.matched == found.semi_matched == found.greedy == pytest.approx(1, abs=1e-12)
        assert {(order[b], b) for a, b in found.pairs} == {(a, b) for a, b in found.pairs}
        assert sorted(found.pairs[:, 0]) == list(range(24))


@pytest.mark.parametrize(("p", "q"), [(4, 4), (3, 5), (5, 3)])
@pytest.mark.parametrize("absolute", [False, True])
def test_the_assignment_is_the_best_of_all(p: int, q: int, absolute: bool) -> None:
    rng = np.random.default_rng(p + q)
    x, y = rng.normal(size=(20, p)), rng.normal(size=(20, q))
    r = np.corrcoef(x.T, y.T)[:p, p:]
    r = np.abs(r) if absolute else r
    if p <= q:
        best = max(np.mean([r[i, j] for i, j in enumerate(js)]) for js in itertools.permutations(range(q), p))
    else:
        best = max(np.mean([r[i, j] for j, i in enumerate(rows)]) for rows in itertools.permutations(range(p), q))
    found = unit_matching(x, y, absolute=absolute)
    assert found.matched == pytest.approx(best, abs=1e-12)
    np.testing.assert_allclose(found.semi_correlations, np.sort(r.max(axis=1))[::-1], atol=1e-12)
    np.testing.assert_allclose([r[a, b] for a, b in found.pairs], found.correlations, atol=1e-12)
    assert found.greedy <= found.matched + 1e-12


def test_a_unit_and_its_negative_are_one_only_if_asked() -> None:
    x = np.random.default_rng(0).normal(size=(300, 5))
    assert unit_matching(x, -x).matched < 0.2
    assert unit_matching(x, -x, absolute=True).matched == pytest.approx(1, abs=1e-12)


def test_noise_matches_as_much_as_the_card_says() -> None:
    ratios = []
    for seed in range(5):
        rng = np.random.default_rng(seed)
        found = unit_matching(rng.normal(size=(2000, 100)), rng.normal(size=(2000, 100)))
        ratios.append(found.semi_matched / found.chance)
    assert 0.75 < np.mean(ratios) < 1.05  # the formula is the limit for many units, from above


def test_dead_units_are_left_out_and_the_numbers_of_the_others_kept() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(50, 4))
    x[:, 1] = 0.1  # not exact in binary
    y = x[:, [3, 1, 0, 2]]
    found = unit_matching(x, y)
    assert found.dead == 2
    assert {(int(a), int(b)) for a, b in found.pairs} == {(0, 2), (2, 3), (3, 0)}


def test_the_lasso_is_sklearns_unit_by_unit() -> None:
    rng = np.random.default_rng(2)
    y = rng.normal(size=(80, 6))
    x = y @ rng.normal(size=(6, 3)) + 0.5 * rng.normal(size=(80, 3))
    found = sparse_prediction(x, y, penalties=(0.2, 0.05), targets=None, seed=4)
    zx, zy = ((z - z.mean(0)) / z.std(0) for z in (x, y))
    test, train = np.split(np.random.default_rng(4).permutation(80), [20])
    for at, penalty in enumerate((0.2, 0.05)):
        r2, used = [], []
        for unit in range(3):
            model = Lasso(penalty, tol=1e-12, max_iter=100_000).fit(zy[train], zx[train, unit])
            error = ((model.predict(zy[test]) - zx[test, unit]) ** 2).mean()
            r2.append(1 - error / ((zx[test, unit] - zx[train, unit].mean()) ** 2).mean())
            used.append((model.coef_ != 0).sum())
        assert found.r2_by_penalty[at] == pytest.approx(np.mean(r2), abs=2e-3)
        assert found.units_by_penalty[at] == pytest.approx(np.mean(used))
    assert found.r2 == max(found.r2_by_penalty)


def test_a_copy_needs_one_unit_a_rotation_many_and_noise_finds_none() -> None:
    for seed in range(3):
        rng = np.random.default_rng(seed)
        x = rng.normal(size=(600, 20))
        rotated = x @ np.linalg.qr(rng.normal(size=(20, 20)))[0]
        copy = sparse_prediction(x, x[:, rng.permutation(20)], seed=seed)
        assert copy.r2 > 0.999
        assert copy.one_unit_r2 == pytest.approx(1, abs=1e-9)
        assert copy.units_by_penalty[0] == 1
        turned = sparse_prediction(x, rotated, seed=seed)
        assert turned.r2 > 0.99
        assert turned.one_unit_r2 < 0.5
        assert turned.units > 15
        assert sparse_prediction(x, rng.normal(size=(600, 20)), seed=seed).r2 < 0.02


def test_clusters_are_mixed_where_the_spaces_share_something() -> None:
    for seed in range(3):
        rng = np.random.default_rng(seed)
        factors = rng.normal(size=(500, 4))
        groups = np.repeat(np.arange(4), 5)
        x = factors[:, groups] + 0.3 * rng.normal(size=(500, 20))
        y = factors[:, groups] + 0.3 * rng.normal(size=(500, 20))
        shared = spectral_overlap(x, y, clusters=4, seed=seed)
        assert shared.mixed == shared.balance == 1
        np.testing.assert_array_equal(shared.clusters, np.full((4, 2), 5))
        assert len(set(zip(shared.members, [*groups, *groups], strict=True))) == 4  # exactly the planted groups
        other = rng.normal(size=(500, 4))[:, groups] + 0.3 * rng.normal(size=(500, 20))
        apart = spectral_overlap(x, other, clusters=8, seed=seed)
        assert apart.mixed == apart.balance == 0


@pytest.fixture(scope="module")
def words(minilm: Encode) -> Array:
    """Real vectors: pairs of neighbouring words of the description of the digits."""
    found = sorted(set(load_digits().DESCR.split()))
    return minilm([f"{a} {b}" for a, b in itertools.pairwise(found)]).astype(np.float64)


def test_on_real_vectors_a_rotation_keeps_the_subspace_and_loses_the_units(words: Array) -> None:
    x = words[:, :48]
    for seed in range(3):
        rng = np.random.default_rng(seed)
        copy = convergent_learning(x, x[:, rng.permutation(48)], seed=seed)
        assert copy.matched == pytest.approx(1, abs=1e-9)
        rotated = x @ np.linalg.qr(rng.normal(size=(48, 48)))[0]
        turned = convergent_learning(x, rotated, seed=seed)
        assert linear_cka(x, rotated) == pytest.approx(1, abs=1e-9)
        assert svcca(x, rotated, variance=1.0).mean == pytest.approx(1, abs=1e-6)
        assert turned.matched < 0.5
        assert turned.sparse_r2 > turned.one_unit_r2 + 0.4
        assert copy.one_unit_r2 > 0.99


def test_bad_tables_and_settings_are_named() -> None:
    x = np.random.default_rng(3).normal(size=(12, 3))
    with pytest.raises(MetricError, match="vectors have 12 rows, other 11"):
        unit_matching(x, x[:11])
    with pytest.raises(MetricError, match="penalties"):
        sparse_prediction(x, x, penalties=(0.1, 0))
    with pytest.raises(MetricError, match="held_out"):
        sparse_prediction(x, x, held_out=1.0)
    with pytest.raises(MetricError, match="targets"):
        sparse_prediction(x, x, targets=0)
    with pytest.raises(MetricError, match="needs 8 vectors"):
        sparse_prediction(x[:7], x[:7])
    with pytest.raises(MetricError, match="6 live units make 2 to 5 clusters, got 6"):
        spectral_overlap(x, x, clusters=6)
    with pytest.raises(MetricError, match="other: all 12 vectors are one"):
        unit_matching(x, np.ones((12, 2)))
    x[2, 0] = np.nan
    with pytest.raises(MetricError, match="vectors: row 2 holds"):
        convergent_learning(x, x)
