"""Classification of frozen vectors: a linear probe (Radford et al., 2021), naive Bayes (S017), nearest neighbours."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from rayemb.evaluate.encoders import Encoder, Side
from rayemb.evaluate.errors import EvaluateError
from rayemb.evaluate.metrics import knn_hits
from rayemb.evaluate.metrics.probes import STRENGTHS, bayes_probe, linear_probe
from rayemb.evaluate.tasks import shown
from rayemb.evaluate.tasks.base import Found, Items, Means, Shown, Task, TaskConfig
from rayemb.evaluate.tasks.labelled import Labelled, LabelledData
from rayemb.evaluate.tasks.records import joined_digest
from rayemb.evaluate.tasks.vectors import diagnose

Method = Literal["probe", "knn", "bayes"]
BLOCK_BYTES = 64 << 20


class ClassificationConfig(TaskConfig):
    """Classes of test items from those of training items; nothing of the encoder is trained."""

    gives: ClassVar[frozenset[str]] = frozenset({"vectors", "labels"})
    kind: Literal["classification"] = "classification"
    train: LabelledData = Field(description="labelled items that the probes are fitted to")
    test: LabelledData = Field(description="labelled items that are judged")
    methods: tuple[Method, ...] = Field(("probe", "knn"), min_length=1, description="the main one first")
    strengths: tuple[float, ...] = Field(
        STRENGTHS, min_length=1, description="C of the linear probe: the best on a fifth of the training items is taken"
    )
    k: int = Field(20, ge=1, description="neighbours")
    side: Side = Field("text", description="as what texts are encoded, where the model tells them apart")

    @property
    def metrics(self) -> tuple[str, ...]:
        """See `TaskConfig.metrics`."""
        return (*(f"{each}_accuracy" for each in self.methods), f"{self.methods[0]}_per_class")

    @property
    def direction(self) -> str:
        """See `TaskConfig.direction`."""
        return f"{self.test.input}→class"

    def load(self, where: str) -> "Classification":
        """See `TaskConfig.load`."""
        train, test = self.train.load(f"{where}.train"), self.test.load(f"{where}.test")
        known = set(train.labels)
        for row, label in enumerate(test.labels):
            if label not in known:
                raise EvaluateError(f"label {label!r} has no training item", where=f"{test.uri}, {test.names[row]}")
        return Classification(self, where, joined_digest(train.digest, test.digest), train, test)

    def figures(self, columns: Mapping[str, NDArray[np.float64]]) -> dict[str, float]:
        """Accuracies over items, and of the main method the mean over the classes' own."""
        _, at = np.unique(columns["label"], return_inverse=True)
        means = {f"{each}_accuracy": float(columns[f"{each}_accuracy"].mean()) for each in self.methods}
        within = np.bincount(at, weights=columns[f"{self.methods[0]}_accuracy"]) / np.bincount(at)
        return {**means, f"{self.methods[0]}_per_class": float(within.mean())}


@dataclass(frozen=True)
class Classification(Task):
    """Memory O((N + Q) D) and a block of similarities."""

    config: ClassificationConfig
    where: str
    digest: str
    train: Labelled
    test: Labelled

    def run(self, encoder: Encoder, means: Means) -> Found:
        """See `Task.run`."""
        config = self.config
        x_ND = self.train.vectors(encoder, self.where, config.side)
        x_QD = self.test.vectors(encoder, self.where, config.side)
        names, labels = self.train.numbers
        number = {name: at for at, name in enumerate(names)}
        labels_q = np.array([number[label] for label in self.test.labels], np.int64)

        def hits(method: Method) -> NDArray[np.float64]:
            if method == "bayes":
                return bayes_probe(x_ND, labels, x_QD, labels_q)
            if method == "knn":
                block = max(1, BLOCK_BYTES // (8 * len(x_ND)))
                return knn_hits(x_QD, x_ND, labels_q, labels, k=config.k, block=block)
            return linear_probe(x_ND, labels, x_QD, labels_q, strengths=config.strengths, seed=means.seed).hits

        columns = {f"{method}_accuracy": hits(method) for method in config.methods}
        look = Shown()
        if means.show:
            look = Shown(
                space=shown.space(x_QD, means.map, means.seed, **self.test.look),
                similarities=shown.class_similarities(x_QD, labels_q, means.seed),
                confusion=shown.confusion(x_QD, labels_q, names, means.seed),
            )
        return Found(
            Items([str(n) for n in range(len(x_QD))], {**columns, "label": labels_q.astype(np.float64)}),
            len(names),
            look,
            diagnose(config.diagnosed, seed=means.seed, vectors=x_QD, labels=labels_q),
        )
