"""Coreset: rows drawn by leverage or l_p sensitivity (l_p sensitivity sampling, Woodruff and Yasuda, 2023; card S071).

Leverage scores and Lewis weights (Cohen and Peng, 2015) are standard; of the paper only the sampling is used, not its
sample sizes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pydantic import Field

from rayemb.curate.base import Rows, Verdicts, verdicts
from rayemb.curate.draw import uniform_of
from rayemb.curate.sensitivity import importance, lewis_inverse, probabilities
from rayemb.curate.vectors import VectorStep, matrix, reduced
from rayemb.data.embeddings import VECTOR


class Coreset(VectorStep):
    """Drops all but a weighted sample that keeps rare directions of the vectors; edits `score` to the weight.

    With the weights, ||Ax||_p^p of the sample is unbiased for every x. Choose it over a random sample where few rows
    hold what matters (training an index, replay); rows of rare directions are often noise: clean first. Memory
    O(D^2) on the driver, one pass over the vectors (`lewis`: one a round).
    """

    name: Literal["coreset"] = "coreset"
    budget: int = Field(ge=1, description="rows that are kept at most, in expectation")
    scheme: Literal["leverage", "root_leverage", "lewis", "uniform"] = Field(
        "leverage", description="what rows are drawn in proportion to; uniform: the baseline"
    )
    p: float = Field(2.0, gt=0, lt=4, description="the norm whose powers are kept (root_leverage, lewis)")
    rounds: int = Field(10, ge=1, description="rounds of Lewis weights, a pass each")

    def judge(self, rows: Rows) -> Verdicts:
        """A verdict for every row: the score is its probability, `new_score` of a kept one 1 / that."""
        vectors = self.one_side(rows).materialize()
        p = self.p if self.scheme == "lewis" else 2.0

        def reduce(part: Callable[[NDArray[np.float32]], NDArray[np.float64]]) -> NDArray[np.float64]:
            return reduced(vectors, lambda table: part(matrix(table, VECTOR)))

        inverse = lewis_inverse(p, reduce, self.rounds)
        total = float(reduce(lambda a: np.array([importance(a, inverse, self.scheme, self.p).sum()]))[0])
        rows.facts.update(total_importance=total)
        budget, scheme, power, seed = self.budget, self.scheme, self.p, rows.seed

        def judge(table: pa.Table) -> pa.Table:
            ordinals = np.asarray(table["row"])
            chance = probabilities(importance(matrix(table, VECTOR), inverse, scheme, power), total, budget)
            keep = uniform_of(ordinals, seed) < chance
            weight = [float(1 / share) if kept else None for share, kept in zip(chance, keep, strict=True)]
            what = [
                None if kept else f"not drawn, at a probability of {c:.3g}"
                for c, kept in zip(chance, keep, strict=True)
            ]
            reason = pa.array([None if kept else "not_drawn" for kept in keep], pa.string())
            return verdicts(
                ordinals, drop=~keep, reason=reason, what=what, score=chance.astype(np.float32), new_score=weight
            )

        return vectors.map_batches(judge, batch_format="pyarrow", batch_size=None)
