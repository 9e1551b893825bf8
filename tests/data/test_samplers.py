"""Samplers as pure functions of a window: quotas, coverage, and what each card asks for."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits

from rayemb.data.samplers import (
    AnySampler,
    ClassBalancedConfig,
    ClusterStratifiedConfig,
    LengthBucketedConfig,
    LocalityConfig,
    ShuffledConfig,
    Window,
)
from rayemb.data.samplers.base import without_replacement


def window(**columns: Any) -> Window:
    rows = len(next(iter(columns.values())))
    return Window(rows, lambda name: np.asarray(columns[name]), np.arange(100, 100 + rows))


def batches(sampler: AnySampler, window: Window, size: int, seed: int = 0) -> list[list[int]]:
    order, ends = sampler.arrange(window, size, np.random.default_rng(seed))
    if ends is None:
        return [order[at : at + size].tolist() for at in range(0, len(order), size)]
    assert len(order) == (ends[-1] if len(ends) else 0)
    return [part.tolist() for part in np.split(order, ends[:-1])] if len(ends) else []


labels = st.lists(st.integers(0, 6), min_size=1, max_size=60)
SAMPLERS = [
    ShuffledConfig(),
    ClusterStratifiedConfig(column="concept"),
    ClusterStratifiedConfig(column="concept", rest="relax"),
    ClassBalancedConfig(per_class=2),
    LengthBucketedConfig(),
    LengthBucketedConfig(max_characters=30),
    LocalityConfig(neighbours="x"),
    LocalityConfig(neighbours="x", search="walk"),
]
USES_ALL = [s for s in SAMPLERS if isinstance(s, ShuffledConfig | LengthBucketedConfig | LocalityConfig)]


def full_window(values: list[int]) -> Window:
    rng = np.random.default_rng(len(values))
    near = rng.integers(90, 110 + len(values), (len(values), 3))  # some lie outside of the window
    return window(concept=values, length=[v + 1 for v in values], neighbours=near)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: f"{s.name}-{len(s.model_dump_json())}")
@given(values=labels, half=st.integers(1, 8), seed=st.integers(0, 3))
def test_every_row_at_most_once_in_batches_of_at_most_the_size(
    sampler: AnySampler, values: list[int], half: int, seed: int
) -> None:
    found = batches(sampler, full_window(values), 2 * half, seed)
    rows = [row for batch in found for row in batch]
    assert len(set(rows)) == len(rows)
    assert set(rows) <= set(range(len(values)))
    assert all(0 < len(batch) <= 2 * half for batch in found)
    if sampler in USES_ALL:
        assert len(rows) == len(values)
    assert found == batches(sampler, full_window(values), 2 * half, seed)


@given(values=labels, size=st.integers(1, 16), seed=st.integers(0, 3))
def test_no_cluster_has_more_than_its_quota(values: list[int], size: int, seed: int) -> None:
    quota = -(-size // len(set(values)))
    found = batches(ClusterStratifiedConfig(column="concept"), window(concept=values), size, seed)
    for batch in found:
        assert len(batch) == size
        assert max(np.bincount(np.asarray(values)[batch])) <= quota
    # Nothing is left out for which there was another batch within the quota.
    left = np.bincount(values)
    for batch in found:
        left = left - np.bincount(np.asarray(values)[batch], minlength=len(left))
    assert np.minimum(left, quota).sum() < size


def test_one_cluster_is_random_sampling_and_uses_every_full_batch() -> None:
    found = batches(ClusterStratifiedConfig(column="c"), window(c=[5] * 50), 8)
    assert [len(batch) for batch in found] == [8] * 6


def test_clusters_that_are_classes_leave_no_two_of_a_class_in_a_batch() -> None:
    classes = np.random.default_rng(0).integers(0, 16, 640)
    found = batches(ClusterStratifiedConfig(column="c"), window(c=classes), 16)
    assert len(found) > 20
    assert all(len(set(classes[batch])) == 16 for batch in found)


def test_pseudo_clusters_keep_rows_of_one_true_class_apart_on_digits() -> None:
    """S084: at least 35 % fewer same-class pairs than random batches, by k-means on raw pixels, k = B = 16."""
    images, classes = load_digits(return_X_y=True)
    clusters = KMeans(16, n_init=4, random_state=0).fit_predict(images)

    def same(found: list[list[int]]) -> float:
        pairs = [(classes[b][:, None] == classes[b]).sum() - len(b) for b in map(np.array, found)]
        return sum(pairs) / sum(len(b) * (len(b) - 1) for b in found)

    seen, epochs = window(c=clusters), range(10)
    stratified = [batches(ClusterStratifiedConfig(column="c"), seen, 16, epoch) for epoch in epochs]
    random = np.mean([same(batches(ShuffledConfig(), seen, 16, epoch)) for epoch in epochs])
    counts = np.bincount(classes)
    assert random == pytest.approx((counts * (counts - 1)).sum() / (1797 * 1796), abs=0.003)
    assert np.mean([same(found) for found in stratified]) < 0.65 * random
    assert stratified[0] != stratified[1]  # unlike the reference's


@given(values=labels, classes=st.integers(1, 4), k=st.integers(1, 4), seed=st.integers(0, 3))
def test_p_classes_of_k_rows(values: list[int], classes: int, k: int, seed: int) -> None:
    found = batches(ClassBalancedConfig(per_class=k), window(concept=values), classes * k, seed)
    for batch in found:
        counts = np.bincount(np.asarray(values)[batch])
        assert sorted(counts[counts > 0]) == [k] * classes


def test_texts_of_like_length_share_a_batch() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, 512)
    found = batches(LengthBucketedConfig(), window(length=lengths), 32)
    padding = sum(len(batch) * lengths[batch].max() for batch in found) / lengths.sum()
    shuffled = batches(ShuffledConfig(), window(length=lengths), 32)
    assert padding < 1.1 < 1.5 < sum(len(b) * lengths[b].max() for b in shuffled) / lengths.sum()
    firsts = [lengths[batch].max() for batch in found]
    assert firsts != sorted(firsts)  # batches themselves come in no order of length


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=50), budget=st.integers(40, 200))
def test_a_budget_bounds_rows_times_the_longest(lengths: list[int], budget: int) -> None:
    found = batches(LengthBucketedConfig(max_characters=budget), window(length=lengths), 8)
    assert all(len(batch) * max(lengths[row] for row in batch) <= budget for batch in found)
    # No two batches of like length could have been one.
    assert len(found) <= 2 * sum(lengths) / budget + len(lengths) / 8 + 40


@pytest.mark.parametrize("search", ["snowball", "walk"])
def test_batches_are_neighbourhoods_of_the_graph(search: Any) -> None:
    """S113: rows that are each other's candidates meet in a batch far more often than in random ones."""
    rng = np.random.default_rng(0)
    groups = rng.permutation(np.repeat(np.arange(64), 16))
    near = np.stack([rng.choice(np.flatnonzero(groups == g), 6, replace=False) for g in groups]) + 100
    seen = window(neighbours=near)
    found = batches(LocalityConfig(neighbours="x", search=search), seen, 16)
    assert sorted(row for batch in found for row in batch) == list(range(1024))
    alike = np.mean([np.bincount(groups[batch]).max() for batch in found if len(batch) == 16])
    at_random = np.mean([np.bincount(groups[batch]).max() for batch in batches(ShuffledConfig(), seen, 16)])
    assert at_random < 4 < 12 < alike


def test_candidates_outside_of_the_window_are_no_neighbours() -> None:
    found = batches(LocalityConfig(neighbours="x"), window(neighbours=[[5], [7000], [-1]]), 2)
    assert sorted(row for batch in found for row in batch) == [0, 1, 2]


def test_drawing_without_replacement_follows_the_weights() -> None:
    rng = np.random.default_rng(0)
    weights = np.array([1.0, 2.0, 3.0, 0.0])
    first = np.bincount([without_replacement(weights, 1, rng)[0] for _ in range(6000)], minlength=4)
    # Three standard errors of a share of one half of 6,000 draws.
    assert first / 6000 == pytest.approx([1 / 6, 1 / 3, 1 / 2, 0], abs=3 * 0.5 / 6000**0.5)
    assert sorted(without_replacement(weights, 9, rng)) == [0, 1, 2]
