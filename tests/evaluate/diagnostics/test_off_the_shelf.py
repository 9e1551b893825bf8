"""The off-the-shelf row (S111): processing, search and SVM against scikit-learn and loops, on digits and on texts."""

import importlib
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.metrics import average_precision_score
from sklearn.svm import LinearSVC

from rayemb.evaluate.diagnostics.off_the_shelf import (
    fit_processing,
    off_the_shelf,
    off_the_shelf_split,
    spatial_boxes,
    spatial_distances,
)
from rayemb.evaluate.metrics import MetricError

Encode = Callable[[list[str]], NDArray[np.float32]]


def test_each_step_gives_unit_vectors_and_whitening_the_identity() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 12)) @ rng.normal(size=(12, 12)) + 2
    made = fit_processing(x, whiten=7, power=0.5)
    for step in (made.raised(x), made.apply(x), made.apply(rng.normal(size=(5, 12)))):
        np.testing.assert_allclose(np.linalg.norm(step, axis=1), 1)
    white = made.whitened(x)
    np.testing.assert_allclose(white.mean(axis=0), 0, atol=1e-9)
    np.testing.assert_allclose(white.T @ white / 300, np.eye(7), atol=1e-9)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    root = np.sign(unit) * np.sqrt(np.abs(unit))
    np.testing.assert_allclose(made.raised(x), root / np.linalg.norm(root, axis=1, keepdims=True))
    theirs = PCA(7, whiten=True, svd_solver="full").fit(made.raised(x)).transform(made.raised(x))
    np.testing.assert_allclose(np.abs(white), np.abs(theirs) * np.sqrt(300 / 299), atol=1e-8)


def test_by_distance_or_by_cosine_is_one_order() -> None:
    rng = np.random.default_rng(1)
    made = fit_processing(rng.normal(size=(50, 6)), whiten=4)
    q, c = made.apply(rng.normal(size=(9, 6))), made.apply(rng.normal(size=(40, 6)))
    distances = np.linalg.norm(q[:, None] - c[None], axis=2)
    np.testing.assert_array_equal(np.argsort(distances, axis=1), np.argsort(-(q @ c.T), axis=1))


def test_the_row_is_sklearns_svm_and_average_precision() -> None:
    x, labels = load_digits(return_X_y=True)
    train, test = slice(0, 300), slice(300, 420)
    found = off_the_shelf(x[train], labels[train], x[test], labels[test], whiten=16, penalties=[1.0], block=50)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    svm = LinearSVC(C=1.0, random_state=0, max_iter=10_000).fit(unit[train], labels[train])
    np.testing.assert_array_equal(found.svm_hits, svm.predict(unit[test]) == labels[test])
    made = fit_processing(x[train], whiten=16)
    scores = made.apply(x[test]) @ made.apply(x[train]).T
    for row, label, precision in zip(scores, labels[test], found.average_precisions, strict=True):
        assert precision == pytest.approx(average_precision_score(labels[train] == label, row), abs=1e-9)
    assert found.nearest == np.mean(labels[train][scores.argmax(axis=1)] == labels[test])
    assert (found.dims, found.c, found.left_out) == (16, 1.0, 0)
    assert found.svm > 0.9 > found.chance


def test_one_point_for_all_is_no_better_than_chance() -> None:
    labels = np.arange(40) % 4
    flat = off_the_shelf(np.ones((40, 3)), labels, np.ones((40, 3)), labels)
    assert flat.nearest == 0
    assert flat.map == pytest.approx(0.25)
    assert flat.svm == pytest.approx(0.25)


def test_the_penalty_is_chosen_where_it_matters() -> None:
    rng = np.random.default_rng(2)
    labels = np.arange(120) % 2
    x = rng.normal(size=(120, 60)) + 0.25 * (2 * labels[:, None] - 1)  # many weak directions: a large C overfits
    small = off_the_shelf(x, labels, x, labels, penalties=(0.01, 1000.0))
    assert small.c == 0.01


def test_the_split_holds_each_class_out_and_leaves_small_ones() -> None:
    rng = np.random.default_rng(3)
    labels = np.array([0] * 20 + [1] * 12 + [7] * 3 + [9])
    x = rng.normal(size=(36, 5)) + np.eye(10)[labels][:, :5]
    found = off_the_shelf_split(x, labels, seed=1)
    assert found.left_out == 4
    assert len(found.svm_hits) == 5 + 3
    again, other = off_the_shelf_split(x, labels, seed=1), off_the_shelf_split(x, labels, seed=2)
    np.testing.assert_array_equal(found.average_precisions, again.average_precisions)
    assert not np.array_equal(found.average_precisions, other.average_precisions)


def test_sentence_vectors_off_the_shelf_beat_words(minilm: Encode) -> None:
    """Which part of scipy is this the first line of? Real texts, with the row of a bag of words beside."""
    parts = ("linalg", "ndimage", "optimize", "signal", "special", "stats")
    texts: dict[str, int] = {}
    for label, part in enumerate(parts):
        module = importlib.import_module(f"scipy.{part}")
        for name in module.__all__:
            lines = (getattr(module, name).__doc__ or "").strip().splitlines()
            line = next((line.strip() for line in lines if "(" not in line and len(line.split()) > 3), "")
            if line:
                texts.setdefault(line, label)
    lines, labels = list(texts)[::3], np.array(list(texts.values()))[::3]
    vectors, words = minilm(lines), TfidfVectorizer().fit_transform(lines).toarray()
    for seed in range(3):
        model, lexical = off_the_shelf_split(vectors, labels, seed=seed), off_the_shelf_split(words, labels, seed=seed)
        assert model.map > lexical.map + 0.05
        assert model.svm > model.chance + 0.2


