"""Calibration against Guo's loop, torchmetrics and scikit-learn; bins with ties; what is no probability."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss
from torchmetrics.functional.classification import multiclass_calibration_error

from rayemb.evaluate.metrics import MetricError, brier, calibration, top_label

Case = tuple[np.ndarray, np.ndarray]


def predictions(rows: int = 400, classes: int = 6, sharp: float = 3.0) -> Case:
    rng = np.random.default_rng(0)
    logits = sharp * rng.normal(size=(rows, classes))
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return p, np.where(rng.random(rows) < 0.5, p.argmax(axis=1), rng.integers(0, classes, rows))


def naive(confidence: np.ndarray, hits: np.ndarray, bins: int) -> tuple[float, float]:
    """Guo et al.: bins (low, high]; ours has 0 in the first."""
    edges = np.linspace(0, 1, bins + 1)
    ece, mce = 0.0, 0.0
    for low, high in itertools.pairwise(edges):
        inside = [i for i, p in enumerate(confidence) if low < p <= high or (low == 0 and p == 0)]
        if inside:
            gap = abs(np.mean([hits[i] for i in inside]) - np.mean([confidence[i] for i in inside]))
            ece, mce = ece + gap * len(inside) / len(confidence), max(mce, gap)
    return float(ece), float(mce)


@pytest.mark.parametrize("bins", [1, 2, 10, 15, 1000])
def test_equals_torchmetrics_and_the_loop(bins: int) -> None:
    p, y = predictions()
    confidence, hits = top_label(p, y)
    found = calibration(confidence, hits, bins=bins)
    for norm, mine in (("l1", found.ece), ("max", found.mce)):
        theirs = multiclass_calibration_error(torch.tensor(p), torch.tensor(y), 6, n_bins=bins, norm=norm)
        assert mine == pytest.approx(float(theirs), abs=1e-6)  # it computes in float32
    assert (found.ece, found.mce) == pytest.approx(naive(confidence, hits, bins), abs=1e-9)
    assert found.overconfidence == pytest.approx(confidence.mean() - hits.mean())


@pytest.mark.parametrize(("scheme", "strategy"), [("width", "uniform"), ("mass", "quantile")])
def test_bins_are_those_of_scikit_learn(scheme: str, strategy: str) -> None:
    p, y = predictions()
    confidence, hits = top_label(p, y)
    accuracy, said = calibration_curve(hits, confidence, n_bins=12, strategy=strategy)
    _, _, _, bins = calibration(confidence, hits, bins=12, scheme=scheme)  # type: ignore[arg-type]
    assert bins.accuracy == pytest.approx(accuracy, abs=1e-9)
    assert bins.confidence == pytest.approx(said, abs=1e-9)
    assert bins.rows.sum() == 400
    if scheme == "mass":
        assert np.ptp(bins.rows) <= 2
    inside = [((confidence > a) & (confidence <= b)).sum() for a, b in zip(bins.low[1:], bins.high[1:], strict=True)]
    assert inside == bins.rows[1:].tolist()


@given(st.lists(st.tuples(st.integers(0, 8), st.booleans()), min_size=1, max_size=60), st.integers(1, 10))
def test_confidences_on_the_edges_and_all_alike(items: list[tuple[int, bool]], bins: int) -> None:
    confidence = np.array([eighths / 8 for eighths, _ in items])
    hits = np.array([hit for _, hit in items], float)
    found = calibration(confidence, hits, bins=bins)
    assert (found.ece, found.mce) == pytest.approx(naive(confidence, hits, bins), abs=1e-9)
    mass = calibration(confidence, hits, bins=bins, scheme="mass")
    order = np.random.default_rng(0).permutation(len(items))
    again = calibration(confidence[order], hits[order], bins=bins, scheme="mass")
    assert mass.ece == pytest.approx(again.ece, abs=1e-12)  # equal confidences are never parted
    assert mass.bins.rows.tolist() == again.bins.rows.tolist()
    assert mass.ece >= abs(mass.overconfidence) - 1e-12


@pytest.mark.parametrize("scheme", ["width", "mass"])
@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_a_constant_model_has_one_bin(scheme: str, value: float) -> None:
    found = calibration(np.full(8, value), np.array([1, 0] * 4), scheme=scheme)  # type: ignore[arg-type]
    assert found.bins.rows.tolist() == [8]
    assert found.ece == found.mce == pytest.approx(abs(value - 0.5))


def test_a_calibrated_model_is_found_calibrated_and_a_sure_one_not() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(200_000)
    hits = (rng.random(200_000) < p).astype(float)
    assert calibration(p, hits).ece < 0.005
    sharper = p**2 / (p**2 + (1 - p) ** 2)
    assert calibration(sharper, hits).ece > 0.05
    assert calibration(np.sqrt(p), hits).overconfidence > 0.1


def test_brier_is_that_of_scikit_learn() -> None:
    p, y = predictions()
    assert brier(p, y).mean() == pytest.approx(brier_score_loss(y, p, labels=range(6), scale_by_half=False), abs=1e-9)
    assert brier(np.array([[0.5, 0.5], [1, 0], [0, 1]]), np.array([0, 0, 0])).tolist() == [0.5, 0, 2]


def test_a_shared_first_place_is_a_miss() -> None:
    p = np.array([[0.5, 0.5, 0.0], [0.2, 0.6, 0.2], [1 / 3, 1 / 3, 1 / 3]])
    confidence, hits = top_label(p, np.array([0, 1, 2]))
    assert confidence.tolist() == [0.5, 0.6, 1 / 3]
    assert hits.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("p", "y", "message"),
    [
        ([[0.5, 0.5], [np.nan, 1.0]], [0, 1], "nan in row 1 is no probability"),
        ([[0.5, 0.5], [0.4, 0.4], [0.1, 0.1]], [0, 1, 1], r"0.8 in row 1 is the sum \(and in 1 more\)"),
        ([[1.5, -0.5]], [0], "1.5 in row 0 is no probability"),
        ([[1.0], [1.0]], [0, 0], "one class is always right"),
        ([[0.5, 0.5]], [2], "2 in row 0 is no class"),
        ([[0.5, 0.5]], [-1], "-1 in row 0 is no class. 0 to 1"),
        ([[0.5, 0.5]], [0, 1], "labels: expected 1 entries"),
        ([0.5], [0], "expected floats"),
        (np.empty((0, 2)), [], "N > 0"),
    ],
)
def test_refuses_what_is_no_prediction(p: list, y: list, message: str) -> None:
    for metric in (top_label, brier):
        with pytest.raises(MetricError, match=message):
            metric(np.array(p), np.array(y, dtype=int))


@pytest.mark.parametrize(
    ("confidence", "hits", "options", "message"),
    [
        ([0.5, np.nan], [0, 1], {}, "confidence: nan in row 1"),
        ([0.5, 1.2], [0, 1], {}, "1.2 in row 1"),
        ([0.5, 0.5], [0, 0.5], {}, "hits: 0.5 in row 1 is neither"),
        ([0.5], [0, 1], {}, "expected two"),
        ([], [], {}, "N > 0"),
        ([0.5], [1], {"bins": 0}, "0 bins"),
        ([0.5], [1], {"scheme": "depth"}, "no scheme 'depth'"),
    ],
)
def test_refuses_what_has_no_calibration(confidence: list, hits: list, options: dict, message: str) -> None:
    with pytest.raises(MetricError, match=message):
        calibration(np.array(confidence), np.array(hits), **options)
