"""Zero-shot classification of pictures or texts by the names of their classes, in sentences (Radford et al., 2021)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from rayemb.evaluate.config import Templates
from rayemb.evaluate.encoders import Encoder
from rayemb.evaluate.metrics.zero_shot import class_vectors, fill_templates, zero_shot
from rayemb.evaluate.tasks import shown
from rayemb.evaluate.tasks.base import Found, Items, Means, Shown, Task, TaskConfig
from rayemb.evaluate.tasks.labelled import Labelled, LabelledData
from rayemb.evaluate.tasks.vectors import diagnose, text_vectors


class ZeroShotConfig(TaskConfig):
    """The class whose sentences' mean vector is nearest; every class of the data is a choice."""

    gives: ClassVar[frozenset[str]] = frozenset({"vectors", "labels", "pairs"})
    kind: Literal["zero_shot"] = "zero_shot"
    data: LabelledData = Field(description="items, labelled with the names of their classes")
    templates: Templates = Field(("{}",), min_length=1, description="texts with {} for the name; an ensemble")
    names: dict[str, str] = Field({}, description="label: what a person calls it, where that is another name")
    ks: tuple[int, ...] = Field((1, 5), min_length=1, description="cut-offs; the first is the main one")

    @property
    def metrics(self) -> tuple[str, ...]:
        """See `TaskConfig.metrics`."""
        return tuple(f"accuracy@{k}" for k in self.ks)

    @property
    def direction(self) -> str:
        """See `TaskConfig.direction`."""
        return f"{self.data.input}→class name"

    def load(self, where: str) -> "ZeroShot":
        """See `TaskConfig.load`."""
        data = self.data.load(f"{where}.data")
        return ZeroShot(self, where, data.digest, data)


@dataclass(frozen=True)
class ZeroShot(Task):
    """Memory O((N + P) D) for P sentences, and a block of similarities."""

    config: ZeroShotConfig
    where: str
    digest: str
    data: Labelled

    def run(self, encoder: Encoder, means: Means) -> Found:
        """See `Task.run`."""
        config = self.config
        labels_known, labels = self.data.numbers
        names = [config.names.get(label, label) for label in labels_known]
        sentences, owners = fill_templates(names, config.templates)
        classes_CD = class_vectors(text_vectors(encoder, sentences, self.where), owners)
        x_ND = self.data.vectors(encoder, self.where, "query")
        found = zero_shot(x_ND, classes_CD, labels, ks=config.ks)
        columns = {f"accuracy@{k}": found.hits[k] for k in config.ks}
        return Found(
            # Items of a class succeed or fail together, by its one vector.
            Items([str(n) for n in range(len(x_ND))], columns, labels),
            len(names),
            self._shown(x_ND, classes_CD, labels, names, means) if means.show else Shown(),
            diagnose(config.diagnosed, seed=means.seed, vectors=x_ND, labels=labels, pairs=classes_CD[labels]),
        )

    def _shown(
        self,
        x_ND: NDArray[np.float32],
        classes_CD: NDArray[np.float32],
        labels: NDArray[np.int64],
        names: list[str],
        means: Means,
    ) -> Shown:
        products = x_ND[: shown.SAMPLE] @ classes_CD.T
        own = np.zeros(products.shape, bool)
        own[np.arange(len(own)), labels[: shown.SAMPLE]] = True
        margin = products[own] - np.where(own, -np.inf, products).max(axis=1)
        examples = []
        for row in shown.worst(margin):
            order = np.argsort(-products[row], kind="stable")
            hits = [(names[c], float(products[row, c]), bool(c == labels[row])) for c in order[: shown.HITS]]
            image = self.data.inputs[row] if self.data.input == "image" else None
            query = names[labels[row]] if image else self.data.inputs[row]
            rank = int(np.flatnonzero(order == labels[row])[0]) + 1
            direction = self.config.direction
            examples.append(shown.text_example(self.where, direction, query, hits, rank=rank, image=image))
        return Shown(
            space=shown.space(x_ND, means.map, means.seed, **self.data.look),
            similarities=shown.similarities(products[own], products[~own]),
            confusion=shown.confusion(x_ND, labels, names, means.seed),
            examples=tuple(examples),
        )
