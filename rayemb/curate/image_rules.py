"""Rules over images: size, shape, and how many texts share one (ALIGN, Jia et al., 2021; card S101)."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from rayemb.curate.base import Rows, Step, Verdicts, joined, runs, together, verdicts
from rayemb.curate.exact_duplicates import check_content
from rayemb.models import decode_image


class ImageRules(Step):
    """Drops small and elongated images, and those that very many different texts go with.

    The defaults are ALIGN's. Size and shape: one pass that decodes, O(rows). Shared images: one shuffle of 24 bytes a
    row; all rows of such an image are dropped, and what is left depends on the rows before it, as with every rule on
    frequencies. Equal images are equal byte by byte.
    """

    name: Literal["image_rules"] = "image_rules"
    min_side: int | None = Field(200, ge=1, description="a shorter side of fewer pixels is dropped; null: any")
    max_aspect: float | None = Field(
        3.0, ge=1, description="longer side over shorter side, above is dropped; null: any"
    )
    min_pixels: int | None = Field(None, ge=1, description="fewer pixels (width x height) are dropped; null: any")
    max_texts: int | None = Field(1000, ge=1, description="images with more different texts are dropped; null: any")

    def judge(self, rows: Rows) -> Verdicts:
        """Verdicts for rows that break a rule, and for all others the shorter side as score."""
        check_content("image", rows, "curate.image_rules")
        found = []
        if (self.min_side, self.max_aspect, self.min_pixels) != (None, None, None):
            limits = rows.corpus.image_limits

            def judge(table: pa.Table) -> pa.Table:
                sizes = [decode_image(data, limits).size for data in table["image"].to_pylist()]
                return self._shapes(np.asarray(table["row"]), np.array(sizes, np.int64).reshape(-1, 2))

            found.append(rows.dataset(["image"]).map_batches(judge, batch_format="pyarrow", batch_size=256))
        if self.max_texts is not None:
            keys = rows.dataset(["query_key", "text_key"])
            judge_shared = Shared(
                "query_key", "text_key", self.max_texts, "shared_image", "{:,} texts go with the image"
            )
            found.append(together(keys, "query_key", judge_shared, rows=rows.count))
        return joined(found) if found else [verdicts(row=[])]

    def _shapes(self, rows: Any, sizes: Any) -> pa.Table:
        short, long = sizes.min(axis=1), sizes.max(axis=1)
        reasons: list[tuple[str | None, str | None]] = []
        for (width, height), low, high in zip(sizes.tolist(), short.tolist(), long.tolist(), strict=True):
            shape = f"{width} x {height} pixels"
            if self.min_side and low < self.min_side:
                reasons.append(("small_side", f"{shape}: the shorter side is under {self.min_side}"))
            elif self.max_aspect and high > self.max_aspect * low:
                reasons.append(("elongated", f"{shape}: {high / low:.1f} times as long as wide"))
            elif self.min_pixels and width * height < self.min_pixels:
                reasons.append(("few_pixels", f"{shape}: fewer than {self.min_pixels:,}"))
            else:
                reasons.append((None, None))
        return verdicts(
            row=rows,
            drop=np.array([reason is not None for reason, _ in reasons], bool),
            reason=[reason for reason, _ in reasons],
            what=[what for _, what in reasons],
            score=short.astype(np.float32),
        )


class Shared:
    """Drops all rows whose `key` goes with more than `limit` different values of `other`; for `together`."""

    def __init__(self, key: str, other: str, limit: int, reason: str, what: str) -> None:
        self.key, self.other, self.limit, self.reason, self.what = key, other, limit, reason, what

    def __call__(self, table: pa.Table) -> pa.Table:
        """Verdicts over one bucket."""
        keys, others, rows = (np.asarray(table[name]) for name in (self.key, self.other, "row"))
        order = np.lexsort((rows, others, keys))
        keys, others, rows = keys[order], others[order], rows[order]
        starts = runs(keys)
        fresh = np.ones(len(keys), np.int64)
        fresh[1:] = (keys[1:] != keys[:-1]) | (others[1:] != others[:-1])
        counts = np.add.reduceat(fresh, starts[:-1]) if len(keys) else fresh
        counts = np.repeat(counts, np.diff(starts))
        many = counts > self.limit
        what = [self.what.format(count) + f", over {self.limit:,}" for count in counts[many].tolist()]
        return verdicts(row=rows[many], reason=self.reason, what=what)
