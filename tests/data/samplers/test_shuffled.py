"""The plain order."""

import numpy as np

from rayemb.data.samplers import ShuffledConfig

from .windows import window


def test_a_window_is_permuted_and_batches_may_be_cut_anywhere() -> None:
    sampler = ShuffledConfig()
    order, ends = sampler.arrange(window(x=range(100)), 7, np.random.default_rng(0))
    assert ends is None
    assert not sampler.whole_batches
    assert sorted(order) == list(range(100)) != order.tolist()
