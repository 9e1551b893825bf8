"""The probes: scikit-learn's optimum by its first-order condition, honest sweeps, S017's learning curves on digits."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import logsumexp
from sklearn.datasets import load_digits

from rayemb.evaluate.metrics import MetricError, bayes_probe, class_moments, learning_curves, linear_probe, naive_bayes
from rayemb.evaluate.metrics.probes import LearningCurves

Split = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@pytest.fixture(scope="module")
def digits() -> Split:
    x, y = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(x))
    train, test = order[:1297], order[1297:]
    return x[train].astype(np.float32), y[train], x[test].astype(np.float32), y[test]


def blobs(rows: int = 90, dim: int = 4, classes: int = 3, apart: float = 1.0) -> Split:
    rng = np.random.default_rng(0)
    means = apart * rng.normal(size=(classes, dim))
    y = np.arange(2 * rows) % classes
    x = rng.normal(size=(2 * rows, dim)) + means[y]
    return x[:rows], 10 * y[:rows] - 7, x[rows:], 10 * y[rows:] - 7


def by_hand(x: np.ndarray, y: np.ndarray, test: np.ndarray, strength: float) -> np.ndarray:
    """The multinomial optimum by scipy: C · sum of log losses + |W|² / 2, the intercept free."""
    classes, dim = len(np.unique(y)), x.shape[1]
    # scikit-learn has one weight vector for two classes: w, where softmax has w / 2 and -w / 2 with half its square.
    strength = strength / 2 if classes == 2 else strength
    own = np.unique(y, return_inverse=True)[1]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        w, b = flat[: classes * dim].reshape(classes, dim), flat[classes * dim :]
        s = x @ w.T + b
        p = np.exp(s - logsumexp(s, axis=1, keepdims=True))
        value = strength * (logsumexp(s, axis=1) - s[np.arange(len(x)), own]).sum() + 0.5 * (w**2).sum()
        p[np.arange(len(x)), own] -= 1
        return value, np.concatenate([(strength * p.T @ x + w).ravel(), strength * p.sum(axis=0)])

    found = minimize(loss, np.zeros(classes * (dim + 1)), jac=True, method="BFGS", options={"gtol": 1e-8}).x
    return np.unique(y)[(test @ found[: classes * dim].reshape(classes, dim).T + found[classes * dim :]).argmax(axis=1)]


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("strength", [0.05, 5.0])
def test_one_strength_is_the_optimum_of_its_loss(classes: int, normalise: bool, strength: float) -> None:
    x, y, test, y_test = blobs(classes=classes)
    found = linear_probe(x, y, test, y_test, strengths=(strength,), normalise=normalise, seed=0)
    if normalise:
        x, test = (z / np.linalg.norm(z, axis=1, keepdims=True) for z in (x, test))
    assert found.hits.tolist() == (by_hand(x, y, test, strength) == y_test).astype(float).tolist()
    assert found.accuracy == found.hits.mean()
    assert (found.strength, found.swept, found.converged) == (strength, {}, True)
    per_class = np.mean([found.hits[y_test == c].mean() for c in np.unique(y_test)])
    assert found.per_class == pytest.approx(per_class)


def test_the_sweep_sees_training_items_only_and_chooses_well() -> None:
    x, y, test, y_test = blobs(dim=30, apart=0.5)
    found = linear_probe(x, y, test, y_test, seed=0)
    assert sorted(found.swept) == [0.01, 0.1, 1.0, 10.0, 100.0, 1000.0]
    assert found.swept[found.strength] == max(found.swept.values())
    other = linear_probe(x, y, test[::-1] * 3, y_test[::-1], seed=0)
    assert (other.strength, other.swept) == (found.strength, found.swept)
    assert other.hits[::-1].tolist() == found.hits.tolist()  # of vectors made unit
    assert linear_probe(x, y, test, y_test, seed=0).hits.tolist() == found.hits.tolist()
    assert [linear_probe(x, y, test, y_test, seed=s).swept for s in (1, 2)] != [found.swept] * 2


def test_of_equal_accuracies_the_lower_loss() -> None:
    """Two far classes: every C is right on the held-out part; the surest is the best calibrated here."""
    x = np.repeat([[5.0, 0], [0, 5.0]], 20, axis=0)
    y = np.repeat([0, 1], 20)
    found = linear_probe(x, y, x, y, strengths=(0.01, 1, 100), seed=0)
    assert found.swept == {0.01: 1, 1: 1, 100: 1}
    assert found.strength == 100


def test_one_item_a_class_has_nothing_to_sweep_on() -> None:
    found = linear_probe(np.eye(3), np.arange(3), np.eye(3), np.arange(3), seed=0)
    assert (found.swept, found.strength, found.accuracy) == ({}, 1.0, 1.0)
    assert linear_probe(np.eye(3), np.arange(3), np.eye(3), np.arange(3), strengths=(2, 3, 4), seed=0).strength == 3


def test_a_constant_encoder_and_an_early_stop_are_told() -> None:
    y = np.array([0, 0, 0, 1, 1, 1])
    assert linear_probe(np.ones((6, 2)), y, np.ones((6, 2)), y, seed=0).accuracy <= 0.5
    x, y, test, y_test = blobs()
    assert not linear_probe(x, y, test, y_test, strengths=(1e4,), max_iter=2, seed=0).converged


def test_digits_by_the_linear_probe(digits: Split) -> None:
    found = linear_probe(*digits, seed=0)
    assert found.accuracy == pytest.approx(0.978, abs=0.012)  # .978 on another random split
    assert found.converged


def test_thousands_of_classes_are_learned_too() -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(2000), 2)
    centres = rng.normal(size=(2000, 512))
    train, test = (centres[labels] + 2 * rng.normal(size=(len(labels), 512)) for _ in range(2))
    # With scikit-learn's own tolerance the fit is over before its first step, and called converged.
    assert linear_probe(train, labels, test, labels, strengths=(1.0,), seed=0).accuracy > 0.95


def test_learning_curves_of_digits_as_the_card_has_them(digits: Split) -> None:
    """S017: naive Bayes comes near its best with fewer labels; on pixels, logistic regression's best is the better."""
    found = learning_curves(*digits, shots=(1, 20, 50, 100, 999), repeats=3, seed=0)
    assert found.shots == (1, 20, 50, 100)
    assert found.skipped == (999,)
    bayes, logistic = (dict(zip(found.shots, c.mean(axis=1), strict=True)) for c in (found.bayes, found.logistic))
    assert (bayes[20], bayes[100]) == pytest.approx((0.889, 0.899), abs=0.015)
    assert (logistic[20], logistic[100]) == pytest.approx((0.931, 0.972), abs=0.015)
    few, many = found.reached(0.98)
    assert few is not None
    assert many is not None
    assert few < many
    assert found.crossing == 1  # no regime of labels here in which the generative probe is the better
    assert found.bayes.shape == (4, 3)


