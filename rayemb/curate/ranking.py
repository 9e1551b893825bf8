"""The best share of a whole corpus by a score, on Ray Data: exact, and the same for any sharding."""

import numpy as np
import pyarrow as pa
import ray.data
from numpy.typing import NDArray

from rayemb.curate.base import Rows, Verdicts, verdicts
from rayemb.curate.quantile import BITS, Cut, cut_at, histogram
from rayemb.curate.vectors import tables


def keep_best(scored: ray.data.Dataset, rows: int, keep: int) -> Cut | None:
    """The cut that keeps exactly the `keep` best of `rows` rows (`row`, `score`); materialise `scored` first.

    Two passes over the scores, up to four more where many are equal. None: nothing is to be kept.
    """

    def counted(table: pa.Table, prefix: tuple[int, ...]) -> pa.Table:
        counts = histogram(np.asarray(table["score"]), np.asarray(table["row"]), prefix)
        digits = np.flatnonzero(counts)  # sparse: 65,536 counts a block would be more than the scores
        return pa.table({"digit": digits, "rows": counts[digits]})

    def count(prefix: tuple[int, ...]) -> NDArray[np.int64]:
        total = np.zeros(1 << BITS, np.int64)
        for part in tables(scored.map_batches(counted, fn_args=(prefix,), batch_format="pyarrow", batch_size=None)):
            np.add.at(total, np.asarray(part["digit"]), np.asarray(part["rows"]))
        return total

    return cut_at(rows, keep, count)


def best_share(scored: ray.data.Dataset, rows: Rows, share: float, reason: str) -> Verdicts:
    """Verdicts over a materialised dataset of `row`, `score` that keep exactly the best `share`, rounded to rows."""
    keep = round(share * rows.count)
    cut = keep_best(scored, rows.count, keep)
    lowest = float("inf") if cut is None else cut.score
    rows.facts.update(kept=keep, lowest_score_kept=lowest if np.isfinite(lowest) else None)

    def by_cut(table: pa.Table) -> pa.Table:
        scores, ordinals = np.asarray(table["score"]), np.asarray(table["row"])
        keeps = np.zeros(len(scores), bool) if cut is None else cut.keeps(scores, ordinals)
        return judged(table, keeps, lowest, reason)

    return scored.map_batches(by_cut, batch_format="pyarrow", batch_size=None)


def judged(table: pa.Table, keeps: NDArray[np.bool_], lowest: float, reason: str) -> pa.Table:
    """A verdict for every row of `row`, `score`: dropped for `reason` where it is not kept."""
    scores = np.asarray(table["score"])
    reasons = [None if kept else reason for kept in keeps]
    what = [
        None if kept else f"score {score:.4f}, kept from {lowest:.4f}"
        for kept, score in zip(keeps, scores, strict=True)
    ]
    return verdicts(table["row"], drop=~keeps, reason=pa.array(reasons, pa.string()), what=what, score=scores)
