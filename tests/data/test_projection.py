"""The plane: faithful, the same twice, and never a picture of what is no vector."""

import sys

import numpy as np
import pytest
from sklearn.decomposition import PCA

from rayemb.data.projection import ProjectionError, layout_by, neighbours_kept
from tests.index.tables import random_vectors


def test_neighbours_kept_is_what_counting_gives() -> None:
    x = random_vectors(40)
    flat = np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32)
    shares = []
    for row in range(40):
        others = [each for each in range(40) if each != row]
        by_vector = sorted(others, key=lambda each: -float(x[row] @ x[each]))[:10]
        by_point = sorted(others, key=lambda each: float(((flat[row] - flat[each]) ** 2).sum()))[:10]
        shares.append(len(set(by_vector) & set(by_point)) / 10)
    assert neighbours_kept(x, flat) == pytest.approx(np.mean(shares), abs=1e-4)
    angle = np.linspace(0, 3, 40, dtype=np.float32)
    circle = np.column_stack((np.cos(angle), np.sin(angle)))
    assert neighbours_kept(circle, circle) == 1
    assert neighbours_kept(x[:1], flat[:1]) is None


def test_principal_components_are_those_of_scikit_learn_in_the_middle_of_the_square() -> None:
    x = random_vectors(50, 8) * np.linspace(3, 0.1, 8, dtype=np.float32)
    method, points, kept = layout_by("pca")(x)
    expected = PCA(2).fit_transform(x)
    assert method == "pca"
    assert kept == neighbours_kept(x, points)
    for axis in (0, 1):
        assert abs(np.corrcoef(points[:, axis], expected[:, axis])[0, 1]) > 0.9999
    assert np.ptp(points, axis=0).max() == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose((points.min(axis=0) + points.max(axis=0)) / 2, 0.5, atol=1e-5)
    np.testing.assert_array_equal(points, layout_by("pca")(x).points)


@pytest.mark.parametrize("rows", [1, 2, 15])
def test_few_and_equal_vectors_have_a_place(rows: int) -> None:
    x = np.tile(random_vectors(1, 4), (rows, 1))
    np.testing.assert_array_equal(layout_by("pca")(x).points, np.full((rows, 2), 0.5))
    one_dimension = np.linspace(0, 1, rows, dtype=np.float32)[:, None]
    assert np.isfinite(layout_by("pca")(one_dimension).points).all()


def test_umap_of_few_rows_is_pca_and_is_the_same_twice() -> None:
    pytest.importorskip("umap", reason="umap-learn is not installed")
    x = random_vectors(40, 8)
    lay_out = layout_by("umap", seed=3)
    assert lay_out(x[:15]).method == "pca"
    first = lay_out(x)
    assert first.method == "umap"
    np.testing.assert_array_equal(first.points, layout_by("umap", seed=3)(x).points)


def test_what_cannot_be_laid_out_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    x = random_vectors(20, 4)
    x[7, 2] = np.nan
    with pytest.raises(ProjectionError, match=r"task\.map: vector 7 is not finite"):
        layout_by("pca", where="task.map")(x)
    with pytest.raises(ProjectionError, match=r"N > 0, got \(0, 4\)"):
        layout_by("pca")(x[:0])
    monkeypatch.setitem(sys.modules, "umap", None)
    with pytest.raises(ProjectionError, match=r"index\.map\.method: umap-learn is not installed.*take the method pca"):
        layout_by("umap", where="index.map.method")
