"""How candidates reach every rank: not at all, by one all-gather, or round a ring.

All exchanges give the same result; they differ in memory and in when they talk. B rows a rank, M over all:
`Gather` holds all M candidates and their gradients; `Ring` those of the two ranks that visit, of the two that come next
while it computes, and the gradients on their way home. Numbers of rows may differ between ranks, and may be zero.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Literal
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from rayemb.errors import RayembError
from rayemb.parallel.tiles import Tiling

ExchangeName = Literal["gather", "ring"]
Block = tuple[int, tuple[Tensor, ...]]  # owner's rank, its rows


class ExchangeError(RayembError):
    """One rank cannot go on; raised on every rank, with that rank's message."""


class Visits(ABC):
    """The rows of all ranks, block by block; made by `Exchange.visits`."""

    @abstractmethod
    def blocks(self) -> Iterator[Block]:
        """Each rank's rows once, this rank's own first."""

    @abstractmethod
    def collect(self, compute: Callable[[int, tuple[Tensor, ...], Tensor], None]) -> Tensor:
        """The gradient of this rank's first tensor, summed over what all ranks computed with it, fp32 or better.

        `compute(owner, tensors, gradient)` adds into `gradient` (C_owner, D); it is called once a block.
        """


class Exchange(ABC):
    """A group of ranks that show each other their candidates, and the tiles in which they look at them."""

    rank = 0
    world = 1

    def __init__(self, tiling: Tiling | None = None) -> None:
        self.tiling = tiling or Tiling()

    @abstractmethod
    def visits(self, tensors: tuple[Tensor, ...], sizes: list[int]) -> Visits:
        """Visits of `tensors`, each `(sizes[rank], ...)`; nothing is exchanged yet."""

    @abstractmethod
    def share(self, rows: Tensor, sizes: list[int]) -> Tensor:
        """The small `(sizes[r], ...)` of each rank r, one after the other; no gradient."""

    @abstractmethod
    def reduce(self, values: Tensor, op: Literal["sum", "max"] = "sum") -> Tensor:
        """Sum or maximum over ranks, no gradient."""

    def agree(self, problem: str | None, *numbers: int, alike: str = "") -> list[list[int]]:
        """Every rank's `numbers`, by rank; raises ExchangeError on all ranks if any of them has a `problem`.

        So it does if `alike`, which describes what a rank is about to exchange, is not the same on all of them.
        Call it before the first exchange of a step: a rank that raised alone would leave the others waiting, and
        transfers that do not fit together kill processes (gloo) or never end.
        """
        row = torch.tensor([[problem is not None, crc32(alike.encode()), *numbers]])
        table: list[list[int]] = self.share(row, [1] * self.world).tolist()
        if any(row[0] for row in table):
            said = self._messages(problem)
            rank = next(r for r, text in enumerate(said) if text)
            where = f"rank {rank} of {self.world}" if self.world > 1 else "the batch"
            raise ExchangeError(str(said[rank]), where=where)
        if any(row[1] != table[0][1] for row in table):
            said = self._messages(alike)
            rank = next(r for r, text in enumerate(said) if text != said[0])
            raise ExchangeError(f"it has {said[rank]}; rank 0 has {said[0]}", where=f"rank {rank} of {self.world}")
        return [row[2:] for row in table]

    @abstractmethod
    def _messages(self, problem: str | None) -> list[str | None]: ...

    def everyone(self, rows: Tensor) -> Tensor:
        """The `(n_r, ...)` of each rank r, one after the other, `(M, ...)`; no gradient; n_r may differ."""
        return self.share(rows, [size for (size,) in self.agree(None, rows.shape[0])])


def exchange_named(name: ExchangeName, tiling: Tiling | None = None, group: Any = None) -> Exchange:
    """The exchange of that name over `group` (the default group if None); `Alone` where there is nobody else."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size(group) == 1:
        return Alone(tiling)
    return Gather(tiling, group) if name == "gather" else Ring(tiling, group)


def mean_over_ranks(value: Tensor, group: Any = None) -> Tensor:
    """The mean of a detached scalar over all ranks: the loss that one process would report."""
    exchange = exchange_named("gather", group=group)
    return exchange.reduce(value.detach()) / exchange.world


class Alone(Exchange):
    """One process: its rows are all rows."""

    def visits(self, tensors: tuple[Tensor, ...], sizes: list[int]) -> Visits:
        """Visits in this exchange's way."""
        return _AloneVisits(tensors)

    def share(self, rows: Tensor, sizes: list[int]) -> Tensor:
        """See `Exchange.share`."""
        return rows.detach()

    def reduce(self, values: Tensor, op: Literal["sum", "max"] = "sum") -> Tensor:
        """See `Exchange.reduce`."""
        return values

    def _messages(self, problem: str | None) -> list[str | None]:
        return [problem]


