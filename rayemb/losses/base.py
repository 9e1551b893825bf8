"""What a loss is given, and what it gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from rayemb.config import Config
from rayemb.parallel import NO_KEY, Alone, Duplicates, Exchange, Pairs, Veto, widened

if TYPE_CHECKING:
    from rayemb.losses import AnyLoss


@dataclass(frozen=True)
class Batch:
    """One rank's vectors of a global batch: B queries with a document each, N hard negatives, Q rows of memory.

    queries:       `(B, D)`, any length but zero: every loss normalises.
    documents:     `(B, D)`, the positive of each query. Losses over labels can do without.
    negatives:     `(N, D)`, hard negatives; any number per query. Every rank's are negatives of all queries.
    negative_rows: `(N,)` int64, the query each hard negative was mined for.
    keys:          int64 `(B,)` or `(B, K)`: ids, hashes or labels. Pairs with an equal key are never negatives of
                   each other, on whatever ranks they are; see `Pairs`.
    negative_keys: `(N,)` or `(N, K)`.
    weights:       `(B, B + N)`, dense or sparse, >= 0: soft positives among documents, then hard negatives, of this
                   rank; instead of each query's own document with weight 1.
    tasks:         `(B,)` int64, the task of each pair, where temperatures are per task.
    labels:        `(B,)` int64, classes of the queries, where candidates are class proxies.
    guide:         a frozen guide's vectors of the same texts (queries, documents, negatives), any dimension.
    memory:        `(Q, D)`, documents of earlier batches, this rank's share of them; no gradient.
    memory_keys:   `(Q,)` or `(Q, K)`.
    exits:         the same rows from fewer layers of the encoder, by their number: batches of their own.
    progress:      share of the training done, 0 to 1.
    """

    queries: Tensor
    documents: Tensor | None = None
    negatives: Tensor | None = None
    negative_rows: Tensor | None = None
    keys: Tensor | None = None
    negative_keys: Tensor | None = None
    weights: Tensor | None = None
    tasks: Tensor | None = None
    labels: Tensor | None = None
    guide: Batch | None = None
    memory: Tensor | None = None
    memory_keys: Tensor | None = None
    exits: Mapping[int, Batch] = field(default_factory=dict)
    progress: float = 0.0

    @property
    def own(self) -> Tensor:
        """`(B,)`, 0 to B - 1: where each query's document is among the candidates."""
        return torch.arange(self.queries.shape[0], device=self.queries.device)

    def candidates(self) -> Tensor:
        """Documents, hard negatives and memory as unit vectors `(C, D)`."""
        parts = [unit(part) for part in self._parts()]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def candidate_keys(self) -> Tensor | None:
        """Their keys `(C,)` or `(C, K)`; `NO_KEY` for parts that have none."""
        if self.keys is None:
            return None
        keys = [self.keys]
        for part, given in ((self.negatives, self.negative_keys), (self.memory, self.memory_keys)):
            if part is not None:
                keys.append(
                    self.keys.new_full((part.shape[0], *self.keys.shape[1:]), NO_KEY) if given is None else given
                )
        return torch.cat(keys)

    def pairs(self, duplicates: Duplicates, vetoes: tuple[Veto, ...] = ()) -> Pairs:
        """The pairs of queries with `candidates()`."""
        keys = self.candidate_keys()
        return Pairs(
            own=None if self.weights is not None else self.own,
            weights=self._wide(self.weights) if self.weights is not None else None,
            keys=(self.keys, keys) if self.keys is not None and keys is not None else None,
            duplicates=duplicates,
            vetoes=vetoes,
        )

    def views(self) -> Batch:
        """The batch in which queries and documents alike seek among both: 2 B queries (B without documents)."""
        if self.documents is None:
            return replace(self, documents=self.queries)
        both = torch.cat([self.queries, self.documents])
        keys = torch.cat([self.keys, self.keys]) if self.keys is not None else None
        return replace(self, queries=both, documents=both, keys=keys, weights=None, tasks=None, labels=None)

    def prefix(self, dim: int) -> Batch:
        """The same batch with the first `dim` coordinates of its vectors (the guide's stay)."""
        return replace(
            self,
            queries=self.queries[:, :dim],
            documents=self.documents[:, :dim] if self.documents is not None else None,
            negatives=self.negatives[:, :dim] if self.negatives is not None else None,
            memory=self.memory[:, :dim] if self.memory is not None else None,
        )

    def problem(self) -> str | None:
        """What no loss could work with, naming the argument; None if there is nothing."""
        vectors = [("queries", self.queries), ("documents", self.documents), ("negatives", self.negatives)]
        for name, rows in [*vectors, ("memory", self.memory)]:
            if rows is None:
                continue
            if rows.ndim != 2 or not rows.is_floating_point():
                return f"{name} are {rows.dtype} of shape {tuple(rows.shape)}, not floating-point (n, D)"
            if rows.shape[1] != self.queries.shape[1]:
                return f"{name} have {rows.shape[1]} dimensions, queries {self.queries.shape[1]}"
            bad = _unusable(rows)
            if bad:
                return f"{name} {bad}"
        return self._misfit()

    def _parts(self) -> list[Tensor]:
        return [part for part in (self.documents, self.negatives, self.memory) if part is not None]

    def _wide(self, weights: Tensor) -> Tensor:
        """Weights over documents and negatives as weights over all candidates."""
        if self.memory is None:
            return weights
        sparse = (weights if weights.is_sparse else weights.to_sparse()).coalesce()
        size = (weights.shape[0], weights.shape[1] + self.memory.shape[0])
        return torch.sparse_coo_tensor(sparse.indices(), sparse.values(), size, check_invariants=False)

    def _misfit(self) -> str | None:
        pairs = self.queries.shape[0]
        negatives = self.negatives.shape[0] if self.negatives is not None else 0
        expected = [
            ("documents", self.documents, pairs),
            ("keys", self.keys, pairs),
            ("tasks", self.tasks, pairs),
            ("labels", self.labels, pairs),
            ("negative_rows", self.negative_rows, negatives),
            ("negative_keys", self.negative_keys, negatives),
            ("memory_keys", self.memory_keys, self.memory.shape[0] if self.memory is not None else 0),
            ("weights", self.weights, pairs),
        ]
        for name, rows, number in expected:
            if rows is not None and rows.shape[0] != number:
                return f"{name} has {rows.shape[0]} rows, not {number}"
        if self.weights is not None and self.weights.shape != (pairs, pairs + negatives):
            return f"weights has shape {tuple(self.weights.shape)}, not ({pairs}, {pairs + negatives})"
        owners = self.negative_rows
        if owners is not None and owners.numel() and not 0 <= int(owners.min()) <= int(owners.max()) < pairs:
            return f"negative_rows points outside the {pairs} queries"
        if self.keys is not None:
            for name, keys in (("negative_keys", self.negative_keys), ("memory_keys", self.memory_keys)):
                if keys is not None and keys.shape[1:] != self.keys.shape[1:]:
                    return f"{name} has shape {tuple(keys.shape)}, keys {tuple(self.keys.shape)}"
        problem = self.guide.problem() if self.guide is not None else None
        return f"the guide's {problem}" if problem else None


