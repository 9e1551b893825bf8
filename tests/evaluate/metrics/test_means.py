"""Means that say over which queries they go."""

import numpy as np
import pytest

from rayemb.evaluate.metrics import MetricError, mean_over


def test_queries_without_a_figure_are_left_out_and_counted() -> None:
    assert mean_over(np.array([1.0, np.nan, 0.0, np.nan])) == (0.5, 2, 2)


def test_the_mean_of_classes_is_not_that_of_queries() -> None:
    values = np.array([1.0, 1.0, 1.0, 0.0, np.nan, np.nan])
    assert mean_over(values).value == 0.75
    # Class 9 has no figure at all, and takes no part.
    assert mean_over(values, np.array([5, 5, 5, 7, 7, 9])) == (0.5, 4, 2)


def test_bad_input_is_named() -> None:
    with pytest.raises(MetricError, match="query 1 is infinite"):
        mean_over(np.array([0.0, np.inf]))
    with pytest.raises(MetricError, match="none of 2 queries has a figure"):
        mean_over(np.array([np.nan, np.nan]))
    with pytest.raises(MetricError, match="none of 0 queries"):
        mean_over(np.array([]))
    with pytest.raises(MetricError, match=r"expected floats \(Q,\), got \(1, 1\)"):
        mean_over(np.array([[0.0]]))
    with pytest.raises(MetricError, match="classes: expected 2 entries"):
        mean_over(np.array([0.0, 1.0]), np.array([1]))
