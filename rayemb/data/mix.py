"""How corpora are mixed into global batches: configs, and the choice of corpora step by step."""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from rayemb import storage
from rayemb.config import Config
from rayemb.data.samplers import AnySampler, ShuffledConfig

DistinctKey = Literal["query", "text", "concept", "id"]


class CorpusEntry(Config):
    """One corpus of a mixture: where it is, how much of it, and how its rows become pairs."""

    uri: str | None = Field(None, description="the corpus; null: the run's own (artefacts.corpus)")
    split: str = Field("train", description="split to take rows from")
    weight: float | None = Field(
        None, gt=0, description="its share of the batches, relative to the others' weights; null for all: see mix"
    )
    fraction: float = Field(1.0, gt=0, le=1, description="use this share of the row groups (for quick sweeps)")
    identical: bool = Field(
        False,
        description="each text is paired with itself, whatever else a row has: what tells the two apart is the tower's "
        "dropout and train.augment.text (Mirror-BERT, SimCSE). For learning from texts alone",
    )
    query_prefix: str | None = Field(
        None, description="put before every query text: an instruction; null: the model's own prompt"
    )
    text_prefix: str | None = Field(
        None, description="put before every text and hard negative; null: the model's own prompt"
    )
    main_caption: float = Field(
        0.5, ge=0, le=1, description="how often a row comes with its main text rather than with any of its own texts"
    )
    hard_negatives: int = Field(0, ge=0, description="hard negatives of each row that are used, drawn anew each epoch")
    sampler: AnySampler = Field(default_factory=ShuffledConfig, description="which rows make up a batch")

    @field_validator("uri")
    @classmethod
    def _usable(cls, value: str | None) -> str | None:
        return None if value is None else storage.normalise(value)


class MixConfig(Config):
    """How the corpora of a run share its batches."""

    batches: Literal["one_corpus", "mixed"] = Field(
        "one_corpus", description="every global batch from one corpus, or each with rows of all corpora"
    )
    order: Literal["random", "round_robin"] = Field(
        "random",
        description="one_corpus: drawn by weight at every step, or in turn, as often as the weights say; no difference "
        "to mixed",
    )
    temperature: float = Field(
        1.0, gt=0, description="where no weights are given: shares proportional to rows ** (1 / temperature)"
    )
    exhausted: Literal["repeat", "stop", "drop"] = Field(
        "repeat",
        description="when a corpus is at its end: begin its next epoch, end the training, or go on without it",
    )
    distinct: list[DistinctKey] = Field(
        [],
        description="keys that no two rows of a global batch share; a row that would is kept back for the next batch. "
        "Pairs with equal keys are in any case no negatives of each other (loss.duplicates)",
    )


def shares(entries: Mapping[str, CorpusEntry], rows: Sequence[int], temperature: float) -> NDArray[np.float64]:
    """The share of each corpus, summing to 1: the given weights, else rows ** (1 / temperature)."""
    given = [entry.weight for entry in entries.values()]
    weights = np.array([w or float(n) ** (1 / temperature) for w, n in zip(given, rows, strict=True)], np.float64)
    share: NDArray[np.float64] = weights / weights.sum()
    return share


def drawn(share: NDArray[np.float64], rng: np.random.Generator) -> int:
    """One corpus, with probability `share`."""
    return int(rng.choice(len(share), p=share))


def in_turn(share: NDArray[np.float64], credit: NDArray[np.float64]) -> int:
    """The corpus whose turn it is; changes `credit`. After n steps each was within one step of n times its share."""
    credit += share
    chosen = int(np.argmax(credit))
    credit[chosen] -= 1
    return chosen


def apportioned(share: NDArray[np.float64], size: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Rows of each corpus in a batch of `size`: `size * share` in expectation, and never a whole row away from it.

    Systematic sampling: one random offset for all, so that the parts always add up.
    """
    borders = np.floor(np.concatenate([[0.0], np.cumsum(share)]) * size + rng.random()).astype(np.int64)
    borders[-1] = borders[0] + size  # against rounding in the sum
    return np.diff(borders)
