"""S017's probe: streaming equals one shot, LDA with a diagonal covariance as oracle, the card's numeric checks."""

from functools import reduce

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import multivariate_normal
from sklearn.datasets import load_digits
from sklearn.naive_bayes import GaussianNB

from rayemb.evaluate.metrics import MetricError, class_moments, merge_moments, naive_bayes

RNG = np.random.default_rng(0)


def case(rows: int = 120, dim: int = 5, classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    y = RNG.choice(classes, rows, p=np.arange(1, classes + 1) / sum(range(1, classes + 1))) * 11 - 3
    x = RNG.normal(size=(rows, dim)) * RNG.uniform(0.2, 4, dim) + RNG.normal(size=(classes, dim))[(y + 3) // 11]
    return x, y


@given(st.lists(st.integers(0, 60), max_size=8), st.booleans(), st.sampled_from([0.0, 1e4]))
def test_any_chunking_equals_one_shot(cuts: list[int], by_class: bool, shift: float) -> None:
    rng = np.random.default_rng(0)
    y = rng.integers(-1, 3, 60)
    x = rng.normal(size=(60, 4)) + shift  # far from zero, where sums of squares would lose their digits
    order = np.argsort(y, kind="stable") if by_class else np.arange(60)  # chunks that lack classes
    parts = np.split(order, sorted(cuts))  # empty ones too
    streamed = reduce(merge_moments, [class_moments(x[part], y[part]) for part in parts])
    whole = class_moments(x, y)
    assert streamed.classes.tolist() == whole.classes.tolist() == [-1, 0, 1, 2]
    assert streamed.counts.tolist() == whole.counts.tolist()
    assert streamed.means == pytest.approx(whole.means, rel=1e-10)
    assert streamed.squares == pytest.approx(whole.squares, rel=1e-10)
    one, other = naive_bayes(streamed), naive_bayes(whole)
    assert one.scores(x) == pytest.approx(other.scores(x), rel=1e-7, abs=1e-9 if shift == 0 else 1e-6)
    assert one.predict(x).tolist() == other.predict(x).tolist()


def test_moments_are_numpys() -> None:
    x, y = case()
    found = class_moments(x, y)
    for c, name in enumerate(np.unique(y)):
        mine = x[y == name]
        assert found.counts[c] == len(mine)
        assert found.means[c] == pytest.approx(mine.mean(axis=0), abs=1e-12)
        assert found.squares[c] / len(mine) == pytest.approx(mine.var(axis=0), abs=1e-12)


@pytest.mark.parametrize("shrinkage", [0.0, 0.3, 1.0, None])
@pytest.mark.parametrize("uniform", [False, True])
def test_the_posterior_is_that_of_normals_with_one_diagonal_covariance(shrinkage: float | None, uniform: bool) -> None:
    x, y = case()
    test, _ = case()
    names, counts = np.unique(y, return_counts=True)
    within = sum(((x[y == c] - x[y == c].mean(axis=0)) ** 2).sum(axis=0) for c in names) / len(x)
    drawn = len(names) / len(x) if shrinkage is None else shrinkage
    variance = (1 - drawn) * within + drawn * x.var(axis=0)
    prior = np.full(4, 0.25) if uniform else counts / len(x)
    joint = np.stack(
        [
            np.log(pi) + multivariate_normal(x[y == c].mean(axis=0), np.diag(variance)).logpdf(test)
            for c, pi in zip(names, prior, strict=True)
        ],
        axis=1,
    )
    found = naive_bayes(class_moments(x, y), shrinkage=shrinkage, uniform=uniform)
    assert found.predict(test).tolist() == names[joint.argmax(axis=1)].tolist()
    p = np.exp(joint) / np.exp(joint).sum(axis=1, keepdims=True)
    assert found.probabilities(test) == pytest.approx(p, abs=1e-9)


def test_scikit_learn_agrees_where_the_classes_share_their_variance() -> None:
    x, y = case()
    names = np.unique(y)
    model = GaussianNB(var_smoothing=0).fit(x, y)
    model.var_ = np.tile(naive_bayes(class_moments(x, y), shrinkage=0).variance, (len(names), 1))
    found = naive_bayes(class_moments(x, y), shrinkage=0)
    assert found.probabilities(x) == pytest.approx(model.predict_proba(x), abs=1e-9)
    assert found.hits(x, y).mean() == pytest.approx(model.score(x, y))


def test_equal_priors_and_variances_are_the_nearest_mean() -> None:
    x, y = case()
    moments = class_moments(x, y)
    # Each dimension scaled to the same shared variance.
    scaled = class_moments(x / np.sqrt(naive_bayes(moments, shrinkage=0).variance), y)
    probe = naive_bayes(scaled, shrinkage=0, uniform=True)
    assert probe.variance == pytest.approx(np.ones(5))
    test = RNG.normal(size=(50, 5))
    nearest = ((test[:, None] - scaled.means) ** 2).sum(axis=2).argmin(axis=1)
    assert probe.predict(test).tolist() == scaled.classes[nearest].tolist()


def test_a_duplicate_feature_doubles_its_vote() -> None:
    x, y = case(dim=2)
    once, twice = (naive_bayes(class_moments(z, y), shrinkage=0, uniform=True) for z in (x, x[:, [0, 0, 1]]))
    test = RNG.normal(size=(20, 2))
    own = once._replace(weights=once.weights * [2, 1], biases=np.zeros(4))
    both = twice._replace(biases=np.zeros(4))
    assert both.scores(test[:, [0, 0, 1]]) == pytest.approx(own.scores(test), abs=1e-9)


def test_one_shot_takes_the_variance_of_all_items() -> None:
    x, y = RNG.normal(size=(4, 6)), np.arange(4)
    probe = naive_bayes(class_moments(x, y))
    assert probe.variance == pytest.approx(x.var(axis=0))
    assert probe.hits(x, y).tolist() == [1, 1, 1, 1]


def test_dead_dimensions_have_no_say() -> None:
    x, y = case()
    dead = np.concatenate([x, np.full((len(x), 2), 0.1)], axis=1)
    test = np.concatenate([x, 1e3 * RNG.normal(size=(len(x), 2))], axis=1)  # alive only in the test items
    for shrinkage in (0.0, None):
        plain, probe = (naive_bayes(class_moments(z, y), shrinkage=shrinkage) for z in (x, dead))
        assert probe.scores(test) == pytest.approx(plain.scores(x), abs=1e-6)
    # Constant within each class, but not between them: it separates them, finitely.
    apart = naive_bayes(class_moments(np.concatenate([x, y[:, None]], axis=1), y), shrinkage=0)
    assert np.isfinite(apart.weights).all()
    assert apart.hits(np.concatenate([x, y[:, None]], axis=1), y).all()


def test_a_tie_is_a_miss() -> None:
    probe = naive_bayes(class_moments(np.array([[1.0, 0], [-1, 0], [1, 1], [-1, 1]]), np.array([0, 1, 0, 1])))
    assert probe.hits(np.array([[0.0, 5], [1, 0]]), np.array([0, 0])).tolist() == [0, 1]


def test_digits_as_the_card_has_them() -> None:
    x, y = load_digits(return_X_y=True)
    rng = np.random.default_rng(0)
    order = rng.permutation(len(x))
    train, test = order[:1297], order[1297:]
    parts = [class_moments(x[p].astype(np.float32), y[p]) for p in np.array_split(train, 7)]
    probe = naive_bayes(reduce(merge_moments, parts), shrinkage=0)
    assert probe.hits(x[test], y[test]).mean() == pytest.approx(0.90, abs=0.02)  # the card: .899


@pytest.mark.parametrize(
    ("x", "y", "options", "message"),
    [
        ([[1.0], [2]], [4, 4], {}, "all items are of class 4"),
        (np.ones((0, 3)), [], {}, "no items"),
        (np.ones((4, 2)), [0, 1, 0, 1], {}, "all 4 vectors are the same"),
        ([[1.0], [2]], [0, 1], {"shrinkage": 1.5}, "1.5 is no share"),
        ([[1.0], [np.nan]], [0, 1], {}, "the first in row 1"),
        ([[1.0], [2]], [0], {}, "labels: expected 2 entries"),
    ],
)
def test_refuses_what_teaches_nothing(x: list, y: list, options: dict, message: str) -> None:
    with pytest.raises(MetricError, match=message):
        naive_bayes(class_moments(np.asarray(x), np.array(y, dtype=int)), **options)


def test_refuses_strange_dimensions_and_classes() -> None:
    x, y = case()
    probe = naive_bayes(class_moments(x, y))
    with pytest.raises(MetricError, match="3 dimensions; the probe has 5"):
        probe.scores(np.ones((2, 3)))
    with pytest.raises(MetricError, match="class 99 in row 1 has no item in training"):
        probe.hits(x[:2], np.array([y[0], 99]))
    with pytest.raises(MetricError, match="chunks of 5 and 3 dimensions"):
        merge_moments(class_moments(x, y), class_moments(np.ones((2, 3)), np.array([0, 1])))
