"""Cross-batch memory: documents of earlier batches as further negatives (Wang et al., 2020, arXiv 1912.06798)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from rayemb.losses.base import Batch, Loss, Rows, Wrapper, WrapperConfig, names_within, unit
from rayemb.parallel import NO_KEY, Exchange


class CrossBatchMemoryConfig(WrapperConfig):
    """A queue of the last `size` documents, over all ranks; the oldest leave first."""

    name: Literal["cross_batch_memory"] = "cross_batch_memory"
    size: int = Field(8192, ge=1, description="documents remembered, over all workers; 4 * size * dim bytes on each")

    @model_validator(mode="after")
    def _fit(self) -> CrossBatchMemoryConfig:
        for name in sorted(
            names_within(self.loss) & {"gist_embed", "class_proxies", "cross_batch_memory", "starbucks"}
        ):
            raise ValueError(f"{name} has no use for remembered documents")
        return self

    def build(self, dim: int) -> CrossBatchMemory:
        """The loss around the inner one."""
        return CrossBatchMemory(self, self.loss.build(dim), dim)


MOST_KEYS = 4  # of a document; the memory has one shape whatever batches bring


class CrossBatchMemory(Wrapper):
    """Choose it for many negatives where batches cannot be large; the vectors are as old as the memory is long.

    Every rank keeps the whole queue, in the checkpoint too, and shows its part of it: what is remembered depends on
    the batches seen, not on the number of ranks. The queue is filled after the loss: the first step is the plain loss.
    """

    vectors: Tensor
    keys: Tensor
    seen: Tensor

    def __init__(self, config: CrossBatchMemoryConfig, loss: Loss, dim: int) -> None:
        super().__init__(loss)
        self.config = config
        self.register_buffer("vectors", torch.zeros(config.size, dim))
        self.register_buffer("keys", torch.full((config.size, MOST_KEYS), NO_KEY))
        self.register_buffer("seen", torch.zeros(1, dtype=torch.int64))

    def rows(self, batch: Batch, exchange: Exchange) -> Rows:
        """As many rows as the inner loss has."""
        filled = min(int(self.seen), self.config.size)
        mine = slice(exchange.rank, filled, exchange.world)
        memory = self.vectors[mine].to(batch.queries.dtype).clone()
        keys = None
        if batch.keys is not None:  # as many, and in the shape, as the batch has them
            keys = (self.keys[mine, : batch.keys.shape[1]] if batch.keys.ndim > 1 else self.keys[mine, 0]).clone()
        rows = self.loss.rows(replace(batch, memory=memory, memory_keys=keys), exchange)
        if self.training:  # a validation loss must leave no trace
            self._remember(batch, exchange)
        return rows

    def problem(self, batch: Batch) -> str | None:
        """See `Loss.problem`."""
        if batch.documents is None:
            return "CrossBatchMemory needs documents"
        if batch.keys is not None and batch.keys.ndim > 1 and batch.keys.shape[1] > MOST_KEYS:
            return f"CrossBatchMemory remembers {MOST_KEYS} keys of a document, keys has {batch.keys.shape[1]}"
        return self.loss.problem(batch)

    @torch.no_grad()
    def _remember(self, batch: Batch, exchange: Exchange) -> None:
        assert batch.documents is not None
        documents = exchange.everyone(unit(batch.documents))
        keys = self.keys.new_full((batch.documents.shape[0], MOST_KEYS), NO_KEY)
        if batch.keys is not None:
            own = batch.keys if batch.keys.ndim > 1 else batch.keys[:, None]
            keys[:, : own.shape[1]] = own
        keys, number = exchange.everyone(keys), documents.shape[0]
        newest = slice(max(0, number - self.config.size), number)
        at = (torch.arange(number, device=self.keys.device)[newest] + self.seen) % self.config.size
        self.vectors[at] = documents[newest].to(self.vectors.dtype)
        self.keys[at] = keys[newest]
        self.seen += number