def test_two_regimes_where_the_model_of_the_data_is_true() -> None:
    """Normals of one diagonal variance, few labels: naive Bayes leads plain logistic regression; copies turn it."""
    rng = np.random.default_rng(0)
    y = np.arange(3000) % 2
    x = rng.normal(size=(3000, 60)) + 0.25 * rng.choice([-1, 1], size=(2, 60))[y]
    found = learning_curves(
        x[:2000], y[:2000], x[2000:], y[2000:], shots=(20, 50), strengths=(1e3,), normalise=False, seed=0
    )
    assert (found.bayes.mean(axis=1) > found.logistic.mean(axis=1) + 0.01).all()
    assert found.crossing is None
    x[:, 30:] = x[:, :1]  # thirty copies of one feature: its vote counts thirty times, and the crossing comes
    found = learning_curves(x[:2000], y[:2000], x[2000:], y[2000:], shots=(10, 500), normalise=False, seed=0)
    assert found.logistic_whole > found.bayes_whole + 0.02
    assert found.crossing in (10, 500)


def test_reached_and_crossing_by_the_letter() -> None:
    curves = LearningCurves((1, 2, 5), np.array([[0.5], [0.9], [0.9]]), np.array([[0.6], [0.8], [0.95]]), 0.9, 1.0, ())
    assert curves.reached(0.98) == (2, None)
    assert curves.reached(0.9) == (2, 5)
    assert curves.crossing == 5  # ahead at one shot too, but not to stay
    assert curves._replace(logistic=np.zeros((3, 1))).crossing is None


def test_the_bayes_probe_is_its_two_parts() -> None:
    x, y, test, y_test = blobs()
    expected = naive_bayes(class_moments(x, y), shrinkage=0.2, uniform=True).hits(test, y_test)
    assert bayes_probe(x, y, test, y_test, shrinkage=0.2, uniform=True).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"y": np.zeros(90, int)}, {}, "labels_train: all 90 items are of class 0"),
        ({"y_test": np.full(90, 5)}, {}, r"labels_test: class 5 in row 0 has no item in training \(90 such rows\)"),
        ({"x": np.full((90, 4), np.nan)}, {}, "train: 90 of 90 vectors"),
        ({"test": np.ones((90, 3))}, {}, "train has 4 dimensions, test 3"),
        ({"test": np.ones((0, 4)), "y_test": np.zeros(0, int)}, {}, "90 training and 0 test items"),
        ({"y": np.zeros(3, int)}, {}, "labels_train: expected 90 entries"),
        ({}, {"strengths": ()}, "are no strengths"),
        ({}, {"strengths": (1, -1)}, "are no strengths"),
    ],
)
def test_refuses_before_the_first_fit(change: dict, options: dict, message: str) -> None:
    x, y, test, y_test = blobs()
    given = {"x": x, "y": y, "test": test, "y_test": y_test} | change
    with pytest.raises(MetricError, match=message):
        linear_probe(*given.values(), **options, seed=0)
    if not options:
        for probe in (bayes_probe, lambda *a: learning_curves(*a, seed=0)):
            with pytest.raises(MetricError, match=message):
                probe(*given.values())


def test_learning_curves_refuse_shots_that_a_class_lacks() -> None:
    x, y, test, y_test = blobs()
    with pytest.raises(MetricError, match="class -7 has 30 items, fewer than 50 shots"):
        learning_curves(x, y, test, y_test, shots=(50, 100), seed=0)
    with pytest.raises(MetricError, match=r"shots \[0\]"):
        learning_curves(x, y, test, y_test, shots=(0,), seed=0)
