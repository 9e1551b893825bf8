"""Learned quality: a scorer trained on preferences (Compress & Align, Zhang et al., 2023; card S147).

Verified from the paper's abstract and outline (arXiv 2312.06726; renamed Filter & Align): several captions an item,
preferences over them, a reward model on those, the corpus filtered by it down to a tenth. The pairwise loss and its
MLP come from the card. The paper's preferences are human and its scorer reads the pair with a fused encoder; here
preferences are weak (own caption > shuffled > half its words > another item's) and the scorer reads a frozen
encoder's two vectors.
"""

from __future__ import annotations

import logging
from typing import Literal

import numpy as np
import pyarrow as pa
import ray
from pydantic import Field

from rayemb import storage
from rayemb.curate.base import Rows, Verdicts
from rayemb.curate.preference import LEVELS, Judge, fit_judge, ranked_right, weak_captions
from rayemb.curate.ranking import best_share
from rayemb.curate.sentences import tokens
from rayemb.curate.vectors import QUERY_VECTOR, TEXT_VECTOR, EncoderStep, collected, matrix

_log = logging.getLogger(__name__)
SCORER = "scorer.safetensors"


class LearnedQuality(EncoderStep):
    """Drops all but the best share of the pairs by a scorer that is trained here, on preferences between captions.

    Choose it over `alignment` where texts are garbled as well as misplaced; read `ranked_right` in the report before
    trusting it. The scorer is kept beside the verdicts. Two passes of the encoder: a sample with four captions an
    item, then every pair.
    """

    name: Literal["learned_quality"] = "learned_quality"
    keep_fraction: float = Field(ge=0, le=1, description="share of the rows that is kept, the best")
    train_rows: int = Field(5000, ge=50, description="items that the scorer is trained and tested on, a sample")
    held_out: float = Field(0.2, gt=0, lt=1, description="share of those items that it is tested on")
    hidden: int = Field(256, ge=1, description="width of the scorer")
    epochs: int = Field(10, ge=1, description="passes over the sample")
    learning_rate: float = Field(1e-3, gt=0, description="of AdamW")
    length_control: bool = Field(True, description="take out what scores owe to the length of the text")

    def judge(self, rows: Rows) -> Verdicts:
        """A verdict for every row; the score is the scorer's."""
        judge = self._fitted(rows)
        if rows.folder:
            data = judge.to_bytes(model=self.model, seed=rows.seed)
            storage.write_bytes(storage.join(rows.folder, SCORER), data)
        held = ray.put(judge)

        def scored(table: pa.Table) -> pa.Table:
            words = np.array([len(tokens(text)) for text in table["text"].to_pylist()], np.int64)
            scores = ray.get(held).scores(matrix(table, QUERY_VECTOR), matrix(table, TEXT_VECTOR), words)
            return pa.table({"row": table["row"], "score": scores})

        pairs = self.vectors(rows, keep=["text"])
        scores = pairs.map_batches(scored, batch_format="pyarrow", batch_size=None).materialize()
        return best_share(scores, rows, self.keep_fraction, "low_quality")

    def _fitted(self, rows: Rows) -> Judge:
        share = min(1.0, self.train_rows / max(1, rows.count))
        sample = collected(self.vectors(rows, ["query"], keep=["text"], share=share), ["row", "text", QUERY_VECTOR])
        texts, rng = sample["text"].to_pylist(), np.random.default_rng(rows.seed)
        others = _others(texts, rng)
        levels = [weak_captions(text, other, rng) for text, other in zip(texts, others, strict=True)]
        flat = [caption or text for text, captions in zip(texts, levels, strict=True) for caption in captions]
        valid = np.array([[caption is not None for caption in captions] for captions in levels])
        words = np.array([len(tokens(caption)) for caption in flat], np.int64).reshape(-1, len(LEVELS))
        captions = self.text_vectors(flat).reshape(len(texts), len(LEVELS), -1)
        queries = matrix(sample, QUERY_VECTOR)
        order = rng.permutation(len(texts))
        test, train = np.split(order, [max(1, round(self.held_out * len(order)))])
        judge = fit_judge(
            queries[train],
            captions[train],
            valid[train],
            words[train],
            hidden=self.hidden,
            epochs=self.epochs,
            batch=64,
            rate=self.learning_rate,
            seed=rows.seed,
            length_control=self.length_control,
        )
        right = ranked_right(judge, queries[test], captions[test], valid[test], words[test])
        rows.facts.update(trained_on=len(train), tested_on=len(test), ranked_right=right)
        if not right["all"] > 0.75:
            _log.warning(
                "the scorer orders %.0f %% of the held-out preferences: little to choose by", 100 * right["all"]
            )
        return judge


def _others(texts: list[str], rng: np.random.Generator) -> list[str]:
    """For each text one of another item, of a similar length: length must not tell the wrong caption."""
    order = np.lexsort((rng.permutation(len(texts)), np.array([len(tokens(text)) for text in texts])))
    others = [""] * len(texts)
    for place, at in enumerate(order):
        others[at] = texts[order[(place + 1) % len(order)]]
    return others
