"""Clustering: do clusters found without labels agree with people's classes (MTEB, Muennighoff et al., 2023)?"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from rayemb.evaluate.encoders import Encoder, Side
from rayemb.evaluate.errors import EvaluateError
from rayemb.evaluate.metrics.clustering import cluster_scores, kmeans_clusters
from rayemb.evaluate.tasks import shown
from rayemb.evaluate.tasks.base import Found, Items, Means, Shown, Task, TaskConfig
from rayemb.evaluate.tasks.labelled import Labelled, LabelledData
from rayemb.evaluate.tasks.vectors import diagnose

Measure = Literal["v_measure", "nmi", "ami", "ari", "accuracy", "purity", "homogeneity", "completeness"]


class ClusteringConfig(TaskConfig):
    """k-means of the vectors, with as many clusters as there are classes."""

    gives: ClassVar[frozenset[str]] = frozenset({"vectors", "labels"})
    kind: Literal["clustering"] = "clustering"
    data: LabelledData = Field(description="labelled items")
    measures: tuple[Measure, ...] = Field(
        ("v_measure", "ami", "accuracy"), min_length=1, description="the main one first; accuracy by Hungarian matching"
    )
    starts: int = Field(10, ge=1, description="of k-means, of which the best is taken")
    side: Side = Field("text", description="as what texts are encoded, where the model tells them apart")

    @property
    def metrics(self) -> tuple[str, ...]:
        """See `TaskConfig.metrics`."""
        return self.measures

    @property
    def direction(self) -> str:
        """See `TaskConfig.direction`."""
        return f"{self.data.input}→cluster"

    def load(self, where: str) -> "Clustering":
        """See `TaskConfig.load`."""
        data = self.data.load(f"{where}.data")
        classes = len(set(data.labels))
        if classes == len(data):
            raise EvaluateError(f"each of the {classes:,} items has a label of its own", where=f"{where}: {data.uri}")
        return Clustering(self, where, data.digest, data)

    def figures(self, columns: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
        """Of the clustering that was found; drawing items again does not cluster them again."""
        found = cluster_scores(columns["label"].astype(np.int64), columns["assigned"].astype(np.int64))
        return {name: float(getattr(found, name)) for name in self.measures}


@dataclass(frozen=True)
class Clustering(Task):
    """Memory O(N D)."""

    config: ClusteringConfig
    where: str
    digest: str
    data: Labelled

    def run(self, encoder: Encoder, means: Means) -> Found:
        """See `Task.run`."""
        config = self.config
        x_ND = self.data.vectors(encoder, self.where, config.side)
        names, labels = self.data.numbers
        assigned = kmeans_clusters(x_ND, len(names), seed=means.seed, n_init=config.starts)
        look = Shown()
        if means.show:
            look = Shown(
                space=shown.space(x_ND, means.map, means.seed, **self.data.look),
                similarities=shown.class_similarities(x_ND, labels, means.seed),
                confusion=shown.confusion(x_ND, labels, names, means.seed),
            )
        return Found(
            Items(
                [str(n) for n in range(len(x_ND))],
                {"label": labels.astype(np.float64), "assigned": assigned.astype(np.float64)},
            ),
            len(names),
            look,
            diagnose(config.diagnosed, seed=means.seed, vectors=x_ND, labels=labels),
        )
