"""Batches with few rows of any one cluster: few negatives are false (G-SimCLR, Chakraborty et al., 2020; card S084)."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from rayemb.data.samplers.base import Arrangement, Indexes, Sampler, Window, joined, members, without_replacement


class ClusterStratifiedConfig(Sampler):
    """At most ceil(B / k) rows of each of k pseudo-clusters in a batch of B.

    From "G-SimCLR: Self-Supervised Contrastive Learning with Guided Projection via Pseudo Labelling"
    (Chakraborty et al., 2020), card S084: pseudo-labels by k-means keep rows of the same unknown class apart.
    The reference sorts its data once, so that all epochs have the same batches and the last ones hold only the
    largest clusters; here rows are shuffled within clusters each epoch, and clusters are drawn in proportion to what
    they have left. Clusters are unequal, so that k = B leaves more than half of the rows out of an epoch; k = 1.25 B
    keeps as many false negatives away and uses 70 to 80 % (`jobs/bench/RESULTS.md`). `rayemb index clusters` makes
    the clusters of an embeddings table.
    """

    name: Literal["cluster_stratified"] = "cluster_stratified"
    clusters: str | None = Field(None, description="attribute table with the clusters; null: `column` of the corpus")
    column: str = Field("cluster", description="column that holds the cluster of each row")
    rest: Literal["drop", "relax"] = Field(
        "drop",
        description="when no full batch within the quota is left: leave the rest out of the epoch, or let the quota "
        "grow by one, and so on to the last row",
    )

    @property
    def attributes(self) -> str | None:
        """The table of clusters."""
        return self.clusters

    def arrange(self, window: Window, size: int, rng: np.random.Generator) -> Arrangement:
        """Batches within the quota, or as near to it as the rows allow."""
        rows = members(window.column(self.column), rng)
        quota = -(-size // max(1, len(rows)))
        return joined(stratified(rows, size, quota, rng, relax=self.rest == "relax"))


def stratified(rows: list[Indexes], size: int, quota: int, rng: np.random.Generator, *, relax: bool) -> list[Indexes]:
    """Batches of `size` with at most `quota` of each cluster's `rows`; O(clusters * quota) per batch.

    Clusters are drawn with probability proportional to the rows they have left. `relax`: where no full batch can be
    had within the quota, it grows by one, and so on to the last row; the last batch is short.
    """
    left = np.array([len(part) for part in rows], dtype=np.int64)
    batches = []
    while left.any():
        while relax and quota < left.max() and np.minimum(left, quota).sum() < size:
            quota += 1
        if np.minimum(left, quota).sum() < size and not relax:
            break
        took = _draw(left, size, quota, rng)
        batch = [rows[c][left[c] - n : left[c]] for c, n in zip(*took, strict=True)]
        left[took[0]] -= took[1]
        batches.append(rng.permutation(np.concatenate(batch)))
    return batches


def _draw(left: Indexes, size: int, quota: int, rng: np.random.Generator) -> tuple[Indexes, Indexes]:
    """Clusters and how many rows of each: `size` of the slots that they have, each weighing its cluster's rest."""
    slots = np.minimum(left, quota)
    owner = np.repeat(np.arange(len(left)), slots)
    weights: NDArray[np.float64] = (left / np.maximum(slots, 1))[owner]
    clusters, counts = np.unique(owner[without_replacement(weights, size, rng)], return_counts=True)
    return clusters.astype(np.int64), counts.astype(np.int64)