class LossConfig(Config):
    """Base of every loss's config."""

    @property
    def needs(self) -> frozenset[str]:
        """Fields of `Batch` that the loss cannot do without, beyond queries, documents and keys."""
        return frozenset()

    def misfit(self, dim: int) -> str | None:
        """Why the loss cannot be had over vectors of `dim` dimensions; None if it can."""
        return None


class WrapperConfig(LossConfig):
    """Base of the config of a loss made of another one."""

    loss: AnyLoss = Field(description="the loss inside")

    @property
    def needs(self) -> frozenset[str]:
        """What the inner loss needs."""
        return self.loss.needs

    def misfit(self, dim: int) -> str | None:
        """What the inner loss says."""
        return self.loss.misfit(dim)


class Rows(NamedTuple):
    """Losses of anchors `(R,)`, and 1 or 0 for whether each counts in the mean (those without a positive do not)."""

    losses: Tensor
    counted: Tensor


class Loss(nn.Module, ABC):
    """A loss over the global batch, of which every rank holds a part; owns its parameters (temperature, bias, ...)."""

    def forward(self, batch: Batch, exchange: Exchange | None = None) -> Tensor:
        """This rank's share, a scalar: the mean of the shares over ranks is the loss of the whole batch.

        Average gradients over ranks, as DDP and DeepSpeed do, and every parameter, this loss's own included, has
        exactly the gradient that one process with the whole batch would have.

        Raises ExchangeError on every rank if any rank's batch is unusable: not finite, a zero vector, shapes that do
        not fit. The message names that rank, the argument and the row.
        """
        exchange = exchange or Alone()
        exchange.agree(batch.problem() or self.problem(batch))
        # Under autocast every product would be one of 16 bits, its logits too.
        with torch.autocast(batch.queries.device.type, enabled=False):
            return share_of_mean(self.rows(batch, exchange), exchange)

    @abstractmethod
    def rows(self, batch: Batch, exchange: Exchange) -> Rows:
        """The losses of this rank's anchors against the candidates of all ranks."""

    def problem(self, batch: Batch) -> str | None:
        """What this loss needs and the batch lacks; None if nothing."""
        return None if batch.documents is not None else f"{type(self).__name__} needs documents"

    @property
    def temperature(self) -> float | None:
        """The current temperature (the mean over tasks), where the loss has one."""
        return None


class Wrapper(Loss):
    """A loss made of another one."""

    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.loss = loss

    def problem(self, batch: Batch) -> str | None:
        """See `Loss.problem`."""
        return self.loss.problem(batch)

    @property
    def temperature(self) -> float | None:
        """The inner loss's."""
        return self.loss.temperature


def names_within(config: Any) -> set[str]:
    """The names of a loss's config and of the configs inside it."""
    names = set()
    while config is not None:
        names.add(config.name)
        config = getattr(config, "loss", None)
    return names


def share_of_mean(rows: Rows, exchange: Exchange) -> Tensor:
    """This rank's share of the mean over all ranks' counted rows; 0 where nothing counts.

    W / total and not 1 / local: ranks are averaged afterwards, and a rank with few rows must not count like the others.
    """
    total = exchange.reduce(rows.counted.sum().reshape(1)).clamp(min=1)
    return (rows.losses * rows.counted).sum() * (exchange.world / total[0])


def unit(rows: Tensor) -> Tensor:
    """Rows of length 1 in the dtype they came in; the length is taken in fp32 or better."""
    return F.normalize(widened(rows), dim=-1).to(rows.dtype)


def scaled(rows: Tensor, scale: Tensor) -> Tensor:
    """Unit rows times `scale` (1,) or (B,), in fp32 or better (16 bit on CUDA, where tensor cores want both alike)."""
    product = widened(rows) * (scale if scale.shape[0] == 1 else scale[:, None])
    return product.to(rows.dtype) if rows.is_cuda else product


def _unusable(rows: Tensor) -> str | None:
    """The first row that has no direction."""
    length = widened(rows.detach()).norm(dim=1)
    bad = ~torch.isfinite(length) | (length == 0)
    if not bool(bad.any()):
        return None
    row = int(bad.nonzero()[0])
    return f"row {row} is {'a zero vector' if float(length[row]) == 0 else 'not finite'}"
