"""P x K batches."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rayemb.data.samplers import ClassBalancedConfig

from .windows import batches, labels, window


@given(values=labels, classes=st.integers(1, 4), k=st.integers(1, 4), seed=st.integers(0, 3))
def test_p_classes_of_k_rows(values: list[int], classes: int, k: int, seed: int) -> None:
    found = batches(ClassBalancedConfig(per_class=k), window(concept=values), classes * k, seed)
    for batch in found:
        counts = np.bincount(np.asarray(values)[batch])
        assert sorted(counts[counts > 0]) == [k] * classes
