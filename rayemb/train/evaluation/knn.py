"""How often a row's nearest neighbours are of its concept."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from rayemb.data.decode import Member
from rayemb.evaluate.diagnostics import tolerance
from rayemb.evaluate.metrics import knn_hits
from rayemb.train.evaluation.base import Encoder, Found, Rows, Task, TaskConfig, block_of
from rayemb.train.evaluation.retrieval import CONCEPT


class KNNConfig(TaskConfig):
    """k-NN accuracy on concepts, leave-one-out (Caron et al., 2021); and the tolerance (S046).

    Rows whose concept no other row has cannot be answered: they are neighbours and not asked.
    """

    kind: Literal["knn"] = "knn"
    side: Literal["query", "document"] = Field(
        "query", description="whose vectors: of images (or queries), or of texts"
    )
    k: int = Field(20, ge=1, description="neighbours")
    temperature: float = Field(0.07, gt=0, description="a neighbour votes with exp(cosine / temperature)")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what it reports."""
        return ("accuracy", "tolerance")

    def prepare(self, member: Member, where: str) -> "KNN":
        """The task as workers get it."""
        return KNN(self, member, min(self.rows, member.rows))


@dataclass(frozen=True)
class KNN(Task):
    """A rank asks for its own rows among those of all: O(M² D / W) time, O(M D) memory and one block."""

    config: KNNConfig
    member: Member
    rows: int

    def run(self, encoder: Encoder, rows: Rows) -> Found:
        """See `Task.run`."""
        queries = self.config.side == "query"
        v = encoder.vectors(rows, sides="queries" if queries else "documents")
        x, labels = v.queries if queries else v.documents, v.keys[:, CONCEPT]
        _, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
        asked = np.flatnonzero(counts[inverse] > 1)
        mine = asked[(asked >= v.mine.start) & (asked < v.mine.stop)]
        config = self.config
        part = knn_hits(
            x[mine],
            x,
            labels[mine],
            labels,
            exclude=mine,
            k=config.k,
            temperature=config.temperature,
            block=block_of(len(x)),
        )
        hits = encoder.everyone(torch.from_numpy(part))
        if not len(hits):
            return Found({"accuracy": None, "tolerance": None}, (x,), None)
        tolerated = tolerance(x, labels)
        # Of unit vectors, ‖x - y‖² = 2 - 2 cos.
        return Found({"accuracy": float(hits.mean()), "tolerance": tolerated}, (x,), 2 - 2 * tolerated)
