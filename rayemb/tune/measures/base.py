"""What is measured of a trial's model when its training is over, beyond what the training reports.

A measure is a config with a literal `name`, like every method: its metrics may be objectives of the sweep.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from rayemb.config import Config
from rayemb.data import Corpus
from rayemb.data.corpus import read_row_group
from rayemb.models import Model
from rayemb.train import TrainConfig
from rayemb.tune.errors import TuneError


@dataclass(frozen=True)
class Trained:
    """A trained model and what it was trained with."""

    model: Model
    model_uri: str
    corpus_uri: str
    config: TrainConfig


class Measure(Config, ABC):
    """Base of the configs of measures."""

    @property
    @abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """Names of what it gives."""

    @abstractmethod
    def measure(self, trained: Trained) -> dict[str, float]:
        """The figures, by those names; runs in the trial's driver, which holds no CPU of the cluster."""


def first_rows(corpus: Corpus, split: str, rows: int, columns: list[str]) -> dict[str, list[Any]]:
    """The first rows of a split, column by column; no more row groups are read than hold them.

    Raises TuneError where the corpus lacks the split.
    """
    if split not in corpus.splits:
        raise TuneError(
            f"the corpus has no split {split!r}", where="tune.measures", fix=f"there are {', '.join(corpus.splits)}"
        )
    found: dict[str, list[Any]] = {name: [] for name in columns}
    for group in corpus.row_groups(split):
        left = rows - len(found[columns[0]])
        if left <= 0:
            break
        table = read_row_group(group, columns)
        for name in columns:
            found[name] += table[name].to_pylist()[:left]
    return found