class _AloneVisits(Visits):
    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self.tensors = tensors

    def blocks(self) -> Iterator[Block]:
        yield 0, self.tensors

    def collect(self, compute: Callable[[int, tuple[Tensor, ...], Tensor], None]) -> Tensor:
        total = _accumulator(self.tensors[0], self.tensors[0].shape[0])
        compute(0, self.tensors, total)
        return total


class _Group(Exchange):
    def __init__(self, tiling: Tiling | None = None, group: Any = None) -> None:
        super().__init__(tiling)
        self.group = group
        self.rank, self.world = dist.get_rank(group), dist.get_world_size(group)
        # nccl moves device tensors only; small tables made on the host go through the device.
        self.device = torch.device("cuda") if dist.get_backend(group) == "nccl" else None

    def share(self, rows: Tensor, sizes: list[int]) -> Tensor:
        """See `Exchange.share`."""
        there = rows.to(self.device) if self.device else rows
        return torch.cat(_all_gather(there, sizes, self.group)).to(rows.device)

    def reduce(self, values: Tensor, op: Literal["sum", "max"] = "sum") -> Tensor:
        """See `Exchange.reduce`."""
        total = values.detach().clone()
        dist.all_reduce(total, dist.ReduceOp.SUM if op == "sum" else dist.ReduceOp.MAX, group=self.group)
        return total

    def _messages(self, problem: str | None) -> list[str | None]:
        said: list[str | None] = [None] * self.world
        dist.all_gather_object(said, problem, group=self.group)
        return said


class Gather(_Group):
    """One all-gather of the candidates, one reduction of their gradients. O(M D) memory a rank.

    scatters: whether ranks get their own part of the sum alone, half of the bytes. gloo takes twice the time for it.
    """

    def __init__(self, tiling: Tiling | None = None, group: Any = None) -> None:
        super().__init__(tiling, group)
        self.scatters = self.device is not None

    def visits(self, tensors: tuple[Tensor, ...], sizes: list[int]) -> Visits:
        """Visits in this exchange's way."""
        return _GatherVisits(self, tensors, sizes)


class _GatherVisits(Visits):
    def __init__(self, exchange: Gather, tensors: tuple[Tensor, ...], sizes: list[int]) -> None:
        self.exchange, self.tensors, self.sizes = exchange, tensors, sizes
        self.gathered: list[list[Tensor]] | None = None

    def blocks(self) -> Iterator[Block]:
        if self.gathered is None:
            self.gathered = [_all_gather(tensor, self.sizes, self.exchange.group) for tensor in self.tensors]
        for step in range(self.exchange.world):
            owner = (self.exchange.rank + step) % self.exchange.world
            yield owner, tuple(parts[owner] for parts in self.gathered)

    def collect(self, compute: Callable[[int, tuple[Tensor, ...], Tensor], None]) -> Tensor:
        total = _accumulator(self.tensors[0], sum(self.sizes))
        parts = torch.split(total, self.sizes)
        for owner, tensors in self.blocks():
            compute(owner, tensors, parts[owner])
        self.gathered = None
        mine: Tensor
        if self.exchange.scatters and len(set(self.sizes)) == 1 and total.numel():
            mine = torch.empty_like(parts[0])
            dist.reduce_scatter_tensor(mine, total, group=self.exchange.group)
        else:
            # Of unequal parts there is no reduce-scatter: the sum of everything, of which each rank keeps its own.
            dist.all_reduce(total, group=self.exchange.group)
            mine = parts[self.exchange.rank].clone()
        return mine


class Ring(_Group):
    """Neighbours hand blocks on in both directions; gradients go straight home. O(B D) memory a rank."""

    def visits(self, tensors: tuple[Tensor, ...], sizes: list[int]) -> Visits:
        """Visits in this exchange's way."""
        return _RingVisits(self, tensors, sizes)


