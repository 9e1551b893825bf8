"""Label calibration: rows that stand apart from their class are mislabelled (RCAL, Zhang et al., 2023; card S009).

Verified from the paper's abstract and outline (arXiv 2211.10955): frozen contrastive vectors, one Gaussian a class,
recovered from rows that are polluted by wrong labels and by scarcity, and points sampled from it. That the outliers
are found by LOF, the mixing weights, `gamma` and `alpha` come from the card, which marks them unverified: they are
tunables here. The Gaussians are `rayemb.curate.gaussians`.
"""

from __future__ import annotations

import itertools
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from rayemb.curate.base import Rows, Verdicts, runs, together, verdicts
from rayemb.curate.gaussians import outlier_factors, outliers
from rayemb.curate.vectors import VectorStep, matrix
from rayemb.data.embeddings import VECTOR


class LabelCalibration(VectorStep):
    """Drops (or scores) the rows that are outliers of their concept's vectors: LOF, class by class.

    Choose vectors that were trained without these labels. It finds wrong labels only where the right ones are the
    majority, and leaves classes of fewer than `min_rows` rows alone. On digits a `limit` of 1.2 flags 6 % of the rows
    where all labels are right, 9 of 10 wrong ones where 10 % are wrong and half where 30 % are; 1.1 flags 20 %, all
    and 8 of 10. One hash shuffle by concept.
    """

    name: Literal["label_calibration"] = "label_calibration"
    mode: Literal["drop", "score"] = Field("drop", description="drop outliers, or edit `score` to 1 / LOF and keep all")
    neighbours: int = Field(20, ge=1, description="neighbours of the Local Outlier Factor")
    limit: float = Field(1.2, gt=0, description="rows with a factor above this are outliers; inside a class it is 1")
    max_share: float = Field(0.4, ge=0, le=1, description="most rows of a class that are outliers, the worst")
    min_rows: int = Field(10, ge=3, description="classes with fewer rows are not judged")

    def judge(self, rows: Rows) -> Verdicts:
        """A verdict for every row of a class that is large enough; the score is its Local Outlier Factor."""
        vectors = self.one_side(rows, ["concept_key"])
        return together(vectors, "concept_key", self._judge, rows=rows.count)

    def _judge(self, table: pa.Table) -> pa.Table:
        vectors, ordinals = matrix(table, VECTOR), np.asarray(table["row"])
        starts = runs(np.asarray(table["concept_key"]))
        factors = np.full(len(ordinals), np.nan)
        bad = np.zeros(len(ordinals), bool)
        for start, stop in itertools.pairwise(starts.tolist()):
            if stop - start >= self.min_rows:
                factors[start:stop] = outlier_factors(vectors[start:stop], self.neighbours)
                bad[start:stop] = outliers(factors[start:stop], limit=self.limit, max_share=self.max_share)
        judged = np.flatnonzero(~np.isnan(factors))
        factors, bad, ordinals = factors[judged], bad[judged], ordinals[judged]
        if self.mode == "score":
            return verdicts(ordinals, drop=False, score=factors.astype(np.float32), new_score=1 / factors)
        reason = pa.array(["label_outlier" if b else None for b in bad], pa.string())
        what = [
            f"local outlier factor {f:.3f} in its concept" if b else None for f, b in zip(factors, bad, strict=True)
        ]
        return verdicts(ordinals, drop=bad, reason=reason, what=what, score=factors.astype(np.float32))
