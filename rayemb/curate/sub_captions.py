"""Sub-captions: long texts split to sentences or clauses (DreamLIP, Zheng et al., 2024; card S121)."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from rayemb.curate.base import Rows, Step, Verdicts, verdicts
from rayemb.curate.sentences import sub_captions, tokens


class SubCaptions(Step):
    """Edits: adds the sentences (or clauses) of a long text to the captions of its row, `texts`.

    The text itself stays. Nearly equal sentences are false negatives of each other and come in once. In scripts
    without spaces each letter counts as a word. One pass, no model.
    """

    name: Literal["sub_captions"] = "sub_captions"
    unit: Literal["sentence", "clause"] = Field("sentence", description="what a text is split to")
    limit: int = Field(6, ge=1, description="most sub-captions of one text, the first")
    min_words: int = Field(3, ge=1, description="shorter pieces are left out (clauses: not cut off)")
    max_overlap: float = Field(0.8, gt=0, le=1, description="share of words in common above which a piece repeats")

    def judge(self, rows: Rows) -> Verdicts:
        """A verdict with new `texts` for every row that has two sub-captions or more."""
        return rows.dataset(["text", "texts"]).map_batches(self._judge, batch_format="pyarrow", batch_size=None)

    def _judge(self, table: pa.Table) -> pa.Table:
        ordinals = np.asarray(table["row"])
        changed: list[int] = []
        new: list[list[str]] = []
        for at, (text, texts) in enumerate(zip(table["text"].to_pylist(), table["texts"].to_pylist(), strict=True)):
            parts = self.split(text)
            if len(parts) < 2:
                continue
            # The text leads: a corpus's `texts` holds every caption of the row.
            changed.append(at)
            new.append(list(dict.fromkeys([text, *(texts or []), *parts])))
        what = [f"{len(texts)} captions" for texts in new]
        # No reason: reasons count what is dropped.
        return verdicts(ordinals[changed], drop=False, what=what, score=[float(len(t)) for t in new], new_texts=new)

    def split(self, text: str) -> list[str]:
        """The sub-captions of one text."""
        words = len(tokens(text))
        if words < 2 * self.min_words:
            return []
        by_clause = self.unit == "clause"
        return sub_captions(
            text, limit=self.limit, min_words=self.min_words, by_clause=by_clause, max_overlap=self.max_overlap
        )
