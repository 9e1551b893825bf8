"""What all tasks of an evaluation during training share: their rows, their vectors from all ranks, their watch.

Under ZeRO-3 a forward is collective: every rank goes through the engine the same number of times in the same order,
with batches of zero rows where it has none. A rank holds the vectors of all ranks, `(M, D)` fp32 a side, and never more
than a block of their similarities.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator

from rayemb.config import Config
from rayemb.data.augment import AugmentConfig
from rayemb.data.decode import Decoder, DecodeSettings, Member, Piece
from rayemb.errors import RayembError
from rayemb.parallel import Exchange
from rayemb.train.objective import trimmed

KEPT_BYTES = 128 << 20  # of decoded rows that are kept from one evaluation to the next, each rank and task
CACHE_BYTES = 32 << 20
BLOCK_BYTES = 64 << 20
QUERY_SIDE, DOCUMENT_SIDE = {"pixels", "query_tokens", "query_skips"}, {"tokens", "skips"}
WATCHED = ("rankme", "uniformity", "alignment")


class TaskConfig(Config, ABC):
    """A task: which rows it looks at."""

    corpus: str | None = Field(None, description="one of train.corpora; null: the first")
    uri: str | None = Field(None, description="instead of corpus: one that is not trained on")
    split: str = Field("val", description="its split")
    rows: int = Field(512, ge=2, description="the first so many rows of the split are used")
    query_prefix: str | None = Field(None, description="put before every query; null: as the corpus has it in training")
    text_prefix: str | None = Field(None, description="put before every text; null: as the corpus has it in training")

    @model_validator(mode="after")
    def _one_place(self) -> "TaskConfig":
        if self.corpus is not None and self.uri is not None:
            raise ValueError("give corpus or uri, not both")
        return self

    @property
    @abstractmethod
    def metrics(self) -> tuple[str, ...]:
        """Names of what it reports."""

    @abstractmethod
    def prepare(self, member: Member, where: str) -> "Task":
        """The task as workers get it. Raises a RayembError at `where` for a corpus that it cannot be done on."""


@dataclass(frozen=True)
class Found:
    """What a task found: figures (None: there is no honest one), and the vectors whose spread is watched."""

    figures: dict[str, float | None]
    sides: Sequence[NDArray[np.float32]]  # each (M, D), of all ranks
    alignment: float | None


@dataclass(frozen=True)
class Vectors:
    """The vectors of all ranks in rank order, M rows: `mine` are this rank's. `keys` as `Decoder` gives them."""

    queries: NDArray[np.float32]  # (M, D)
    documents: NDArray[np.float32]  # (M, D)
    keys: NDArray[np.int64]  # (M, 3)
    ordinals: NDArray[np.int64]  # (M,)
    mine: slice


class Task(ABC):
    """A task, opened by the driver, for the workers."""

    member: Member
    rows: int

    @abstractmethod
    def run(self, encoder: "Encoder", rows: "Rows") -> Found:
        """What the task finds on all ranks; all must call it, and all get the same."""


