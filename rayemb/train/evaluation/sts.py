"""Whether cosines follow the scores that people gave to pairs of texts."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rayemb.data.corpus import read_row_group
from rayemb.data.decode import Member
from rayemb.errors import RayembError
from rayemb.evaluate.diagnostics import alignment
from rayemb.evaluate.metrics import correlation
from rayemb.train.evaluation.base import Encoder, Found, Rows, Task, TaskConfig


class STSConfig(TaskConfig):
    """Semantic textual similarity: correlation of the pairs' cosines with the column `score` (text pairs only)."""

    kind: Literal["sts"] = "sts"

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what it reports."""
        return ("spearman", "pearson")

    def prepare(self, member: Member, where: str) -> "STS":
        """The task as workers get it. Raises RayembError without pairs of texts or without scores."""
        if member.kind != "text_pair":
            raise RayembError(f"sts needs pairs of texts, not {member.kind}", where=where, fix="name such a corpus")
        rows = min(self.rows, member.rows)
        scores = np.full(rows, np.nan)
        for group in member.groups:
            if group.first < rows:
                part = read_row_group(group, ["score"]).column(0).to_numpy()[: rows - group.first]
                scores[group.first : group.first + len(part)] = part
        if np.isfinite(scores).sum() < 2:
            raise RayembError(
                f"split {self.split!r} has no scores", where=where, fix="map a column to `score` when building it"
            )
        return STS(self, member, rows, scores)


@dataclass(frozen=True)
class STS(Task):
    """O(M D) time and memory. Rows without a score are left out."""

    config: STSConfig
    member: Member
    rows: int
    scores: NDArray[np.float64]  # of the rows, NaN where there is none

    def run(self, encoder: Encoder, rows: Rows) -> Found:
        """See `Task.run`."""
        v = encoder.vectors(rows)
        scores = self.scores[v.ordinals]
        scored = np.isfinite(scores)
        cosines = (v.queries.astype(np.float64) * v.documents).sum(axis=1)
        found = correlation(cosines[scored], scores[scored])
        figures = {name: None if math.isnan(x) else x for name, x in found._asdict().items()}
        return Found(figures, (v.queries, v.documents), alignment(v.queries, v.documents))