class _RingVisits(Visits):
    """After k steps a rank holds the blocks of the ranks k before and k behind it: half as many steps as ranks."""

    def __init__(self, exchange: Ring, tensors: tuple[Tensor, ...], sizes: list[int]) -> None:
        self.exchange, self.sizes = exchange, sizes
        self.tensors = tuple(tensor.contiguous() for tensor in tensors)
        self.rank, self.world = exchange.rank, exchange.world

    def blocks(self) -> Iterator[Block]:
        held = {+1: self.tensors, -1: self.tensors}
        coming = self._post(1, held)
        yield self.rank, self.tensors
        for step in range(1, self.world // 2 + 1):
            for work in coming[1]:
                work.wait()
            held = coming[0]
            coming = self._post(step + 1, held)
            for direction, tensors in held.items():
                yield (self.rank - direction * step) % self.world, tensors

    def collect(self, compute: Callable[[int, tuple[Tensor, ...], Tensor], None]) -> Tensor:
        total = _accumulator(self.tensors[0], self.sizes[self.rank])
        returning: list[tuple[list[Any], Tensor, Tensor]] = []
        for owner, tensors in self.blocks():
            if owner == self.rank:
                compute(owner, tensors, total)
                continue
            part = _accumulator(tensors[0], self.sizes[owner])
            compute(owner, tensors, part)
            # While I had the block of a rank that far before me, the rank as far behind me had mine.
            reader = (2 * self.rank - owner) % self.world
            mine = _accumulator(self.tensors[0], self.sizes[self.rank])
            works = self._start([(dist.isend, part, owner), (dist.irecv, mine, reader)], tag=1000)
            returning.append((works, mine, part))
            if len(returning) > 1:
                self._add(total, returning.pop(0))
        for last in returning:
            self._add(total, last)
        return total

    def _add(self, total: Tensor, arrival: tuple[list[Any], Tensor, Tensor]) -> None:
        works, mine, _ = arrival
        for work in works:
            work.wait()
        total += mine

    def _post(self, step: int, held: dict[int, tuple[Tensor, ...]]) -> tuple[dict[int, tuple[Tensor, ...]], list[Any]]:
        """Starts step `step`: what will be held then, and the transfers to wait for."""
        arriving: dict[int, tuple[Tensor, ...]] = {}
        works: list[Any] = []
        for direction, steps in ((+1, self.world // 2), (-1, (self.world - 1) // 2)):
            if step > steps:
                continue
            owner = (self.rank - direction * step) % self.world
            fresh = tuple(t.new_empty((self.sizes[owner], *t.shape[1:])) for t in self.tensors)
            for index, (out, into) in enumerate(zip(held[direction], fresh, strict=True)):
                to, source = (self.rank + direction) % self.world, (self.rank - direction) % self.world
                works += self._start(
                    [(dist.isend, out, to), (dist.irecv, into, source)], tag=2 * index + (direction > 0)
                )
            arriving[direction] = fresh
        return arriving, works

    def _start(self, transfers: list[tuple[Any, Tensor, int]], tag: int) -> list[Any]:
        group = self.exchange.group
        peers = [peer if group is None else dist.get_global_rank(group, peer) for _, _, peer in transfers]
        operations = [
            dist.P2POp(kind, tensor, peer, group, tag)
            for (kind, tensor, _), peer in zip(transfers, peers, strict=True)
            if tensor.numel()
        ]
        return dist.batch_isend_irecv(operations) if operations else []


def _accumulator(like: Tensor, rows: int) -> Tensor:
    dtype = like.dtype if like.dtype == torch.float64 else torch.float32
    return torch.zeros((rows, *like.shape[1:]), dtype=dtype, device=like.device)


def _all_gather(local: Tensor, sizes: list[int], group: Any) -> list[Tensor]:
    # gloo wants equal sizes: rows are padded to the longest rank and cut again.
    longest = max(sizes)
    local = local.detach().contiguous()
    if local.shape[0] < longest:
        padded = local.new_zeros((longest, *local.shape[1:]))
        padded[: local.shape[0]] = local
        local = padded
    parts = [torch.empty_like(local) for _ in sizes]
    if longest:
        dist.all_gather(parts, local, group=group)
    return [part[:size] for part, size in zip(parts, sizes, strict=True)]
