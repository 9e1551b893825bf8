"""Pair classification: does one threshold tell pairs that belong together from others (MTEB, 2023)?"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from rayemb.evaluate.encoders import Encoder, Side
from rayemb.evaluate.errors import EvaluateError
from rayemb.evaluate.metrics.pairs import Similarity, pair_classification, pair_similarities
from rayemb.evaluate.tasks import shown
from rayemb.evaluate.tasks.base import Found, Items, Means, Shown, Task, TaskConfig
from rayemb.evaluate.tasks.records import read
from rayemb.evaluate.tasks.vectors import diagnose, text_vectors


class PairClassificationConfig(TaskConfig):
    """Pairs of texts that are the same (1) or not (0): duplicates, paraphrases, entailment."""

    gives: ClassVar[frozenset[str]] = frozenset({"vectors", "texts"})
    kind: Literal["pair_classification"] = "pair_classification"
    data: str = Field(description="file of pairs: sentence1, sentence2, label (1 or 0)")
    columns: dict[str, str] = Field({}, description="what the file calls our columns")
    similarity: Similarity = Field("cosine", description="of a pair's vectors")
    side: Side = Field("text", description="as what the texts are encoded, where the model tells them apart")

    @property
    def metrics(self) -> tuple[str, ...]:
        """See `TaskConfig.metrics`."""
        return ("average_precision", "accuracy", "f1")

    @property
    def direction(self) -> str:
        """See `TaskConfig.direction`."""
        return "text↔text"

    def load(self, where: str) -> "PairClassification":
        """See `TaskConfig.load`."""
        rows = read(self.data, ("sentence1", "sentence2", "label"), columns=self.columns)
        a, b, labels = rows.texts("sentence1"), rows.texts("sentence2"), rows.integers("label")
        wrong = np.flatnonzero((labels != 0) & (labels != 1))
        if len(wrong):
            raise EvaluateError(f"label {labels[wrong[0]]} is neither 1 (same) nor 0", where=rows.where(int(wrong[0])))
        if len(np.unique(labels)) < 2:
            raise EvaluateError(f"all pairs have the label {labels[0]}: there is nothing to tell apart", where=rows.uri)
        return PairClassification(self, where, rows.digest, a, b, labels)

    def figures(self, columns: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
        """Average precision; accuracy and F1 at the best threshold of these very pairs, as the field reports them."""
        found = pair_classification(columns["similarity"], columns["label"].astype(np.int64))
        return {"average_precision": found.average_precision, "accuracy": found.accuracy, "f1": found.f1}


@dataclass(frozen=True)
class PairClassification(Task):
    """O(N D) time and memory."""

    config: PairClassificationConfig
    where: str
    digest: str
    a: list[str]
    b: list[str]
    labels: NDArray[np.int64]

    def run(self, encoder: Encoder, means: Means) -> Found:
        """See `Task.run`."""
        config = self.config
        x, y = (text_vectors(encoder, texts, self.where, kind=config.side) for texts in (self.a, self.b))
        similarity = pair_similarities(x, y, config.similarity)
        columns = {"similarity": similarity, "label": self.labels.astype(np.float64)}
        same = self.labels == 1
        look = Shown()
        if means.show:
            missed = np.where(same, similarity, -similarity)
            look = Shown(
                space=shown.space(x, means.map, means.seed, texts=self.a),
                similarities=shown.similarities(similarity[same], similarity[~same]),
                examples=tuple(
                    shown.text_example(
                        self.where,
                        config.direction,
                        self.a[row],
                        [(self.b[row], float(similarity[row]), bool(same[row]))],
                    )
                    # The worst of each class: the least alike that are the same, the most alike that are not.
                    for part in (np.flatnonzero(same), np.flatnonzero(~same))
                    for row in part[shown.worst(missed[part], shown.WORST // 2)]
                ),
            )
        return Found(
            Items([str(n) for n in range(len(x))], columns),
            len(x),
            look,
            diagnose(config.diagnosed, seed=means.seed, vectors=x, texts=self.a),
        )
