"""Language filter by py3langid, naive Bayes over byte n-grams (langid.py, Lui & Baldwin, 2012)."""

from __future__ import annotations

import functools
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, field_validator

from rayemb.curate.base import Rows, Step, Verdicts, verdicts


class Language(Step):
    """Drops rows whose text is in none of the languages to keep.

    The score is the probability that the text is in one of them. A few words don't tell their language, so short
    texts have a policy of their own. One pass, O(rows), no shuffle.
    """

    name: Literal["language"] = "language"
    column: Literal["text", "query"] = Field("text", description="the column that is judged")
    keep: list[str] = Field(["en"], min_length=1, description="languages that stay, ISO 639-1 codes")
    # py3langid spreads the probability of a caption over many languages. Names of emoji of 30 characters or more:
    # 0.05 drops 0.2 % of the English ones and 99 % of the German, 0.2 already 12 % of the English.
    min_probability: float = Field(
        0.05, gt=0, le=1, description="texts with a lower probability of being in a kept language are dropped"
    )
    short_chars: int = Field(20, ge=0, description="texts with fewer letters than this are short")
    short: Literal["keep", "drop", "judge"] = Field("keep", description="what becomes of short texts")

    @field_validator("keep")
    @classmethod
    def _known(cls, value: list[str]) -> list[str]:
        known = sorted(_identifier().labels)
        if unknown := sorted(set(value) - set(known)):
            raise ValueError(f"unknown language {', '.join(unknown)}; known: {', '.join(known)}")
        return value

    def judge(self, rows: Rows) -> Verdicts:
        """A verdict for every row; short texts have no score unless they are judged."""
        return rows.dataset([self.column]).map_batches(self._judge, batch_format="pyarrow", batch_size=None)

    def _judge(self, table: pa.Table) -> pa.Table:
        out: dict[str, list[Any]] = {"drop": [], "reason": [], "what": [], "score": []}
        for text in table[self.column].to_pylist():
            text = text or ""
            letters = sum(map(str.isalpha, text))
            if letters < self.short_chars and self.short != "judge":
                drop = self.short == "drop"
                said = ("short_text", f"{letters} letters, too few to tell the language") if drop else (None, None)
                verdict = (drop, *said, None)
            else:
                ranks = dict(_identifier().rank(text))
                score = float(sum(ranks[language] for language in self.keep))
                drop = score < self.min_probability
                best = max(ranks, key=lambda name: ranks[name])
                reason = "uncertain" if best in self.keep else best
                said = (reason, f"looks like {best} ({ranks[best]:.2f})") if drop else (None, None)
                verdict = (drop, *said, score)
            for column, value in zip(out.values(), verdict, strict=True):
                column.append(value)
        return verdicts(table["row"], **{**out, "drop": np.array(out["drop"], bool)})


@functools.cache
def _identifier() -> Any:
    # 0.7 s and 30 MB: once a process, and only in processes that judge.
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
