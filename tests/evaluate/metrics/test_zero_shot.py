"""Class vectors against open_clip's recipe, hits against torchmetrics, templates, prompt ensembles, refusals."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import softmax
from torchmetrics.functional.classification import multiclass_accuracy

from rayemb.evaluate.metrics import MetricError, class_probabilities, class_vectors, fill_templates, zero_shot

RNG = np.random.default_rng(0)


def test_class_vectors_are_those_of_open_clip() -> None:
    x = RNG.normal(size=(5, 7, 16)) * RNG.uniform(0.1, 9, size=(5, 7, 1))  # sentences of unequal length
    # open_clip.zero_shot_classifier.build_zero_shot_classifier
    each = F.normalize(torch.tensor(x), dim=-1).mean(dim=1)
    expected = (each / each.norm(dim=1, keepdim=True)).numpy()
    found = class_vectors(x.reshape(35, 16), np.repeat(np.arange(5), 7))
    assert found.dtype == np.float32
    assert found == pytest.approx(expected, abs=1e-7)
    once = x.mean(axis=1) / np.linalg.norm(x.mean(axis=1), axis=1, keepdims=True)
    assert np.abs(found - once).max() > 0.05  # normalising only once is another thing


def test_unequal_ensembles_in_any_order() -> None:
    x, owners = RNG.normal(size=(9, 4)), np.array([2, 0, 0, 1, 2, 2, 0, 2, 1])
    found = class_vectors(x, owners)
    for c in range(3):
        unit = x[owners == c] / np.linalg.norm(x[owners == c], axis=1, keepdims=True)
        assert found[c] == pytest.approx(unit.mean(axis=0) / np.linalg.norm(unit.mean(axis=0)), abs=1e-7)
    assert class_vectors(np.array([[1.0, 0], [-1, 0], [0, 3]]), np.array([0, 0, 1])).tolist() == [[0, 0], [0, 1]]


def test_hits_are_those_of_torchmetrics() -> None:
    x, c = RNG.normal(size=(200, 8)).astype(np.float32), RNG.normal(size=(12, 8)).astype(np.float32)
    y = np.where(RNG.random(200) < 0.6, (x @ c.T).argmax(axis=1), RNG.integers(0, 12, 200))
    found = zero_shot(x, c, y, ks=(5, 1, 12), block=17)
    p = class_probabilities(x, c)
    for k in (1, 5, 12):
        theirs = multiclass_accuracy(torch.tensor(p), torch.tensor(y), 12, average="micro", top_k=k)
        assert found.accuracy[k] == pytest.approx(float(theirs), abs=1e-6)
        assert found.hits[k].mean() == found.accuracy[k]
    theirs = multiclass_accuracy(torch.tensor(p), torch.tensor(y), 12, average="macro")
    assert found.per_class == pytest.approx(float(theirs), abs=1e-6)
    assert found.chance == {1: 1 / 12, 5: 5 / 12, 12: 1}
    assert 0.2 < found.accuracy[1] < found.accuracy[5] < found.accuracy[12] == 1


def test_probabilities_are_the_softmax_of_scaled_cosines() -> None:
    x, c = RNG.normal(size=(6, 3)), RNG.normal(size=(4, 3))
    cosines = (x / np.linalg.norm(x, axis=1, keepdims=True)) @ (c / np.linalg.norm(c, axis=1, keepdims=True)).T
    assert class_probabilities(x, c, scale=1000) == pytest.approx(softmax(1000 * cosines, axis=1), abs=1e-9)


def test_lengths_do_not_matter_and_ties_are_misses() -> None:
    x, y = RNG.normal(size=(30, 4)), RNG.integers(0, 3, 30)
    c = RNG.normal(size=(3, 4))
    assert zero_shot(9 * x, 0.1 * c, y).accuracy == zero_shot(x, c, y).accuracy
    assert zero_shot(x, np.ones((3, 4)), y, ks=(1, 2)).accuracy == {1: 0, 2: 0}
    assert zero_shot(np.ones((30, 4)), c, y).hits[1].mean() <= np.bincount(y).max() / 30


def test_per_class_is_the_mean_within_classes() -> None:
    x, c = np.eye(2)[[0, 0, 0, 0]], np.eye(2)
    found = zero_shot(x, c, np.array([0, 0, 0, 1]), ks=(1,))
    assert found.accuracy == {1: 0.75}
    assert found.per_class == 0.5


def test_templates_are_filled_class_by_class() -> None:
    texts, owners = fill_templates(["a {cat}", "dog"], ["{}", "a photo of {}."])
    assert texts == ["a {cat}", "a photo of a {cat}.", "dog", "a photo of dog."]
    assert owners.tolist() == [0, 0, 1, 1]
    for templates in (["photo"], ["{} and {}"]):
        with pytest.raises(MetricError, match=r"needs one \{\} for the name"):
            fill_templates(["x"], templates)
    with pytest.raises(MetricError, match="0 names and 1 templates"):
        fill_templates([], ["{}"])


@pytest.mark.parametrize(
    ("sentences", "owners", "message"),
    [
        (np.ones((3, 2)), [0, 2, 2], "class 1 has no sentence"),
        (np.ones((2, 2)), [-1, 0], "classes count from 0, got -1"),
        (np.ones((2, 2)), [0], "owners: expected 2 entries"),
        ([[1.0, np.inf], [1, 1]], [0, 1], "the first in row 0"),
        (np.ones((0, 2)), [], "no sentences"),
    ],
)
def test_refuses_classes_without_vectors(sentences: list, owners: list, message: str) -> None:
    with pytest.raises(MetricError, match=message):
        class_vectors(np.asarray(sentences), np.array(owners, dtype=int))


@pytest.mark.parametrize(
    ("images", "classes", "labels", "options", "message"),
    [
        (np.ones((2, 2)), np.eye(2), [0, 2], {}, "2 in row 1 is no class. 0 to 1"),
        (np.ones((2, 2)), np.ones((1, 2)), [0, 0], {}, "1 class is no choice"),
        (np.ones((0, 2)), np.eye(2), [], {}, "0 images"),
        (np.ones((2, 2)), np.eye(2), [0, 1], {"ks": ()}, "0 cut-offs"),
        (np.ones((2, 2)), np.eye(2), [0, 1], {"ks": (0,)}, "k counts from 1"),
        (np.ones((2, 3)), np.eye(2), [0, 1], {}, "3 dimensions, candidates 2"),
        (np.full((2, 2), np.nan), np.eye(2), [0, 1], {}, "images: 2 of 2 vectors"),
    ],
)
def test_refuses_what_has_no_accuracy(images, classes, labels, options, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(MetricError, match=message):
        zero_shot(images, classes, np.array(labels, dtype=int), **options)


def test_probabilities_refuse_what_they_cannot_scale() -> None:
    with pytest.raises(MetricError, match="images have 3 dimensions, classes 2"):
        class_probabilities(np.ones((2, 3)), np.eye(2))
    with pytest.raises(MetricError, match="scale nan"):
        class_probabilities(np.ones((2, 2)), np.eye(2), scale=float("nan"))
