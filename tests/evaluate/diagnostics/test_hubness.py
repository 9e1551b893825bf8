"""k-occurrence against scikit-learn and SciPy; ties are shared, so that neither rows nor their order make a hub."""

import numpy as np
import pytest
from scipy.stats import skew
from sklearn.neighbors import NearestNeighbors

from rayemb.evaluate.diagnostics import hubness
from rayemb.evaluate.metrics import MetricError


@pytest.mark.parametrize("against", [False, True])
@pytest.mark.parametrize("k", [1, 5])
def test_the_figures_are_those_of_the_libraries(against: bool, k: int) -> None:
    rng = np.random.default_rng(0)
    x = rng.exponential(size=(150, 20))
    queries = rng.exponential(size=(90, 20)) if against else None
    index = NearestNeighbors(n_neighbors=k, metric="cosine", algorithm="brute").fit(x)
    lists = index.kneighbors(queries, return_distance=False)
    n = np.bincount(lists.ravel(), minlength=150)
    found = hubness(x, k=k, queries=queries, block=13)
    np.testing.assert_allclose(found.occurrence, n, atol=1e-9)
    assert found.skewness == pytest.approx(skew(n), rel=1e-9)
    assert found.robin_hood == pytest.approx(abs(n - n.mean()).sum() / 2 / n.sum(), rel=1e-9)
    assert found.antihubs == pytest.approx((n == 0).mean())
    assert found.hubs == pytest.approx(n[n >= 2 * n.mean()].sum() / n.sum())
    assert found.largest == pytest.approx(n.max() / len(lists))


def test_a_star_has_one_hub() -> None:
    # Thirty points around an axis, orthogonal to each other but near the axis itself.
    x = np.eye(31)
    x[:, 30] += 0.5
    found = hubness(x, k=1)
    np.testing.assert_allclose(found.occurrence, [1 / 30] * 30 + [30])
    assert found.largest == pytest.approx(30 / 31)
    assert found.skewness > 5


def test_ties_share_a_place_and_a_constant_model_has_no_hubs() -> None:
    found = hubness(np.ones((40, 3)), k=4)
    np.testing.assert_allclose(found.occurrence, 4)
    assert found.skewness == 0
    assert found.antihubs == 0
    rng = np.random.default_rng(1)
    x = np.repeat(rng.normal(size=(20, 4)), 3, axis=0)
    order = rng.permutation(60)
    np.testing.assert_allclose(hubness(x[order], k=4).occurrence, hubness(x, k=4).occurrence[order], atol=1e-9)
    assert hubness(x, k=4).occurrence.sum() == pytest.approx(240)


def test_it_does_not_see_rotation_or_length() -> None:
    rng = np.random.default_rng(2)
    x = rng.exponential(size=(80, 12))
    turned = x @ np.linalg.qr(rng.normal(size=(12, 12)))[0] * rng.uniform(0.1, 9, (80, 1))
    assert hubness(turned)[:5] == pytest.approx(hubness(x)[:5], rel=1e-9)


@pytest.mark.parametrize("seed", range(3))
def test_it_grows_with_the_dimension_and_centring_lowers_it(seed: int) -> None:
    # Radovanović et al.; centring is the remedy of Suzuki et al., 2013.
    rng = np.random.default_rng(seed)
    found = [hubness(rng.exponential(size=(1000, dim))) for dim in (3, 10, 100)]
    assert found[0].skewness < found[1].skewness < found[2].skewness
    assert found[0].robin_hood < found[1].robin_hood < found[2].robin_hood
    x = rng.exponential(size=(1000, 100))
    assert hubness(x - x.mean(0)).skewness < hubness(x).skewness / 2


def test_lists_without_a_choice_are_refused() -> None:
    with pytest.raises(MetricError, match="k: lists of 10 have no choice among 10 candidates"):
        hubness(np.eye(11))
    with pytest.raises(MetricError, match=r"vectors: 1 of 3 vectors are zero \(first: row 2\)"):
        hubness(np.diag([1.0, 1, 0]), k=1)
    with pytest.raises(MetricError, match="queries: there are no queries"):
        hubness(np.eye(3), k=1, queries=np.zeros((0, 3)))
    with pytest.raises(MetricError, match="vectors have 3 dimensions, queries 2"):
        hubness(np.eye(3), k=1, queries=np.eye(2))
    with pytest.raises(MetricError, match="queries: 1 of 1 vectors hold NaN"):
        hubness(np.eye(3), k=1, queries=np.full((1, 3), np.nan))
