"""Which of a query's nearest documents are taken as hard negatives: plain numpy, knows neither Ray nor an index.

A document that scores as high as the positive is likely to be a positive that nobody labelled. What is taken lies in a
window of ranks, keeps a margin to the positive's score (LG-ANNA, 2025; NV-Retriever, Moreira et al., 2024), and is
vetoed by no other judge (GISTEmbed, Solatorio, 2024; UniME-V2, 2025).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from rayemb.config import Config

# Shapes: Q queries, K candidates each, best first; N negatives wanted.

Scores = NDArray[np.floating]


class MarginConfig(Config):
    """How far below the positive's score a negative's must be; both hold where both are given."""

    absolute: float | None = Field(None, ge=0, description="negative <= positive - this")
    relative: float | None = Field(None, ge=0, lt=1, description="negative <= positive - this share of |positive|")

    def limit(self, positive: Scores) -> Scores:
        """The highest score `(Q,)` that a negative may have; infinite without margins."""
        limits = np.full(positive.shape, np.inf)
        if self.absolute is not None:
            limits = np.minimum(limits, positive - self.absolute)
        if self.relative is not None:
            # Of the magnitude: for a positive below zero the limit must still be below it.
            limits = np.minimum(limits, positive - self.relative * np.abs(positive))
        return limits


class ChoiceConfig(Config):
    """Which of the candidates that may be negatives are taken."""

    negatives: int = Field(7, ge=1, description="hard negatives of each row, at most")
    first_rank: int = Field(1, ge=1, description="best rank that is looked at; known positives have none")
    last_rank: int = Field(100, ge=1, description="worst rank that is looked at")
    min_score: float | None = Field(None, description="lowest similarity; lower ones are too easy to teach anything")
    max_score: float | None = Field(None, description="highest similarity, whatever the positive's")
    margin: MarginConfig = Field(default_factory=MarginConfig, description="by the similarities of the search")
    take: Literal["hardest", "random", "spread"] = Field(
        "hardest",
        description="of those that are left: the first, a random choice, or evenly from the whole list (UniME-V2)",
    )

    @model_validator(mode="after")
    def _window(self) -> "ChoiceConfig":
        if self.last_rank < self.first_rank:
            raise ValueError(f"last_rank ({self.last_rank}) is before first_rank ({self.first_rank})")
        return self


class Veto(NamedTuple):
    """What another judge says: scores `(Q, K)` of the candidates, `(Q,)` of the positives, and its margin."""

    name: str
    scores: Scores
    positive: Scores
    margin: MarginConfig


class Chosen(NamedTuple):
    """places: `(Q, N)` int64, columns of the candidates, -1 where there are no more. left_out: candidates by reason."""

    places: NDArray[np.int64]
    left_out: dict[str, int]


def ranked(known: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Ranks `(Q, K)` from 1, counted without the known positives, whose own is 0."""
    return np.where(known, 0, np.cumsum(~known, axis=1)).astype(np.int64)


def choose(
    scores: Scores,
    positive: Scores,
    known: NDArray[np.bool_],
    config: ChoiceConfig,
    rng: Sequence[np.random.Generator],
    vetoes: Sequence[Veto] = (),
) -> Chosen:
    """The negatives among candidates with similarities `(Q, K)`, best first; `positive` `(Q,)`, the row's own.

    `known` `(Q, K)`: candidates that are positives or absent. `rng`: one generator a row, so that a row's choice does
    not depend on what else is in its batch. A candidate that several rules leave out counts for the first of them.
    """
    ranks = ranked(known)
    rules: list[tuple[str, NDArray[np.bool_]]] = [
        ("known_positive", known),
        ("rank", (ranks < config.first_rank) | (ranks > config.last_rank)),
        ("min_score", scores < (-np.inf if config.min_score is None else config.min_score)),
        ("max_score", scores > (np.inf if config.max_score is None else config.max_score)),
        ("margin", scores > config.margin.limit(positive)[:, None]),
        *((veto.name, ~(veto.scores <= veto.margin.limit(veto.positive)[:, None])) for veto in vetoes),
    ]
    left = np.ones(scores.shape, dtype=bool)
    left_out = {}
    for name, refused in rules:
        left_out[name] = int((left & refused).sum())
        left &= ~refused
    places = np.full((len(scores), config.negatives), -1, dtype=np.int64)
    for row, mask in enumerate(left):
        taken = _taken(np.flatnonzero(mask), config, rng[row])
        places[row, : len(taken)] = taken
    return Chosen(places, left_out)


def _taken(there: NDArray[np.int64], config: ChoiceConfig, rng: np.random.Generator) -> NDArray[np.int64]:
    number = min(config.negatives, len(there))
    if config.take == "random":
        return np.sort(rng.choice(there, number, replace=False))
    if config.take == "spread":
        return there[np.arange(number) * len(there) // max(1, number)]
    return there[:number]
