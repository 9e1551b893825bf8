"""Recall of held-out pairs, in both directions, over all ranks."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from rayemb.data.decode import Member
from rayemb.evaluate.diagnostics import alignment
from rayemb.evaluate.metrics import ranks, recall_at
from rayemb.train.evaluation.base import Encoder, Found, Rows, Task, TaskConfig, block_of

CONCEPT = 2  # of a row's keys


class RetrievalConfig(TaskConfig):
    """Recall@k: queries search the documents of the rows, documents the queries.

    Relevant is all of the same concept; ties count against the model. `recall@k` is the mean of both directions,
    `query_recall@k` that of queries, `document_recall@k` that of documents.
    """

    kind: Literal["retrieval"] = "retrieval"
    ks: tuple[int, ...] = Field((1, 5, 10), min_length=1, description="cut-offs")

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what it reports."""
        return tuple(f"{side}recall@{k}" for k in self.ks for side in ("", "query_", "document_"))

    def prepare(self, member: Member, where: str) -> "Retrieval":
        """The task as workers get it."""
        return Retrieval(self, member, min(self.rows, member.rows))


@dataclass(frozen=True)
class Retrieval(Task):
    """A rank ranks its own queries against the candidates of all: O(M² D / W) time, O(M D) memory and one block."""

    config: RetrievalConfig
    member: Member
    rows: int

    def run(self, encoder: Encoder, rows: Rows) -> Found:
        """See `Task.run`."""
        v = encoder.vectors(rows)
        groups, mine, block = v.keys[:, CONCEPT], v.mine, block_of(len(v.keys))
        found = []
        for queries, candidates in ((v.queries, v.documents), (v.documents, v.queries)):
            part = ranks(queries[mine], candidates, groups[mine], groups, block=block)
            found.append(encoder.everyone(torch.from_numpy(part)))
        figures: dict[str, float | None] = {}
        for k in self.config.ks:
            both = [recall_at(part, k) for part in found]
            values = (float(np.mean(both)), *both)
            figures |= {f"{side}recall@{k}": x for side, x in zip(("", "query_", "document_"), values, strict=True)}
        return Found(figures, (v.queries, v.documents), alignment(v.queries, v.documents))
