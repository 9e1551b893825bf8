"""Semantic duplicates: near-equal vectors, found inside k-means clusters (SemDeDup, Abbas et al., 2023).

What was verified: the order of keeping (lowest cosine to the centroid first) and the cosine threshold 1 - epsilon, in
descriptions and copies of the released code. Left out of it: that a row close to a *dropped* row is dropped.
"""

from __future__ import annotations

import itertools
from typing import Literal

import numpy as np
import pyarrow as pa
import ray
from numpy.typing import NDArray
from pydantic import Field

from rayemb.curate.base import Rows, Verdicts, runs, together, verdicts
from rayemb.curate.clusters import across_borders, assign, centroids_of, duplicate_of, unit
from rayemb.curate.draw import uniform_of
from rayemb.curate.vectors import VectorStep, collected, matrix
from rayemb.data.embeddings import VECTOR

MISSES_AMONG = 4096  # sampled rows that are compared by brute force, to see how many pairs lie across borders


class SemanticDuplicates(VectorStep):
    """Drops all but one of the rows that mean the same: a cosine above 1 - epsilon inside a cluster of vectors.

    Every dropped row has a kept one that close. Pairs across the border of two clusters are missed; the report's
    `pairs_across_borders` of `pairs_sampled` says how many, and fewer clusters miss fewer, at rows_per_cluster times
    the rows in products. One encoder pass, one hash shuffle of the vectors.
    """

    name: Literal["semantic_duplicates"] = "semantic_duplicates"
    epsilon: float = Field(0.05, gt=0, lt=2, description="rows with a cosine above 1 - epsilon repeat each other")
    keep: Literal["farthest", "closest"] = Field(
        "farthest", description="which of a group stays: farthest from the centroid (the paper's) or closest to it"
    )
    rows_per_cluster: int = Field(1000, ge=1, description="mean rows in a cluster: what is compared with each other")
    sample_rows: int = Field(100_000, ge=100, description="rows that k-means is fitted on")
    rounds: int = Field(20, ge=1, description="rounds of k-means")

    def judge(self, rows: Rows) -> Verdicts:
        """A verdict for every dropped row: its partner is the row that stays, the score their cosine."""
        vectors = self.one_side(rows).materialize()
        share, seed = min(1.0, self.sample_rows / max(1, rows.count)), rows.seed

        def drawn(table: pa.Table) -> pa.Table:
            return table.filter(pa.array(uniform_of(np.asarray(table["row"]), seed) < share))

        sampled = vectors.map_batches(drawn, batch_format="pyarrow", batch_size=None)
        sample = matrix(collected(sampled, ["row", VECTOR]), VECTOR)
        # FAISS asks for 39 points a centroid; with fewer, centroids are single rows.
        wanted = max(1, min(round(rows.count / self.rows_per_cluster), len(sample) // 39))
        centroids = centroids_of(sample, wanted, seed=seed, rounds=self.rounds)
        among = sample[:MISSES_AMONG]
        pairs, across = across_borders(among, assign(among, centroids)[0], epsilon=self.epsilon)
        rows.facts.update(clusters=len(centroids), pairs_sampled=pairs, pairs_across_borders=across)
        held = ray.put(centroids)

        def place(table: pa.Table) -> pa.Table:
            nearest, cosine = assign(matrix(table, VECTOR), ray.get(held))
            return pa.table({"row": table["row"], "cluster": nearest, "cosine": cosine, VECTOR: table[VECTOR]})

        def judge(table: pa.Table) -> pa.Table:
            return _judged(table, self.epsilon, self.keep)

        placed = vectors.map_batches(place, batch_format="pyarrow", batch_size=None)
        return together(placed, "cluster", judge, rows=rows.count)


def _judged(table: pa.Table, epsilon: float, keep: Literal["farthest", "closest"]) -> pa.Table:
    vectors, ordinals = matrix(table, VECTOR), np.asarray(table["row"])
    cosines, starts = np.asarray(table["cosine"]), runs(np.asarray(table["cluster"]))
    found: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
    for start, stop in itertools.pairwise(starts.tolist()):
        stands = duplicate_of(vectors[start:stop], cosines[start:stop], epsilon=epsilon, keep=keep)
        dropped = np.flatnonzero(stands >= 0)
        found.append((start + dropped, start + stands[dropped]))
    dropped, partner = (np.concatenate(part) for part in zip(*found, strict=True))
    score = (unit(vectors[dropped]) * unit(vectors[partner])).sum(1)
    what = [f"cosine {value:.4f} to a row that stays" for value in score]
    return verdicts(ordinals[dropped], reason="semantic_duplicate", what=what, score=score, partner=ordinals[partner])
