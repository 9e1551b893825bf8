"""Evaluations of a run: opened by the driver, done by all workers together."""

import logging
from collections.abc import Mapping
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from rayemb.config import Config
from rayemb.data.corpus import Corpus
from rayemb.data.decode import DecodeSettings
from rayemb.data.mix import CorpusEntry
from rayemb.data.samplers import ShuffledConfig
from rayemb.data.stream import open_members
from rayemb.evaluate.diagnostics import collapse, mean_cosine_of, rankme_of, spread, uniformity_sum
from rayemb.parallel import Exchange
from rayemb.train.evaluation.base import WATCHED, Encoder, Found, Rows, Task, TaskConfig, block_of
from rayemb.train.evaluation.knn import KNNConfig
from rayemb.train.evaluation.retrieval import RetrievalConfig
from rayemb.train.evaluation.sts import STSConfig
from rayemb.train.evaluation.zero_shot import ZeroShotConfig

logger = logging.getLogger(__name__)

AnyTask = Annotated[RetrievalConfig | ZeroShotConfig | STSConfig | KNNConfig, Field(discriminator="kind")]
DEFAULT = {"val": RetrievalConfig()}


class EvaluationConfig(Config):
    """What is measured while training, by all workers, and how often."""

    every: int = Field(100, ge=1, description="steps between evaluations; there is one after the last step too")
    tasks: dict[str, AnyTask] | None = Field(
        None, description="tasks by name; null: retrieval on split `val` of the first corpus, if it has one"
    )
    batch_size: int = Field(64, ge=1, description="rows (or texts) that a worker encodes at a time")

    @property
    def chosen(self) -> Mapping[str, TaskConfig]:
        """The tasks by name."""
        return DEFAULT if self.tasks is None else self.tasks

    @property
    def metrics(self) -> list[str]:
        """Names of all that may be reported, `task/metric`."""
        return [f"{name}/{metric}" for name, task in self.chosen.items() for metric in (*task.metrics, *WATCHED)]


def open_tasks(config: EvaluationConfig, entries: Mapping[str, CorpusEntry]) -> dict[str, Task]:
    """The tasks as workers get them; `entries` are the corpora of the training, with their URIs.

    Raises CorpusError or RayembError for one that cannot be done on its corpus.
    """
    tasks = {}
    for name, task in config.chosen.items():
        known = task.corpus or next(iter(entries))
        entry = CorpusEntry(uri=task.uri) if task.uri else entries[known]
        corpus = Corpus.open(str(entry.uri))
        if config.tasks is None and task.split not in corpus.splits:
            logger.warning("the corpus has no split %r: no evaluation during training", task.split)
            continue
        if config.tasks is None and entry.identical and corpus.kind != "text_pair":
            logger.warning("texts paired with themselves have nothing to find: no evaluation during training")
            continue
        changes: dict[str, Any] = {"split": task.split, "main_caption": 1.0, "hard_negatives": 0}
        changes |= {"sampler": ShuffledConfig(), "fraction": 1.0, "identical": False}
        for prefix in ("query_prefix", "text_prefix"):
            if getattr(task, prefix) is not None:
                changes[prefix] = getattr(task, prefix)
        (member,) = open_members({name: entry.model_copy(update=changes)})
        tasks[name] = task.prepare(member, f"train.evaluation.tasks.{name}")
    return tasks


class Evaluator:
    """A rank's part of the evaluations; every method is collective."""

    def __init__(
        self,
        tasks: Mapping[str, Task],
        engine: Any,
        exchange: Exchange,
        decode: DecodeSettings,
        *,
        batch_size: int,
    ) -> None:
        self._engine, self._exchange = engine, exchange
        self._encoder = Encoder(engine, exchange, decode, batch_size)
        share = {"rank": exchange.rank, "world": exchange.world, "device": torch.device(engine.device)}
        self._tasks = {
            name: (task, Rows(task, decode, batch_size=batch_size, **share))  # type: ignore[arg-type]
            for name, task in tasks.items()
        }
        self.warnings: list[str] = []
        self._told: set[str] = set()

    def __bool__(self) -> bool:
        return bool(self._tasks)

    def run(self) -> dict[str, Any]:
        """The metrics of all tasks, `task/metric` → figure, the same on every rank, and whether anything collapsed.

        What a person should know is put into `warnings`, each once.
        """
        self.warnings = []
        metrics: dict[str, Any] = {}
        reasons = {}
        self._engine.eval()
        for name, (task, rows) in self._tasks.items():
            found = task.run(self._encoder, rows)
            watched, reason = self._watched(found)
            metrics |= {f"{name}/{metric}": value for metric, value in {**found.figures, **watched}.items()}
            if reason:
                reasons[name] = reason
            if bad := int(self._encoder.total(rows.bad)):
                self._tell(f"{name} bad", f"{bad} rows of the evaluation {name} cannot be used and are left out")
        self._engine.train()
        for name, reason in reasons.items():
            self._tell(f"{name} collapsed", f"the vectors of {name} have collapsed: {reason}")
        self._told -= {f"{name} collapsed" for name in self._tasks if name not in reasons}
        return {**metrics, "collapsed": bool(reasons)}

    def _watched(self, found: Found) -> tuple[dict[str, float | None], str | None]:
        """Rank, uniformity and alignment, of two sides the worse; and why they are collapsed, if they are."""
        figures: list[tuple[float, float]] = []
        reasons = []
        for x in found.sides:
            rows, total, gram = spread(x)
            if rows < 2:
                continue
            rank = rankme_of(gram, rows)
            figures.append((rank, self._uniformity(x)))
            reasons.append(collapse(rank, rows, x.shape[1], mean_cosine_of(total, rows)))
        watched: dict[str, float | None] = dict.fromkeys(WATCHED)
        watched["alignment"] = found.alignment
        if figures:
            watched |= {"rankme": min(rank for rank, _ in figures), "uniformity": max(value for _, value in figures)}
        return watched, next((reason for reason in reasons if reason), None)

    def _uniformity(self, x: NDArray[np.float32]) -> float:
        rank, world, rows = self._exchange.rank, self._exchange.world, len(x)
        start, stop = rank * rows // world, (rank + 1) * rows // world
        mine = uniformity_sum(x[start:stop], x, start, block=block_of(rows))
        return float(np.log(self._encoder.total(mine) / (rows * (rows - 1))))

    def _tell(self, key: str, message: str) -> None:
        if key not in self._told:
            self._told.add(key)
            self.warnings.append(message)
