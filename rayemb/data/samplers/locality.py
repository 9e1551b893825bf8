"""Batches of rows that are hard to tell apart, along a graph of candidates (BiDR, Xiao et al., 2022; card S113)."""

from collections import deque
from typing import Literal

import numpy as np
from pydantic import Field

from rayemb.data.samplers.base import Arrangement, Indexes, Sampler, Window, joined


class LocalityConfig(Sampler):
    """Locality-centric batches: rows that are each other's candidates make up a batch.

    From "Progressively Optimized Bi-Granular Document Representation for Scalable Embedding Based Retrieval"
    (Xiao et al., 2022), card S113: start at a random query, take the rows that a coarse index finds for it, go on to
    the queries that found those, depth-first (`walk`) or breadth-first (`snowball`), until the batch is full. Every
    row is used once an epoch. `rayemb index neighbours` makes the candidates from an embeddings table; leave out the
    nearest ranks there, which hold false negatives.
    """

    name: Literal["locality"] = "locality"
    neighbours: str = Field(description="attribute table with the candidates of each row")
    column: str = Field("neighbours", description="column with the ordinals of each row's candidates")
    search: Literal["snowball", "walk"] = Field("snowball", description="breadth-first or depth-first")

    @property
    def attributes(self) -> str | None:
        """The table of candidates."""
        return self.neighbours

    def arrange(self, window: Window, size: int, rng: np.random.Generator) -> Arrangement:
        """Batches of connected rows, in random order; candidates outside of the window do not count."""
        graph = _inside(np.asarray(window.column(self.column), dtype=np.int64), window.ordinals)
        free = np.ones(window.rows, dtype=bool)
        starts = deque(rng.permutation(window.rows).tolist())
        batches: list[Indexes] = []
        batch: list[int] = []
        while starts:
            frontier = deque([starts.popleft()])
            while frontier:
                row = frontier.popleft() if self.search == "snowball" else frontier.pop()
                if not free[row]:
                    continue
                free[row] = False
                batch.append(row)
                if len(batch) == size:
                    batches.append(np.array(batch, dtype=np.int64))
                    # A batch is one neighbourhood: the next one begins elsewhere, and comes back for these.
                    starts.extend(frontier)
                    batch, frontier = [], deque()
                else:
                    frontier.extend(graph[row].tolist())
        if batch:
            batches.append(np.array(batch, dtype=np.int64))
        return joined([batches[i] for i in rng.permutation(len(batches))])


def _inside(candidates: Indexes, ordinals: Indexes) -> list[Indexes]:
    """Of each row, the window's rows that it and its candidates point to, in both directions."""
    where = np.argsort(ordinals)
    at = np.searchsorted(ordinals, candidates, sorter=where)
    at = where[np.minimum(at, len(ordinals) - 1)]
    rows, columns = np.nonzero(ordinals[at] == candidates)
    targets = at[rows, columns]
    apart = rows != targets
    rows, targets = rows[apart], targets[apart]
    # A row leads to its candidates first, nearest first, then to the rows that have it among theirs.
    source = np.concatenate([rows, targets])
    target = np.concatenate([targets, rows])
    order = np.argsort(source, kind="stable")
    return np.split(target[order], np.cumsum(np.bincount(source, minlength=len(ordinals)))[:-1])
