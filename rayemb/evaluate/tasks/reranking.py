"""Reranking: each query has its own candidates, some relevant; are those put first (MTEB, Muennighoff et al., 2023)?"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field, field_validator

from rayemb.evaluate.encoders import Encoder
from rayemb.evaluate.errors import EvaluateError
from rayemb.evaluate.exact import fixed_scores
from rayemb.evaluate.metrics.ir import Judgements, judge_lists
from rayemb.evaluate.metrics.lists import Ties
from rayemb.evaluate.tasks import shown
from rayemb.evaluate.tasks.base import Found, Items, Means, Shown, Task, TaskConfig
from rayemb.evaluate.tasks.records import read
from rayemb.evaluate.tasks.retrieval import checked_measures
from rayemb.evaluate.tasks.vectors import diagnose, text_vectors


class RerankingConfig(TaskConfig):
    """Queries with the texts that are relevant and those that are not; all of a query's candidates are ranked."""

    gives: ClassVar[frozenset[str]] = frozenset({"vectors", "texts"})
    kind: Literal["reranking"] = "reranking"
    data: str = Field(description="file of queries: query, positive (a list of texts), negative (a list of texts)")
    columns: dict[str, str] = Field({}, description="what the file calls our columns")
    measures: tuple[str, ...] = Field(("map", "mrr@10", "ndcg@10"), min_length=1, description="the main one first")
    ties: Ties = Field("worst", description="worst: against the model; trec, sbert: as those tools have it")

    _measures = field_validator("measures")(checked_measures)

    @property
    def metrics(self) -> tuple[str, ...]:
        """See `TaskConfig.metrics`."""
        return self.measures

    @property
    def direction(self) -> str:
        """See `TaskConfig.direction`."""
        return "query→candidates"

    def load(self, where: str) -> "Reranking":
        """See `TaskConfig.load`."""
        rows = read(self.data, ("query", "positive", "negative"), columns=self.columns)
        queries, positives, negatives = rows.texts("query"), rows.lists("positive"), rows.lists("negative")
        for row, (good, bad) in enumerate(zip(positives, negatives, strict=True)):
            if not good or not bad:
                raise EvaluateError(f"there is no {'negative' if good else 'positive'}", where=rows.where(row))
            candidates = [*good, *bad]
            if len(set(candidates)) < len(candidates):
                twice = next(text for at, text in enumerate(candidates) if text in candidates[:at])
                raise EvaluateError(f"candidate {twice[:60]!r} stands twice", where=rows.where(row))
        return Reranking(self, where, rows.digest, queries, positives, negatives)


@dataclass(frozen=True)
class Reranking(Task):
    """O(D) time a candidate; each distinct text is encoded once."""

    config: RerankingConfig
    where: str
    digest: str
    queries: list[str]
    positives: list[list[str]]
    negatives: list[list[str]]

    def run(self, encoder: Encoder, means: Means) -> Found:
        """See `Task.run`."""
        config = self.config
        texts = list(dict.fromkeys(text for part in (self.positives, self.negatives) for of in part for text in of))
        at = {text: row for row, text in enumerate(texts)}
        q_QD = text_vectors(encoder, self.queries, self.where, kind="query")
        c_MD = text_vectors(encoder, texts, self.where)
        lists = [[at[t] for t in (*good, *bad)] for good, bad in zip(self.positives, self.negatives, strict=True)]
        of = np.repeat(np.arange(len(lists)), [len(each) for each in lists])
        place = np.concatenate([np.arange(len(each)) for each in lists])
        ids_QK = np.full((len(lists), max(map(len, lists))), -1, np.int64)
        scores_QK = np.zeros(ids_QK.shape)
        ids_QK[of, place] = np.concatenate(lists)
        scores_QK[of, place] = fixed_scores(q_QD, c_MD, of, np.concatenate(lists))
        relevant = place < np.array([len(good) for good in self.positives])[of]
        judgements = Judgements.of(of, np.concatenate(lists), relevant.astype(np.int64), len(lists))
        judged = judge_lists(ids_QK, scores_QK, judgements, ties=config.ties, complete=True)
        columns = {name: judged.measure(name) for name in config.measures}
        look = Shown()
        if means.show:
            scores = scores_QK[of, place]
            look = Shown(
                space=shown.space(c_MD, means.map, means.seed, texts=texts),
                similarities=shown.similarities(scores[relevant], scores[~relevant]),
                examples=tuple(
                    shown.text_example(
                        self.where,
                        config.direction,
                        self.queries[q],
                        [
                            (texts[ids_QK[q, n]], float(scores_QK[q, n]), bool(n < len(self.positives[q])))
                            for n in np.argsort(-scores_QK[q, : len(lists[q])], kind="stable")[: shown.HITS]
                        ],
                    )
                    for q in shown.worst(columns[config.metrics[0]])
                ),
            )
        return Found(
            Items([str(n) for n in range(len(lists))], columns),
            len(texts),
            look,
            diagnose(config.diagnosed, seed=means.seed, vectors=c_MD, texts=texts),
        )
