"""Noisy correspondence: mismatched pairs by their losses, pseudo-captions (PC2, Duan et al., 2024; card S132).

Of the method the data part: the split into clean and noisy pairs, the soft margin, pseudo-captions by pseudo-classes.
The paper trains a head for the classes and refits at every epoch; here the classes are k-means prototypes of a given
encoder's vectors, and the fit is one.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray
import ray.data
from pydantic import Field

from rayemb.curate.base import Rows, Verdicts, verdicts
from rayemb.curate.clusters import centroids_of
from rayemb.curate.draw import uniform_of
from rayemb.curate.mixture import Split, fit_split, nearest_clean, pair_losses, pseudo_classes, soft_margin
from rayemb.curate.vectors import QUERY_VECTOR, TEXT_VECTOR, EncoderStep, collected, matrix

KEYS = ("query_key", "text_key", "concept_key")


class NoisyCorrespondence(EncoderStep):
    """Drops, scores or repairs (edits `text`) the pairs that a mixture of two Gaussians over the losses calls noisy.

    Choose a model that has not memorised the pairs (an early checkpoint). A corpus without noise has no second mode:
    the fit then halves one, which `min_separation` prevents. Repair gives a noisy image the text of the clean pair
    with the most similar distribution over `prototypes`; where none is similar, the pair is dropped. One encoder
    pass; memory of the driver O(references + fit_rows + pool).
    """

    name: Literal["noisy_correspondence"] = "noisy_correspondence"
    mode: Literal["drop", "score", "repair"] = Field("drop", description="what becomes of noisy pairs")
    measure: Literal["loss", "similarity"] = Field(
        "loss", description="InfoNCE against references, or minus the cosine"
    )
    threshold: float = Field(0.5, ge=0, le=1, description="pairs that are clean with a lower probability are noisy")
    temperature: float = Field(0.07, gt=0, description="of the loss")
    references: int = Field(1024, ge=2, description="pairs that the loss is taken against")
    fit_rows: int = Field(100_000, ge=10, description="pairs that the mixture is fitted on, a sample")
    min_separation: float = Field(
        2.0, ge=0, description="Ashman's D below which there is one mode, all clean (digits: 1.4 clean, 2.7 noisy)"
    )
    score: Literal["probability", "margin"] = Field(
        "probability", description="mode score: what `score` becomes, or the soft margin 0.2 (10^p - 1) / 9"
    )
    prototypes: int = Field(128, ge=2, description="repair: pseudo-classes")
    prototype_temperature: float = Field(0.1, gt=0, description="repair: of the softmax over pseudo-classes")
    pool: int = Field(20_000, ge=1, description="repair: clean pairs that may lend their text, a sample")
    min_cosine: float = Field(
        0.5, ge=0, le=1, description="repair: distributions less similar than this repair nothing"
    )

    def judge(self, rows: Rows) -> Verdicts:
        """A verdict for every row; the score is the probability of being clean."""
        vectors = self.vectors(rows, keep=(*KEYS, "text")).materialize()
        losses = self._losses(vectors, rows).materialize()
        sample = collected(_drawn(losses, self.fit_rows / max(1, rows.count), rows.seed), ["row", "loss"])
        split = fit_split(np.asarray(sample["loss"]), seed=rows.seed)
        rows.facts.update(separation=None, noisy_share=0.0)
        if split is not None:
            rows.facts.update(separation=split.separation, noisy_share=split.shares[1], mean_losses=list(split.means))
        if split is None or split.separation < self.min_separation:
            rows.facts["noisy_share"] = 0.0
            split = None
        pool = self._pool(losses, split, rows) if split is not None and self.mode == "repair" else None
        held = ray.put(pool)

        def judge(table: pa.Table) -> pa.Table:
            return self._judge(table, split, ray.get(held))

        return losses.map_batches(judge, batch_format="pyarrow", batch_size=None)

    def _losses(self, vectors: ray.data.Dataset, rows: Rows) -> ray.data.Dataset:
        share = 1.5 * self.references / max(1, rows.count)  # some more, then the first of the draw: exactly that many
        drawn = collected(_drawn(vectors, share, rows.seed), ["row", *KEYS, QUERY_VECTOR, TEXT_VECTOR])
        order = np.argsort(uniform_of(np.asarray(drawn["row"]), rows.seed), kind="stable")[: self.references]
        drawn = drawn.take(pa.array(np.sort(order)))
        queries, texts = matrix(drawn, QUERY_VECTOR), matrix(drawn, TEXT_VECTOR)
        against = ray.put((queries, texts, {name: np.asarray(drawn[name]) for name in KEYS}))

        def measured(table: pa.Table) -> pa.Table:
            query, text = matrix(table, QUERY_VECTOR), matrix(table, TEXT_VECTOR)
            if self.measure == "similarity":
                loss = -(query * text).sum(1)
            else:
                queries, texts, keys = ray.get(against)
                same = np.zeros((len(table), len(queries)), bool)
                for name in KEYS:
                    same |= np.asarray(table[name])[:, None] == keys[name]
                loss = pair_losses(query, text, queries, texts, same, temperature=self.temperature)
            columns = ["row", "text", QUERY_VECTOR] if self.mode == "repair" else ["row"]
            return table.select(columns).append_column("loss", pa.array(loss))

        return vectors.map_batches(measured, batch_format="pyarrow", batch_size=None)

    def _pool(self, losses: ray.data.Dataset, split: Split, rows: Rows) -> dict[str, Any]:
        clean = losses.map_batches(
            lambda table: table.filter(pa.array(self._clean(table, split) >= self.threshold)),
            batch_format="pyarrow",
            batch_size=None,
        )
        drawn = _drawn(clean, self.pool / max(1, rows.count), rows.seed)
        table = collected(drawn, ["row", "text", QUERY_VECTOR])
        vectors = matrix(table, QUERY_VECTOR)
        prototypes = centroids_of(vectors, self.prototypes, seed=rows.seed)
        classes = pseudo_classes(vectors, prototypes, self.prototype_temperature)
        texts = table["text"].to_pylist()
        return {"rows": np.asarray(table["row"]), "texts": texts, "prototypes": prototypes, "classes": classes}

    def _clean(self, table: pa.Table, split: Split | None) -> np.ndarray:
        losses = np.asarray(table["loss"])
        return np.ones(len(losses)) if split is None else split.clean_probability(losses)

    def _judge(self, table: pa.Table, split: Split | None, pool: dict[str, Any] | None) -> pa.Table:
        clean = self._clean(table, split)
        ordinals, noisy = np.asarray(table["row"]), clean < self.threshold
        if self.mode == "score":
            new = soft_margin(clean) if self.score == "margin" else clean
            return verdicts(ordinals, drop=False, score=clean.astype(np.float32), new_score=new.astype(np.float32))
        said = [f"clean with probability {p:.3f}" for p in clean]
        if self.mode == "drop" or pool is None:
            reason = pa.array(["noisy_pair" if n else None for n in noisy], pa.string())
            what = [text if n else None for text, n in zip(said, noisy, strict=True)]
            return verdicts(ordinals, drop=noisy, reason=reason, what=what, score=clean.astype(np.float32))
        return self._repaired(table, clean, noisy, pool)

    def _repaired(self, table: pa.Table, clean: np.ndarray, noisy: np.ndarray, pool: dict[str, Any]) -> pa.Table:
        at = np.flatnonzero(noisy)
        vectors = matrix(table, QUERY_VECTOR)[at] if len(at) else np.zeros((0, pool["prototypes"].shape[1]), np.float32)
        classes = pseudo_classes(vectors, pool["prototypes"], self.prototype_temperature) if len(at) else None
        nearest, cosine = nearest_clean(classes, pool["classes"]) if classes is not None else (at, np.zeros(0))
        count = len(table)
        texts = table["text"].to_pylist()
        columns: dict[str, list[Any]] = {
            name: [None] * count for name in ("reason", "what", "partner", "new_text", "new_texts", "new_score")
        }
        drop = np.zeros(count, bool)
        for place, source, close in zip(at.tolist(), nearest.tolist(), cosine.tolist(), strict=True):
            drop[place] = close < self.min_cosine
            columns["partner"][place] = int(pool["rows"][source])
            if drop[place]:
                columns["reason"][place] = "no_pseudo_caption"
                columns["what"][place] = f"noisy ({clean[place]:.3f} clean), the nearest clean pair at {close:.3f}"
            else:
                new = pool["texts"][source]
                columns["what"][place] = f"noisy ({clean[place]:.3f} clean); was: {texts[place]}"
                columns["new_text"][place], columns["new_texts"][place] = new, [new]
                columns["new_score"][place] = close
        return verdicts(table["row"], drop=drop, score=clean.astype(np.float32), **columns)


def _drawn(dataset: ray.data.Dataset, share: float, seed: int) -> ray.data.Dataset:
    """A sample by the ordinals, of about `share` of the rows."""
    if share >= 1:
        return dataset
    return dataset.map_batches(
        lambda table: table.filter(pa.array(uniform_of(np.asarray(table["row"]), seed) < share)),
        batch_format="pyarrow",
        batch_size=None,
    )
