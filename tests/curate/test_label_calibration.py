"""Label calibration: outliers of a class, Gaussians of it, and what head classes lend to tail classes."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.neighbors import LocalOutlierFactor

from rayemb.curate import LabelCalibration, Rows
from rayemb.curate.gaussians import (
    ClassGaussian,
    balanced,
    calibrated,
    class_gaussian,
    outlier_factors,
    outliers,
    sampled,
)
from tests.curate.digits import NAMES, corpus_of, digit_rows, judged, labels_of, raw_vectors, table_of


def gaussian(mean: list[float], count: int, spread: float = 1.0) -> ClassGaussian:
    return ClassGaussian(np.array(mean), spread * np.eye(len(mean)), count)


def test_balanced_classes_are_left_alone_and_nothing_is_drawn() -> None:
    classes = [gaussian([0, 0], 50), gaussian([4, 0], 50)]
    found = calibrated(classes, head_share=0.5, nearest=1, gamma=0.7, alpha=0.3)
    assert found == classes
    drawn, labels = balanced(found, cap=None, rng=np.random.default_rng(0))
    assert drawn.shape == (0, 2)
    assert labels.shape == (0,)


def test_a_tail_class_takes_from_its_nearest_heads_by_gamma() -> None:
    classes = [gaussian([0, 0], 100), gaussian([10, 0], 80, 3.0), gaussian([2, 0], 5)]
    own = calibrated(classes, head_share=0.5, nearest=2, gamma=0, alpha=0)[2]
    assert own.mean.tolist() == [2, 0]
    np.testing.assert_array_equal(own.covariance, np.eye(2))
    w = np.array([100 / (1 + 2), 80 / (1 + 8)])
    w /= w.sum()
    mixed = calibrated(classes, head_share=0.5, nearest=2, gamma=0.5, alpha=0.2)[2]
    np.testing.assert_allclose(mixed.mean, 0.5 * (w[1] * np.array([10, 0])) + 0.5 * np.array([2, 0]))
    np.testing.assert_allclose(mixed.covariance, (0.5 * (w[0] + 3 * w[1]) + 0.5 + 0.2) * np.eye(2))
    nearest = calibrated(classes, head_share=0.5, nearest=1, gamma=1, alpha=0)[2]
    assert nearest.mean.tolist() == [0, 0]


def test_what_is_drawn_has_the_class_s_mean_and_covariance() -> None:
    rng = np.random.default_rng(0)
    shape = rng.normal(size=(4, 4))
    own = ClassGaussian(np.array([1.0, -2.0, 0.0, 5.0]), shape @ shape.T, 10)
    drawn = sampled(own, 40_000, rng).astype(np.float64)
    errors = np.abs(drawn.mean(0) - own.mean) / np.sqrt(np.diag(own.covariance) / 40_000)
    assert errors.max() < 4
    np.testing.assert_allclose(np.cov(drawn.T), own.covariance, atol=0.03 * np.abs(own.covariance).max())
    classes = [gaussian([0, 0], 30), gaussian([3, 3], 4), gaussian([9, 9], 40)]
    vectors, labels = balanced(classes, cap=35, rng=rng)
    assert np.bincount(labels, minlength=3).tolist() == [5, 31, 0]
    assert len(vectors) == 36


def test_a_class_of_few_rows_has_a_covariance_of_full_rank() -> None:
    few = class_gaussian(np.random.default_rng(0).normal(size=(5, 12)).astype(np.float32))
    assert np.linalg.matrix_rank(few.covariance) == 12
    one = class_gaussian(np.ones((1, 3), np.float32))
    assert one.count == 1
    assert not one.covariance.any()


def test_outliers_are_the_worst_above_the_limit() -> None:
    factors = np.array([1.0, 3.0, 1.2, 2.0, 0.9, 5.0])
    assert outliers(factors, limit=1.1, max_share=0.5).tolist() == [False, True, False, True, False, True]
    assert outliers(factors, limit=2.5, max_share=0.5).tolist() == [False, True, False, False, False, True]
    assert outliers(factors, limit=1.1, max_share=0.2).tolist() == [False] * 5 + [True]
    assert not outliers(factors, limit=1.1, max_share=0).any()


@pytest.mark.usefixtures("ray_cluster")
def test_wrong_labels_on_digits_are_found(tmp_path: Path) -> None:
    """30 % wrong labels, spread over the classes; one class is too small to judge."""
    count, rng = 500, np.random.default_rng(0)
    labels = labels_of(count).copy()
    wrong = rng.random(count) < 0.3
    labels[wrong] = (labels[wrong] + rng.integers(1, 10, wrong.sum())) % 10
    concepts = [NAMES[label] for label in labels]
    concepts[:5] = ["rare"] * 5
    corpus = corpus_of(tmp_path / "corpus", digit_rows(count, concept=concepts))
    vectors = raw_vectors(count)
    table = table_of(tmp_path / "table", corpus, vectors)
    found = judged(LabelCalibration(embeddings=table, limit=1.1), Rows.of(corpus))
    assert set(found) == set(range(5, count))
    for label in range(10):  # the same factors as scikit-learn's, class by class
        members = [n for n in range(count) if concepts[n] == NAMES[label]]
        expected = -LocalOutlierFactor(20).fit(vectors[members].astype(np.float64)).negative_outlier_factor_
        np.testing.assert_allclose([found[n]["score"] for n in members], expected, rtol=1e-5)
        dropped = [n for n in members if found[n]["drop"]]
        assert len(dropped) <= 0.4 * len(members)
        np.testing.assert_allclose(outlier_factors(vectors[members], 20), expected, rtol=1e-9)
    kept = np.array([n for n in found if not found[n]["drop"]])
    assert wrong[5:].mean() > 0.25
    assert wrong[kept].mean() < 0.55 * wrong[5:].mean()  # at random it would stay as it was

    scored = judged(LabelCalibration(embeddings=table, mode="score"), Rows.of(corpus))
    assert not any(verdict["drop"] for verdict in scored.values())
    assert all(v["new_score"] == pytest.approx(1 / v["score"], rel=1e-5) for v in scored.values())
