"""What every sampler keeps to, and drawing without replacement."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

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

from .windows import batches, labels, window

SAMPLERS = [
    ShuffledConfig(),
    ClusterStratifiedConfig(column="concept"),
    ClusterStratifiedConfig(column="concept", rest="relax"),
    ClassBalancedConfig(per_class=2),
    LengthBucketedConfig(),
    LengthBucketedConfig(max_tokens=30),
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


def test_drawing_without_replacement_follows_the_weights() -> None:
    rng = np.random.default_rng(0)
    weights = np.array([1.0, 2.0, 3.0, 0.0])
    first = np.bincount([without_replacement(weights, 1, rng)[0] for _ in range(6000)], minlength=4)
    # Three standard errors of a share of one half of 6,000 draws.
    assert first / 6000 == pytest.approx([1 / 6, 1 / 3, 1 / 2, 0], abs=3 * 0.5 / 6000**0.5)
    assert sorted(without_replacement(weights, 9, rng)) == [0, 1, 2]
