"""Utilisation: how near training came to where the test items live (S013; Venkataramanan et al., 2022)."""

from typing import NamedTuple

import numpy as np

from rayemb.evaluate.diagnostics.neighbours import nearest
from rayemb.evaluate.metrics.arrays import Floats, as_vectors


class Utilisation(NamedTuple):
    """Lower: training explored the space nearer to the test items."""

    distance: float
    """The mean distance of a query to the nearest vector of training."""
    squared: float
    """The mean of its square, which some report under the same name."""
    farthest: float
    """The largest of the distances."""
    row: int
    """The query that it belongs to: the item least like what the model was trained on."""


def utilisation(queries: Floats, train: Floats, *, block: int = 512) -> Utilisation:
    """The mean over queries `(Q, D)` of min ‖q - x‖ over x of `(M, D)`. O(block · M) memory, O(Q M D) time.

    For a fixed model it can only fall as vectors are added to `train`, mixed ones for instance. Between models it
    says something only at equal scale: give unit vectors.
    """
    as_vectors(queries, "queries", least=1, why="a mean")
    as_vectors(train, "train", least=1, why="a nearest")
    _, distances = nearest(queries, 1, among=train, block=block)
    d_Q = distances[:, 0]
    return Utilisation(float(d_Q.mean()), float(np.square(d_Q).mean()), float(d_Q.max()), int(d_Q.argmax()))
