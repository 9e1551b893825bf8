"""What the page shows of labelled items: the confusion of nearest neighbours, of any number of classes."""

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import confusion_matrix
from sklearn.neighbors import NearestNeighbors

from rayemb.evaluate.tasks import shown
from tests.memory import traced_peak


def blobs(classes: int, each: int) -> tuple[NDArray[np.float32], NDArray[np.int64], list[str]]:
    """Classes that overlap, and their names."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(classes), each)
    x = rng.normal(size=(classes, 8))[labels] + 0.8 * rng.normal(size=(len(labels), 8))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x.astype(np.float32), labels, [f"class {n}" for n in range(classes)]


def oracle(x: NDArray[np.float32], labels: NDArray[np.int64]) -> NDArray[np.float64]:
    nearest = NearestNeighbors(n_neighbors=2).fit(x).kneighbors(x)[1][:, 1]
    return confusion_matrix(labels, labels[nearest], normalize="true")


def test_few_classes_are_all_there() -> None:
    x, labels, names = blobs(5, 40)
    found = shown.confusion(x, labels, names, seed=0)
    assert found is not None
    assert np.array(found.shares) == pytest.approx(oracle(x, labels))
    assert (found.labels, found.note) == (tuple(names), "")


def test_of_many_classes_the_most_confused_are_shown() -> None:
    x, labels, names = blobs(30, 20)
    found = shown.confusion(x, labels, names, seed=0)
    assert found is not None
    shares = oracle(x, labels)
    off = shares - np.diag(np.diag(shares))
    kept = np.sort(np.argsort(-(off + off.T).max(axis=1), kind="stable")[:16])
    assert found.labels == tuple(names[n] for n in kept)
    assert np.array(found.shares) == pytest.approx(shares[np.ix_(kept, kept)])
    assert found.note.startswith("The 16 of 30 classes")


def test_of_many_items_a_sample_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels, names = blobs(5, 200)
    monkeypatch.setattr(shown, "ASKED", 500)
    found = shown.confusion(x, labels, names, seed=0)
    assert found is not None
    assert found.note == "Of 500 of the 1,000 items."
    assert np.array(found.shares).sum(axis=1) == pytest.approx(1)
    assert np.array(found.shares) == pytest.approx(oracle(x, labels), abs=0.15)
    assert found == shown.confusion(x, labels, names, seed=0)


def test_memory_does_not_grow_with_the_square_of_the_classes() -> None:
    x, labels, names = blobs(10_000, 2)
    found, peak = traced_peak(lambda: shown.confusion(x, labels, names, seed=0))
    assert found is not None
    assert len(found.labels) == 16
    assert peak < 400e6  # a table of classes by classes is 800 MB
