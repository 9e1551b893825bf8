"""Length filter: texts within limits of characters and words (ALIGN, Jia et al., 2021; card S101)."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, model_validator

from rayemb.curate.base import Rows, Step, Verdicts, verdicts
from rayemb.curate.sentences import tokens


class Length(Step):
    """Drops rows whose text is too short or too long, in words or in characters.

    The default is ALIGN's rule, 3 to 20 words. In scripts without spaces each letter counts as a word. One pass,
    O(rows), no shuffle.
    """

    name: Literal["length"] = "length"
    column: Literal["text", "query"] = Field("text", description="the column that is measured")
    min_words: int | None = Field(3, ge=1, description="fewer words are dropped; null: no limit")
    max_words: int | None = Field(20, ge=1, description="more words are dropped; null: no limit")
    min_chars: int | None = Field(None, ge=1, description="fewer characters are dropped; null: no limit")
    max_chars: int | None = Field(None, ge=1, description="more characters are dropped; null: no limit")

    @model_validator(mode="after")
    def _limits(self) -> Length:
        for unit, low, high in (("words", self.min_words, self.max_words), ("chars", self.min_chars, self.max_chars)):
            if low is not None and high is not None and low > high:
                raise ValueError(f"min_{unit} {low} is above max_{unit} {high}: nothing would stay")
        if (self.min_words, self.max_words, self.min_chars, self.max_chars) == (None,) * 4:
            raise ValueError("give at least one limit")
        return self

    def judge(self, rows: Rows) -> Verdicts:
        """A verdict for every row; the score is the number of words."""
        return rows.dataset([self.column]).map_batches(self._judge, batch_format="pyarrow", batch_size=None)

    def _judge(self, table: pa.Table) -> pa.Table:
        texts = [text or "" for text in table[self.column].to_pylist()]
        words = np.array([len(tokens(text)) for text in texts], np.int64)
        chars = np.array([len(text) for text in texts], np.int64)
        reason = np.full(len(texts), None, object)
        what = np.full(len(texts), None, object)
        for unit, counts, low, high in (
            ("words", words, self.min_words, self.max_words),
            ("characters", chars, self.min_chars, self.max_chars),
        ):
            for name, bad, limit in (("few", low and counts < low, low), ("many", high and counts > high, high)):
                for at in np.flatnonzero((reason == None) & bad) if limit else ():  # noqa: E711
                    reason[at] = f"{name}_{unit}"
                    what[at] = f"{counts[at]:,} {unit}, {'under' if name == 'few' else 'over'} {limit:,}"
        reasons = pa.array(reason.tolist(), pa.string())
        return verdicts(
            table["row"], drop=pc.is_valid(reasons), reason=reasons, what=what.tolist(), score=words.astype(np.float32)
        )
