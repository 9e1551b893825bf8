"""Batches of texts of like length."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rayemb.data.samplers import LengthBucketedConfig, ShuffledConfig

from .windows import batches, window


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
    found = batches(LengthBucketedConfig(max_tokens=budget), window(length=lengths), 8)
    assert all(len(batch) * max(lengths[row] for row in batch) <= budget for batch in found)
    # No two batches of like length could have been one.
    assert len(found) <= 2 * sum(lengths) / budget + len(lengths) / 8 + 40
