"""Cluster-stratified batches (S084): the quota, and fewer false negatives on real digits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits

from rayemb.data.samplers import ClusterStratifiedConfig, ShuffledConfig

from .windows import batches, labels, window


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


@given(values=labels, size=st.integers(1, 16), seed=st.integers(0, 3))
def test_relaxed_quotas_grow_no_further_than_they_must(values: list[int], size: int, seed: int) -> None:
    sampler = ClusterStratifiedConfig(column="concept", rest="relax")
    found = batches(sampler, window(concept=values), size, seed)
    assert sorted(row for batch in found for row in batch) == list(range(len(values)))
    assert all(len(batch) == size for batch in found[:-1])
    left = np.bincount(values)
    quota = -(-size // len(set(values)))
    for batch in found:
        taken = np.bincount(np.asarray(values)[batch], minlength=len(left))
        while quota < left.max() and np.minimum(left, quota).sum() < size:
            quota += 1
        assert taken.max() <= quota
        left = left - taken