class Rows:
    """This rank's share of a task's rows, batch by batch: as many batches as any other rank has, empty ones too.

    Decoded rows are kept for the next evaluation where they take at most 128 MiB, and decoded anew where not.
    """

    def __init__(
        self, task: Task, decode: DecodeSettings, *, batch_size: int, rank: int, world: int, device: torch.device
    ) -> None:
        rows, self._device = task.rows, device
        self._mine = np.arange(rank * rows // world, (rank + 1) * rows // world)
        self._batch_size = batch_size
        self._batches = math.ceil(math.ceil(rows / world) / batch_size)
        # As they are: the main caption, nothing varied.
        settings = replace(decode, augment=AugmentConfig(), cache_bytes=CACHE_BYTES, classes=None)
        self._decoder: Decoder | None = Decoder([task.member], settings)
        self._kept: list[dict[str, NDArray[Any]]] | None = None
        self.bad = 0

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for arrays in self._kept if self._kept is not None else self._decoded():
            batch = {name: torch.from_numpy(values).to(self._device) for name, values in arrays.items()}
            yield {name: trimmed(value) if name.endswith("tokens") else value for name, value in batch.items()}

    def _decoded(self) -> Iterator[dict[str, NDArray[Any]]]:
        assert self._decoder is not None
        made: list[dict[str, NDArray[Any]]] = []
        size, bad = 0, 0
        for number in range(self._batches):
            part = self._mine[number * self._batch_size : (number + 1) * self._batch_size]
            arrays, unusable = self._decoder(Piece(0, ((0, part),)))
            bad += len(unusable)
            size += sum(values.nbytes for values in arrays.values())
            if size <= KEPT_BYTES:
                made.append(arrays)
            yield arrays
        self.bad = bad
        if size <= KEPT_BYTES:
            self._kept, self._decoder = made, None


class Encoder:
    """The engine of a rank, for encoding what a task needs; every method is collective."""

    def __init__(self, engine: Any, exchange: Exchange, decode: DecodeSettings, batch_size: int) -> None:
        self.engine, self.exchange, self.decode, self.batch_size = engine, exchange, decode, batch_size
        self.device = torch.device(engine.device)

    @torch.no_grad()
    def encode(self, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Vectors of one batch on the host, `(B, D)` of its queries and of its documents."""
        rows = self.engine(batch).rows
        return rows["queries"].float().cpu(), rows["documents"].float().cpu()

    def vectors(self, rows: Rows, *, sides: str = "both") -> Vectors:
        """The vectors of a task's rows over all ranks; `sides`: `queries` or `documents` leaves the other empty."""
        parts: list[tuple[torch.Tensor, ...]] = []
        for batch in rows:
            keys, ordinals = batch["keys"].cpu(), batch["row"].cpu()
            # The other side with no rows, and not left out: the towers' forwards are the same at any rate.
            off = {"queries": DOCUMENT_SIDE, "documents": QUERY_SIDE}.get(sides, set())
            batch = {name: value[:0] if name in off else value for name, value in batch.items()}
            parts.append((*self.encode(batch), keys, ordinals))
        queries, documents, keys, ordinals = (torch.cat(part) for part in zip(*parts, strict=True))
        sizes = [size for (size,) in self.exchange.agree(None, len(ordinals))]
        start = sum(sizes[: self.exchange.rank])
        total = sum(sizes)
        if not total:
            raise RayembError("no row can be used", where="train.evaluation")
        return Vectors(
            self.everyone(queries),
            self.everyone(documents),
            self.everyone(keys),
            self.everyone(ordinals),
            slice(start, start + sizes[self.exchange.rank]),
        )

    def texts(self, texts: Sequence[str], prefix: str | None) -> NDArray[np.float32]:
        """The vectors `(T, D)` of all ranks' document texts behind `prefix`, or the model's prompt where it is None.

        Every rank must bring as many.
        """
        prompts = self.decode.prompts
        before = prompts.text if prefix is None else prefix
        size = self.decode.image_size
        nothing = torch.zeros((0, 3, size, size), dtype=torch.uint8, device=self.device)
        parts = []
        for start in range(0, len(texts), self.batch_size):
            found = self.decode.tokenizer.with_prompt(texts[start : start + self.batch_size], before)
            tokens, skips = (torch.from_numpy(values).to(self.device) for values in found)
            batch = {"pixels": nothing, "tokens": tokens, **({} if prompts.pooled else {"skips": skips})}
            parts.append(self.encode(batch)[1])
        return self.everyone(torch.cat(parts))

    def everyone(self, rows: torch.Tensor) -> NDArray[Any]:
        """The rows of all ranks, in rank order."""
        found: NDArray[Any] = self.exchange.everyone(rows).numpy()
        return found

    def total(self, value: float) -> float:
        """The sum over ranks."""
        return float(self.everyone(torch.tensor([value], dtype=torch.float64)).sum())


def block_of(columns: int) -> int:
    """Rows of a block of float64 similarities with so many columns."""
    return max(1, BLOCK_BYTES // (8 * max(1, columns)))
