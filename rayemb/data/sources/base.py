"""What every source of a corpus offers."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from rayemb.config import Config
from rayemb.data.corpus import Kind
from rayemb.errors import RayembError


class SourceError(RayembError):
    """A source that is not there or lacks what a corpus needs."""


@dataclass(frozen=True)
class RawRow:
    """One candidate pair before it is checked: None stands for a value that the source lacks.

    With a `problem` it is a place where rows should be and cannot be read: `count` of them.
    """

    id: str
    image: bytes | None
    text: str | None
    source: str  # where it came from: file and row, for the quarantine table
    query: str | None = None  # what asks, in a corpus of text pairs
    texts: list[str] = field(default_factory=list)  # further captions of the same image
    negatives: list[str] = field(default_factory=list)  # texts that look like answers and are none
    score: float | None = None  # how well the pair fits, where somebody has judged it
    concept: str = ""  # pairs of one concept are positives of each other; default: the text
    style: str = ""
    license: str = ""
    split: str = ""  # empty: the builder decides by concept
    problem: tuple[str, str] | None = None  # reason (one word) and sentence
    count: int = 1


class Source(Config, ABC):
    """A place that pairs come from. A *unit* is the piece of work that one task reads; it must pickle small."""

    @property
    def kind(self) -> Kind:
        """What each row pairs."""
        return "image_text"

    @abstractmethod
    def units(self, seed: int) -> list[Any]:
        """The plan: every unit, in an order that `seed` decides. Raises SourceError before any work is done."""

    @abstractmethod
    def read(self, unit: Any) -> Iterator[RawRow]:
        """The rows of one unit. Bad rows are yielded as they are; the builder judges them.

        Raises StorageError where the store fails: an outage must not pass for bad data.
        """


def uniform(text: str, seed: int) -> float:
    """A number in [0, 1) that depends on `text` and `seed` alone."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, salt=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(digest, "little") / 2**64


def split_by_concept(concept: str, seed: int, test_fraction: float, val_fraction: float) -> str:
    """`zero_shot`, `val` or `train`: all pairs of one concept on the same side."""
    position = uniform(concept, seed)
    if position < test_fraction:
        return "zero_shot"
    return "val" if position < test_fraction + val_fraction else "train"
