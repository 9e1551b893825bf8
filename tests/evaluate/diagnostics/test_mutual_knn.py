"""Mutual nearest neighbours against scikit-learn's, a lottery over tied orders, and real vectors."""

from typing import Literal

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from rayemb.evaluate.diagnostics.mutual_knn import mutual_knn
from rayemb.evaluate.metrics import MetricError

Array = NDArray[np.float64]


def neighbours(x: Array, k: int, metric: str) -> list[set[int]]:
    found = NearestNeighbors(n_neighbors=k, metric=metric).fit(x).kneighbors(return_distance=False)  # without itself
    return [set(row) for row in found]


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("k", [1, 5, 59])
def test_it_is_the_overlap_of_sklearns_neighbours(metric: Literal["cosine", "euclidean"], k: int) -> None:
    rng = np.random.default_rng(k)
    x = rng.normal(size=(60, 4)) + 1
    y = x @ rng.normal(size=(4, 7)) + 0.3 * rng.normal(size=(60, 7))
    pairs = zip(neighbours(x, k, metric), neighbours(y, k, metric), strict=True)
    expected = [len(a & b) / k for a, b in pairs]
    for block in (1, 7, 60, 1000):
        found = mutual_knn(x, y, k=k, metric=metric, block=block)
        np.testing.assert_allclose(found.items, expected, atol=1e-12)
        assert found.mean == pytest.approx(np.mean(expected), abs=1e-12)


def test_ties_are_a_fair_lottery() -> None:
    # Distances from item 0: two at 1, three at 2; in the other space another three of them are tied.
    x = np.array([[0.0], [1], [-1], [2], [-2], [2]])
    y = np.array([[0.0], [3], [1], [1], [1], [-1]])
    rng, draws = np.random.default_rng(0), []
    for _ in range(40_000):
        a, b = (np.lexsort((rng.random(5), np.abs(z[1:, 0])))[:3] for z in (x, y))
        draws.append(len(set(a) & set(b)) / 3)
    assert mutual_knn(x, y, k=3, metric="euclidean").items[0] == pytest.approx(np.mean(draws), abs=0.005)


def test_spaces_without_structure_agree_by_chance_only() -> None:
    flat = np.ones((21, 3))
    assert mutual_knn(flat, flat, k=5).mean == pytest.approx(5 / 20)
    found = mutual_knn(flat, np.random.default_rng(0).normal(size=(21, 3)), k=5)
    assert found.mean == pytest.approx(found.chance)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        found = mutual_knn(rng.normal(size=(800, 16)), rng.normal(size=(800, 16)))
        assert found.mean == pytest.approx(found.chance, abs=0.005)


def test_rotation_scale_and_for_cosines_length_change_nothing() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(90, 5))
    turned = 40 * x @ np.linalg.qr(rng.normal(size=(5, 5)))[0]
    assert mutual_knn(x, turned).mean == 1
    assert mutual_knn(x, turned + 100, metric="euclidean").mean == 1
    assert mutual_knn(x, turned * rng.uniform(0.1, 9, size=(90, 1))).mean == 1
    assert mutual_knn(x, turned * rng.uniform(0.1, 9, size=(90, 1)), metric="euclidean").mean < 1


def test_on_digits_fewer_components_share_fewer_neighbours() -> None:
    x = load_digits().data[:900]
    shares = [mutual_knn(x, PCA(d, random_state=0).fit_transform(x), metric="euclidean").mean for d in (32, 16, 8, 2)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.9
    assert shares[-1] < 0.3


def test_bad_tables_and_settings_are_named() -> None:
    x = np.random.default_rng(2).normal(size=(8, 3))
    with pytest.raises(MetricError, match="8 items have 1 to 7 neighbours, got k = 8"):
        mutual_knn(x, x, k=8)
    with pytest.raises(MetricError, match="k = 0"):
        mutual_knn(x, x, k=0)
    with pytest.raises(MetricError, match="block"):
        mutual_knn(x, x, k=2, block=0)
    with pytest.raises(MetricError, match="metric"):
        mutual_knn(x, x, k=2, metric="l1")  # type: ignore[arg-type]
    with pytest.raises(MetricError, match="vectors have 8 rows, other 7"):
        mutual_knn(x, x[:7], k=2)
    x[5] = 0
    with pytest.raises(MetricError, match="vectors: row 5 is zero"):
        mutual_knn(x, x, k=2)
    x[4, 0] = -np.inf
    with pytest.raises(MetricError, match="vectors: row 4 holds"):
        mutual_knn(x, x, k=2)