def test_spatial_search_is_the_loop_and_with_one_patch_the_plain_distance() -> None:
    rng = np.random.default_rng(4)
    queries, references = rng.normal(size=(5, 3, 4)), rng.normal(size=(7, 6, 4))
    naive = [
        [np.mean([min(np.linalg.norm(p - r) for r in reference) for p in query]) for reference in references]
        for query in queries
    ]
    for block in (1, 2, 100):
        np.testing.assert_allclose(spatial_distances(queries, references, block=block), naive, atol=1e-9)
    plain = np.linalg.norm(queries[:, None, 0] - references[None, :, 0], axis=2)
    np.testing.assert_allclose(spatial_distances(queries[:, :1], references[:, :1]), plain, atol=1e-9)


def test_a_digit_that_moved_is_found_by_its_patches() -> None:
    """One digit drawn into a corner of a larger sheet: the whole sheet's pixels differ, a patch of it does not."""
    images = load_digits().images[:60]
    references = np.zeros((60, 16, 16))
    corners = np.random.default_rng(5).integers(0, 3, size=(60, 2)) * 4
    for image, sheet, (top, left) in zip(images, references, corners, strict=True):
        sheet[top : top + 8, left : left + 8] = image

    def features(sheets: NDArray[np.float64], levels: int) -> NDArray[np.float64]:
        side = sheets.shape[1]
        cut = [tuple(round(side * share) for share in box) for box in spatial_boxes(levels)]
        found = []
        for sheet in sheets:
            patches = [sheet[top:bottom, left:right] for top, left, bottom, right in cut]
            found.append([p[np.ix_(*(np.arange(8) * s // 8 for s in p.shape))].ravel() for p in patches])
        return np.array(found)

    queries = images.reshape(60, 1, 64)
    whole = spatial_distances(queries, features(references, 1)).argmin(axis=1)
    parts = spatial_distances(queries, features(references, 3)).argmin(axis=1)
    assert (parts == np.arange(60)).mean() == 1
    assert (whole == np.arange(60)).mean() < 0.5


def test_boxes_cover_the_image_and_overlap_by_half() -> None:
    assert spatial_boxes(1) == [(0.0, 0.0, 1.0, 1.0)]
    boxes = spatial_boxes(4)
    assert len(boxes) == 1 + 4 + 9 + 16
    assert max(box[2] for box in boxes) == pytest.approx(1)
    assert {(top, bottom) for top, _, bottom, _ in boxes[5:14]} == {(0, 0.5), (0.25, 0.75), (0.5, 1)}


def test_bad_tables_labels_and_settings_are_named() -> None:
    rng = np.random.default_rng(6)
    x, labels = rng.normal(size=(20, 3)), np.arange(20) % 2
    with pytest.raises(MetricError, match="labels: all items are of class 5"):
        off_the_shelf(x, np.full(20, 5), x, np.full(20, 5))
    with pytest.raises(MetricError, match="labels: class 3 has one item"):
        off_the_shelf(x, np.where(np.arange(20) == 4, 3, labels), x, labels)
    with pytest.raises(MetricError, match="test_labels: class 8 has no training items"):
        off_the_shelf(x, labels, x, np.where(np.arange(20) == 4, 8, labels))
    with pytest.raises(MetricError, match="train has 3 dimensions, test 2"):
        off_the_shelf(x, labels, x[:, :2], labels)
    with pytest.raises(MetricError, match="expected 20 entries"):
        off_the_shelf(x, labels[:5], x, labels)
    with pytest.raises(MetricError, match="20 items span 3 directions, not 4"):
        fit_processing(x, whiten=4)
    with pytest.raises(MetricError, match="span 0 directions"):
        fit_processing(np.ones((20, 3)), whiten=1)
    with pytest.raises(MetricError, match="power"):
        fit_processing(x, power=0)
    with pytest.raises(MetricError, match="penalties"):
        off_the_shelf(x, labels, x, labels, penalties=(1, -1))
    with pytest.raises(MetricError, match="no class has four items"):
        off_the_shelf_split(x[:4], np.arange(4))
    with pytest.raises(MetricError, match="held_out"):
        off_the_shelf_split(x, labels, held_out=0)
    with pytest.raises(MetricError, match="levels"):
        spatial_boxes(0)
    patches = rng.normal(size=(2, 3, 4))
    with pytest.raises(MetricError, match="queries have 4 dimensions, references 2"):
        spatial_distances(patches, patches[:, :, :2])
    patches[1, 0, 0] = np.nan
    with pytest.raises(MetricError, match="references: item 1 holds NaN"):
        spatial_distances(np.ones((1, 1, 4)), patches)
    x[3] = 0
    with pytest.raises(MetricError, match="train: row 3 is zero"):
        off_the_shelf(x, labels, x, labels)
