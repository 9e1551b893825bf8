"""Locality-centric batches (S113)."""

from typing import Any

import numpy as np
import pytest

from rayemb.data.samplers import LocalityConfig, ShuffledConfig

from .windows import batches, window


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
