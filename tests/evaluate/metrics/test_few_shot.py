"""Episodes: their promise of fairness, scikit-learn's NearestCentroid as oracle, the interval, what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from sklearn.neighbors import NearestCentroid

from rayemb.evaluate.metrics import MetricError, draw_episodes, few_shot

RNG = np.random.default_rng(0)


def case(classes: int = 8, each: int = 25, dim: int = 6) -> tuple[np.ndarray, np.ndarray]:
    y = RNG.permutation(np.repeat(np.arange(classes) * 10 - 5, each))
    return RNG.normal(size=(len(y), dim)) + 1.2 * RNG.normal(size=(classes, dim))[(y + 5) // 10], y


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.integers(2, 4), st.integers(1, 3), st.integers(1, 4))
def test_an_episode_holds_what_it_says(labels: list[int], ways: int, shots: int, queries: int) -> None:
    y = np.array(labels)
    able = {c for c in labels if labels.count(c) >= shots + queries}
    options = {"ways": ways, "shots": shots, "queries": queries, "episodes": 5, "seed": 3}
    if len(able) < ways:
        with pytest.raises(MetricError, match=f"{len(able)} of {len(set(labels))} classes have the"):
            draw_episodes(y, **options)
        return
    found = draw_episodes(y, **options)
    assert set(found.skipped) == set(labels) - able
    assert (found.support.shape, found.queries.shape) == ((5, ways, shots), (5, ways, queries))
    for classes, support, asked in zip(found.classes, found.support, found.queries, strict=True):
        assert len(set(classes.tolist())) == ways
        assert set(classes.tolist()) <= able
        rows = np.concatenate([support, asked], axis=1)
        assert len(set(rows.ravel().tolist())) == rows.size  # no query among the examples
        assert (y[rows] == classes[:, None]).all()


def test_episodes_depend_on_seed_and_number_alone() -> None:
    _, y = case()
    many, few = (draw_episodes(y, episodes=n, seed=1) for n in (20, 5))
    assert (many.support[:5] == few.support).all()
    assert (many.queries[:5] == few.queries).all()
    assert (draw_episodes(y, episodes=5, seed=2).support != few.support).any()


def test_classes_and_items_are_drawn_evenly() -> None:
    _, y = case(each=20)
    found = draw_episodes(y, episodes=2000, seed=0)
    share = np.unique(found.classes, return_counts=True)[1] / 2000
    assert share == pytest.approx(np.full(8, 5 / 8), abs=0.05)
    times = np.bincount(found.support.ravel(), minlength=len(y))
    assert times.min() > 0.5 * times.mean()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("shots", [1, 5])
def test_the_nearest_prototype_is_scikit_learns(metric: str, shots: int) -> None:
    x, y = case()
    found = few_shot(x, y, shots=shots, episodes=40, metric=metric, seed=0)  # type: ignore[arg-type]
    drawn = draw_episodes(y, shots=shots, episodes=40, seed=0)
    expected = []
    for support, asked in zip(drawn.support, drawn.queries, strict=True):
        z = x / np.linalg.norm(x, axis=1, keepdims=True) if metric == "cosine" else x
        model = NearestCentroid().fit(z[support.ravel()], y[support.ravel()])
        if metric == "cosine":  # on the sphere the nearest is that of the highest cosine
            model.centroids_ /= np.linalg.norm(model.centroids_, axis=1, keepdims=True)
        expected.append((model.predict(z[asked.ravel()]) == y[asked.ravel()]).mean())
    assert found.accuracies == pytest.approx(np.array(expected), abs=1e-9)
    assert 0.25 < found.interval.mean < 1


def test_the_interval_is_over_episodes() -> None:
    x, y = case()
    found = few_shot(x, y, seed=0, episodes=100)
    half = 1.96 * np.std(found.accuracies, ddof=1) / 10
    assert found.interval == pytest.approx(
        (found.accuracies.mean(), found.accuracies.mean() - half, found.accuracies.mean() + half)
    )
    # Over seeds, the mean of 100 episodes is as uncertain as each run says.
    means = [few_shot(x, y, seed=s, episodes=100).interval.mean for s in range(1, 21)]
    assert 0.5 < 1.96 * np.std(means, ddof=1) / half < 1.6


def test_a_constant_encoder_is_never_right_and_a_perfect_one_always() -> None:
    _, y = case()
    for metric in ("cosine", "euclidean"):
        constant = np.ones((len(y), 3)) + 1e-9 * RNG.normal(size=(len(y), 3))
        assert few_shot(constant, y, episodes=5, metric=metric, seed=0).interval == (0, 0, 0)  # type: ignore[arg-type]
        perfect = np.eye(8)[(y + 5) // 10]
        assert few_shot(perfect, y, episodes=5, metric=metric, seed=0).interval == (1, 1, 1)  # type: ignore[arg-type]
        assert few_shot(np.zeros((len(y), 3)), y, episodes=5, metric=metric, seed=0).interval.mean == 0  # type: ignore[arg-type]


def test_digits_learn_more_from_more_examples() -> None:
    x, y = load_digits(return_X_y=True)
    one, five = (few_shot(x.astype(np.float32), y, shots=shots, episodes=200, seed=0) for shots in (1, 5))
    assert 0.6 < one.interval.high < five.interval.low < 1


def test_vectors_far_from_the_origin_keep_their_digits() -> None:
    x, y = case()
    near, far = (few_shot(x + shift, y, episodes=20, metric="euclidean", seed=0) for shift in (0, 100.0))
    assert far.interval.mean == pytest.approx(near.interval.mean, abs=0.01)


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([3] * 20, {}, "1 of 1 classes have the 16 items .* but 5 are needed"),
        ([0] * 20 + [1] * 20 + [7] * 3, {"ways": 3}, r"2 of 3 classes .* too few have 7 \(3\)"),
        ([], {}, "0 of 0 classes"),
        ([0.5], {}, "expected integers"),
        ([0, 1], {"ways": 1}, "ways 1"),
        ([0, 1], {"shots": 0}, "shots 0"),
        ([0, 1], {"queries": 0}, "queries 0"),
        ([0, 1], {"episodes": 1}, "episodes 1"),
        ([0, 1], {"seed": -1}, "seed -1"),
    ],
)
def test_refuses_what_no_episode_can_hold(labels: list, options: dict, message: str) -> None:
    with pytest.raises(MetricError, match=message):
        draw_episodes(np.array(labels), **{"seed": 0, **options})


def test_refuses_bad_vectors() -> None:
    x, y = case()
    with pytest.raises(MetricError, match="no metric 'dot'"):
        few_shot(x, y, metric="dot", seed=0)  # type: ignore[arg-type]
    with pytest.raises(MetricError, match="labels: expected 200 entries"):
        few_shot(x, y[1:], seed=0)
    x[17, 0] = np.inf
    with pytest.raises(MetricError, match="the first in row 17"):
        few_shot(x, y, seed=0)
