"""Few-shot classification: episodes of N classes with K examples each, nearest prototype (Snell et al., 2017)."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np
from pydantic import Field

from rayemb.evaluate.encoders import Encoder, Side
from rayemb.evaluate.errors import EvaluateError
from rayemb.evaluate.metrics import MetricError
from rayemb.evaluate.metrics.few_shot import draw_episodes, few_shot
from rayemb.evaluate.tasks import shown
from rayemb.evaluate.tasks.base import Found, Items, Means, Shown, Task, TaskConfig
from rayemb.evaluate.tasks.labelled import Labelled, LabelledData
from rayemb.evaluate.tasks.vectors import diagnose


class FewShotConfig(TaskConfig):
    """N-way K-shot accuracy, inductive. Every model sees the same episodes, of which the interval is."""

    gives: ClassVar[frozenset[str]] = frozenset({"vectors", "labels"})
    kind: Literal["few_shot"] = "few_shot"
    data: LabelledData = Field(description="labelled items")
    ways: int = Field(5, ge=2, description="classes of an episode")
    shots: int = Field(1, ge=1, description="examples of each class")
    queries: int = Field(15, ge=1, description="items to classify, of each class")
    episodes: int = Field(600, ge=2, description="how many are drawn, by the suite's seed")
    side: Side = Field("text", description="as what texts are encoded, where the model tells them apart")

    @property
    def metrics(self) -> tuple[str, ...]:
        """See `TaskConfig.metrics`."""
        return ("accuracy",)

    @property
    def direction(self) -> str:
        """See `TaskConfig.direction`."""
        return f"{self.ways}-way {self.shots}-shot"

    def load(self, where: str) -> "FewShot":
        """See `TaskConfig.load`. Raises EvaluateError naming the classes that lack items, where too few are left."""
        data = self.data.load(f"{where}.data")
        names, labels = data.numbers
        try:
            draw_episodes(labels, ways=self.ways, shots=self.shots, queries=self.queries, episodes=2, seed=0)
        except MetricError as error:
            sizes = np.bincount(labels)
            least = int(sizes.argmin())
            raise EvaluateError(
                f"{error.what}; the smallest class is {names[least]!r} with {sizes[least]}",
                where=f"{where}: {data.uri}",
                fix=error.fix,
            ) from error
        return FewShot(self, where, data.digest, data)


@dataclass(frozen=True)
class FewShot(Task):
    """Memory O(N D)."""

    config: FewShotConfig
    where: str
    digest: str
    data: Labelled

    def run(self, encoder: Encoder, means: Means) -> Found:
        """See `Task.run`."""
        config = self.config
        x_ND = self.data.vectors(encoder, self.where, config.side)
        names, labels = self.data.numbers
        found = few_shot(
            x_ND,
            labels,
            ways=config.ways,
            shots=config.shots,
            queries=config.queries,
            episodes=config.episodes,
            seed=means.seed,
        )
        look = Shown()
        if means.show:
            look = Shown(
                space=shown.space(x_ND, means.map, means.seed, **self.data.look),
                similarities=shown.class_similarities(x_ND, labels, means.seed),
                confusion=shown.confusion(x_ND, labels, names, means.seed),
            )
        few = ", ".join(names[n] for n in found.skipped[:5]) + (" …" if len(found.skipped) > 5 else "")
        notes = (f"{len(found.skipped)} classes have too few items for an episode: {few}.",) if found.skipped else ()
        return Found(
            Items([str(n) for n in range(config.episodes)], {"accuracy": found.accuracies}),
            config.ways,
            look,
            diagnose(config.diagnosed, seed=means.seed, vectors=x_ND, labels=labels),
            notes,
        )
