"""Alignment filter: pairs whose two sides an encoder finds far apart (LAION, Schuhmann et al., 2021; card S101).

By an absolute cosine or by a share of the corpus. ALIGN, the card's paper, filters by frequencies alone: those rules
are other steps.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, model_validator

from rayemb.curate.base import Rows, Verdicts
from rayemb.curate.ranking import best_share, judged
from rayemb.curate.vectors import QUERY_VECTOR, TEXT_VECTOR, EncoderStep, matrix


class Alignment(EncoderStep):
    """Drops the pairs that fit least: by a threshold on the cosine, or all but the best share of the corpus.

    The share is of the whole corpus and exact, whatever the sharding (two passes over the scores, none over the
    images). Choose a model that has not learned the pairs: one that has, finds its noise aligned. O(rows), no shuffle.
    """

    name: Literal["alignment"] = "alignment"
    threshold: float | None = Field(None, ge=-1, le=1, description="lowest cosine that is kept")
    keep_fraction: float | None = Field(None, ge=0, le=1, description="share of the rows that is kept, the best")

    @model_validator(mode="after")
    def _one(self) -> Alignment:
        if (self.threshold is None) == (self.keep_fraction is None):
            raise ValueError("give threshold or keep_fraction, one of them")
        return self

    def judge(self, rows: Rows) -> Verdicts:
        """A verdict for every row; the score is the cosine."""
        scored = self.vectors(rows).map_batches(_cosines, batch_format="pyarrow", batch_size=None)
        threshold = self.threshold
        if threshold is not None:

            def by_threshold(table: pa.Table) -> pa.Table:
                return judged(
                    table, np.asarray(table["score"]) >= np.float32(threshold), float(threshold), "misaligned"
                )

            return scored.map_batches(by_threshold, batch_format="pyarrow", batch_size=None)
        assert self.keep_fraction is not None
        return best_share(scored.materialize(), rows, self.keep_fraction, "misaligned")


def _cosines(table: pa.Table) -> pa.Table:
    products = matrix(table, QUERY_VECTOR) * matrix(table, TEXT_VECTOR)
    return pa.table({"row": table["row"], "score": products.sum(1, dtype=np.float64).astype(np.float32)})
