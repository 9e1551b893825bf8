"""Semantic textual similarity: do cosines follow the scores that people gave to pairs (Agirre et al., 2012)?"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from rayemb.evaluate.encoders import Encoder, Side
from rayemb.evaluate.errors import EvaluateError
from rayemb.evaluate.metrics import correlation
from rayemb.evaluate.metrics.pairs import Similarity, pair_similarities
from rayemb.evaluate.report import Example
from rayemb.evaluate.tasks import shown
from rayemb.evaluate.tasks.base import Found, Items, Means, Shown, Task, TaskConfig
from rayemb.evaluate.tasks.records import read
from rayemb.evaluate.tasks.vectors import diagnose, text_vectors


class STSConfig(TaskConfig):
    """Pairs of texts with a score each."""

    gives: ClassVar[frozenset[str]] = frozenset({"vectors", "pairs", "texts"})
    kind: Literal["sts"] = "sts"
    data: str = Field(description="file of pairs: sentence1, sentence2, score")
    columns: dict[str, str] = Field({}, description="what the file calls our columns")
    similarity: Similarity = Field("cosine", description="of a pair's vectors")
    side: Side = Field("text", description="as what the texts are encoded, where the model tells them apart")

    @property
    def metrics(self) -> tuple[str, ...]:
        """See `TaskConfig.metrics`."""
        return ("spearman", "pearson")

    @property
    def direction(self) -> str:
        """See `TaskConfig.direction`."""
        return "text↔text"

    def load(self, where: str) -> "STS":
        """See `TaskConfig.load`."""
        rows = read(self.data, ("sentence1", "sentence2", "score"), columns=self.columns)
        a, b, scores = rows.texts("sentence1"), rows.texts("sentence2"), rows.numbers("score")
        if np.ptp(scores) == 0:
            raise EvaluateError(f"all scores are {scores[0]:g}: nothing can follow them", where=rows.uri)
        return STS(self, where, rows.digest, a, b, scores)

    def figures(self, columns: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
        """See `TaskConfig.figures`."""
        return correlation(columns["similarity"], columns["score"])._asdict()


@dataclass(frozen=True)
class STS(Task):
    """O(N D) time and memory."""

    config: STSConfig
    where: str
    digest: str
    a: list[str]
    b: list[str]
    scores: NDArray[np.float64]

    def run(self, encoder: Encoder, means: Means) -> Found:
        """See `Task.run`."""
        config = self.config
        x, y = (text_vectors(encoder, texts, self.where, kind=config.side) for texts in (self.a, self.b))
        similarity = pair_similarities(x, y, config.similarity)
        items = Items([str(n) for n in range(len(x))], {"similarity": similarity, "score": self.scores})
        return Found(
            items,
            len(x),
            self._shown(x, similarity, means) if means.show else Shown(),
            diagnose(config.diagnosed, seed=means.seed, vectors=x, pairs=y, texts=self.a),
        )

    def _shown(self, x: NDArray[np.float32], similarity: NDArray[np.float64], means: Means) -> Shown:
        low, high = np.quantile(self.scores, [0.25, 0.75])
        return Shown(
            space=shown.space(x, means.map, means.seed, texts=self.a),
            # The quarter that people found most alike, and the quarter that they found least alike.
            similarities=shown.similarities(similarity[self.scores >= high], similarity[self.scores <= low])
            if low < high
            else None,
            examples=self._worst(similarity),
        )

    def _worst(self, similarity: NDArray[np.float64]) -> tuple[Example, ...]:
        """The pairs whose place by similarity is farthest from their place by score."""
        from scipy.stats import rankdata  # most of a second

        ours, theirs = rankdata(similarity) / len(similarity), rankdata(self.scores) / len(self.scores)
        return tuple(
            shown.text_example(
                self.where,
                self.config.direction,
                self.a[row],
                [(f"{self.b[row]} (score {self.scores[row]:g})", float(similarity[row]), bool(theirs[row] > 0.5))],
            )
            for row in shown.worst(-np.abs(ours - theirs))
        )
