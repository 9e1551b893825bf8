"""Batches of P classes with K rows each, for metric learning (in-batch mining; Hermans et al., 2017)."""

from typing import Literal

import numpy as np
from pydantic import Field

from rayemb.data.samplers.base import Arrangement, Sampler, Window, joined, members, without_replacement


class ClassBalancedConfig(Sampler):
    """P x K batches: `batch_size / per_class` classes, `per_class` rows of each.

    The batches of "In Defense of the Triplet Loss" (Hermans et al., 2017): every row has K - 1 positives besides
    itself. Rows are used once an epoch; what a class has beyond a multiple of K waits for another epoch's shuffle,
    and classes with fewer than K rows never come.
    """

    name: Literal["class_balanced"] = "class_balanced"
    per_class: int = Field(4, ge=1, description="K, rows of each class; batch_size is a multiple of it")
    labels: str | None = Field(None, description="attribute table with the classes; null: `column` of the corpus")
    column: str = Field("concept", description="column that holds the class of each row")

    @property
    def attributes(self) -> str | None:
        """The table of classes."""
        return self.labels

    def arrange(self, window: Window, size: int, rng: np.random.Generator) -> Arrangement:
        """Batches of P classes, drawn in proportion to the groups of K that they have left."""
        k = self.per_class
        groups = [part[: len(part) // k * k].reshape(-1, k) for part in members(window.column(self.column), rng)]
        left = np.array([len(part) for part in groups], dtype=np.int64)
        batches = []
        while np.count_nonzero(left) * k >= size:
            chosen = without_replacement(left.astype(np.float64), size // k, rng)
            left[chosen] -= 1
            batches.append(np.concatenate([groups[c][left[c]] for c in chosen]))
        return joined(batches)
