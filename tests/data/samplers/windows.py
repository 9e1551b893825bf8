"""Windows made by hand, and the batches that a sampler makes of them."""

from typing import Any

import numpy as np
from hypothesis import strategies as st

from rayemb.data.samplers import AnySampler, Window


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
