"""Exchanges with real processes: who sees what and when, equal results, and errors that reach every rank."""

import os
import time
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from rayemb.errors import RayembError
from rayemb.losses import Batch, GISTEmbedConfig, InfoNCEConfig
from rayemb.parallel import (
    Alone,
    Exchange,
    ExchangeError,
    Gather,
    Pairs,
    Ring,
    Tiling,
    Veto,
    contrast,
    exchange_named,
)
from tests.parallel.processes import run_processes

SIZES = {2: [3, 0], 3: [2, 4, 1], 4: [1, 3, 0, 2]}
EXCHANGES: dict[str, Callable[..., Exchange]] = {"gather": Gather, "ring": Ring}


# -- what a rank of each world reports -----------------------------------------------------------------------------


def on_rank(rank: int, world: int) -> dict[str, Any]:
    """Everything that the tests below look at: processes are started once for each world."""
    group = dist.new_group(timeout=timedelta(seconds=30))
    found: dict[str, Any] = {}
    for name, exchange in EXCHANGES.items():
        found[name] = {
            "blocks": blocks(exchange(group=group), rank, SIZES[world]),
            "collected": collected(exchange(group=group), rank, SIZES[world]),
            "sides": [sides(exchange(Tiling(2, 3), group), rank, SIZES[world], dtype) for dtype in DTYPES],
            "small": small(exchange(group=group), rank),
            "errors": {what: error(exchange(group=group), rank, what) for what in WRONG},
            # An error leaves nothing behind: the next step of the same group goes well.
            "after": float(loss(exchange(group=group), rank, "nothing")),
        }
    found["scattered"] = [scattered(Gather(group=group), rank, sizes) for sizes in ([3] * world, SIZES[world])]
    found["late"] = waiting_for_a_rank_that_raised(rank)
    return found


@cache
def reports(world: int) -> list[dict[str, Any]]:
    return run_processes(world, on_rank)


@pytest.fixture(params=sorted(SIZES))
def world(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(params=sorted(EXCHANGES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


# -- blocks and gradients ------------------------------------------------------------------------------------------


def rows_of(rank: int, sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Vectors and their guide's, of another dtype and dimension, that say whose they are."""
    vectors = 10.0 * rank + torch.arange(sizes[rank], dtype=torch.float64)
    return vectors[:, None].expand(-1, 2), vectors[:, None].expand(-1, 3).float()


def blocks(exchange: Exchange, rank: int, sizes: list[int]) -> list[tuple[int, Tensor, Tensor]]:
    visits = exchange.visits(rows_of(rank, sizes), sizes)
    return [(owner, *(rows.clone() for rows in tensors)) for owner, tensors in visits.blocks()]


def collected(exchange: Exchange, rank: int, sizes: list[int]) -> Tensor:
    def compute(owner: int, tensors: tuple[Tensor, ...], gradient: Tensor) -> None:
        gradient += 100.0**rank * (1 + tensors[0])

    return exchange.visits(rows_of(rank, sizes), sizes).collect(compute)


def scattered(exchange: Gather, rank: int, sizes: list[int]) -> Tensor:
    exchange.scatters = True
    return collected(exchange, rank, sizes)


def test_every_rank_sees_every_block_once_its_own_first(world: int, name: str) -> None:
    sizes = SIZES[world]
    for rank, report in enumerate(reports(world)):
        owners = [owner for owner, _, _ in report[name]["blocks"]]
        assert sorted(owners) == list(range(world))
        assert owners[0] == rank
        if name == "ring":  # from before and from behind, one step further each time
            distances = [min((rank - owner) % world, (owner - rank) % world) for owner in owners]
            assert distances == sorted(distances)
        for owner, vectors, guides in report[name]["blocks"]:
            for found, right in zip((vectors, guides), rows_of(owner, sizes), strict=True):
                assert found.dtype == right.dtype
                assert torch.equal(found, right)


def test_gradients_of_a_block_come_home_from_every_rank(world: int, name: str) -> None:
    sizes = SIZES[world]
    for rank, report in enumerate(reports(world)):
        factor = sum(100.0**other for other in range(world))
        assert torch.equal(report[name]["collected"], factor * (1 + rows_of(rank, sizes)[0]))


def test_reduced_and_scattered_they_are_the_same(world: int) -> None:
    for rank, report in enumerate(reports(world)):
        factor = sum(100.0**other for other in range(world))
        for sizes, found in zip(([3] * world, SIZES[world]), report["scattered"], strict=True):
            assert torch.equal(found, factor * (1 + rows_of(rank, sizes)[0]))


# -- equal results -------------------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.float64)


def sides(exchange: Exchange, rank: int, sizes: list[int], dtype: torch.dtype) -> list[Tensor]:
    """Sides and gradients of a contrast with all that travels: keys, biases, a guide, thresholds of columns."""
    generator = torch.Generator().manual_seed(rank)
    rows, more = sizes[rank], sizes[rank] + rank

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    leaves = [normal(rows, 4).requires_grad_(), normal(more, 4).requires_grad_(), normal(more).requires_grad_()]
    veto = Veto(normal(rows) + 1, normal(rows) + 1, normal(rows, 3), normal(more, 3))
    keys = (torch.arange(rows), torch.arange(more) + 1)
    pairs = Pairs(own=torch.arange(rows), keys=keys, duplicates="positive", vetoes=(veto, Veto(normal(rows) + 2)))
    found = contrast(leaves[0], leaves[1], pairs, exchange=exchange, columns=rows, bias_C=leaves[2])
    values = [getattr(side, field) for side in found if side is not None for field in ("negatives", "attraction")]
    total = sum((torch.where(value.isfinite(), value, 0.0).sum() for value in values), leaves[0].sum() * 0)
    return [value.detach() for value in values] + list(torch.autograd.grad(total, leaves))


def test_a_ring_gives_what_a_gather_gives(world: int) -> None:
    for report in reports(world):
        for dtype, gathered, ringed in zip(DTYPES, report["gather"]["sides"], report["ring"]["sides"], strict=True):
            tolerance = 1e-6 if dtype == torch.float32 else 1e-13
            for a, b in zip(gathered, ringed, strict=True):
                assert a.dtype == b.dtype == dtype
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# -- small things --------------------------------------------------------------------------------------------------


def small(exchange: Exchange, rank: int) -> dict[str, Any]:
    world = exchange.world
    mine = torch.full((rank, 2), rank)
    flags = torch.tensor([rank % 2 == 0])
    return {
        "share": exchange.share(mine, list(range(world))),
        "flags": exchange.share(flags, [1] * world),
        "nothing": exchange.share(mine[:0], [0] * world),
        "sum": exchange.reduce(torch.tensor([rank, 1.0])),
        "max": exchange.reduce(torch.tensor([-1.0 - rank, float("-inf")]), "max"),
        "empty": exchange.reduce(torch.zeros(3, 0)),
        "agree": exchange.agree(None, rank, 2**40),
        "agree on nothing": exchange.agree(None),
    }


def test_small_tables_are_shared_and_reduced(world: int, name: str) -> None:
    for report in reports(world):
        found = report[name]["small"]
        assert found["share"].tolist() == [[rank] * 2 for rank in range(world) for _ in range(rank)]
        assert found["flags"].tolist() == [rank % 2 == 0 for rank in range(world)]
        assert found["nothing"].shape == (0, 2)
        assert found["sum"].tolist() == [world * (world - 1) / 2, world]
        assert found["max"].tolist() == [-1.0, float("-inf")]
        assert found["empty"].shape == (3, 0)
        assert found["agree"] == [[rank, 2**40] for rank in range(world)]
        assert found["agree on nothing"] == [[]] * world


def test_one_process_is_alone() -> None:
    for name in ("gather", "ring"):
        exchange = exchange_named(name, Tiling(3, 4))
        assert isinstance(exchange, Alone)
        assert exchange.tiling == Tiling(3, 4)
        assert (exchange.rank, exchange.world) == (0, 1)
        assert exchange.agree(None, 5) == [[5]]
    with pytest.raises(ExchangeError, match="the batch: too few"):
        Alone().agree("too few")


def in_a_part(rank: int, world: int) -> list[Any]:
    """Ranks 1 and 2 of three make a group, in which they are 0 and 1."""
    group = dist.new_group([1, 2])
    if rank == 0:
        return []
    found: list[Any] = []
    for exchange in (Gather(Tiling(1, 2), group), Ring(Tiling(1, 2), group)):
        found.append((exchange.rank, exchange.world, *sides(exchange, exchange.rank, [3, 2], torch.float64)))
    return found


def test_a_group_may_be_a_part_of_the_processes() -> None:
    whole = run_processes(2, in_the_whole)
    for rank, (found, expected) in enumerate(zip(run_processes(3, in_a_part)[1:], whole, strict=True)):
        for index, (own, world, *values) in enumerate(found):
            assert (own, world) == (rank, 2)
            for value, right in zip(values, expected[index], strict=True):
                torch.testing.assert_close(value, right, rtol=1e-13, atol=1e-13)


def in_the_whole(rank: int, world: int) -> list[list[Tensor]]:
    return [sides(exchange(Tiling(1, 2)), rank, [3, 2], torch.float64) for exchange in (Gather, Ring)]


# -- errors --------------------------------------------------------------------------------------------------------

# What is wrong -> on which rank (the last one if there are fewer), and what every rank says.
WRONG = {
    "not finite": (1, r"queries row 2 is not finite"),
    "zero": (2, r"documents row 0 is a zero vector"),
    "negatives": (1, r"negatives have 3 dimensions, queries 4"),
    "keys": (1, r"keys has 2 rows, not 3"),
    "weights": (1, r"pairs\.weights has a negative or non-finite weight"),
    "two": (1, r"queries row 2 is not finite"),
    # Each rank alone makes sense; together they do not.
    "dimensions": (1, r"it has vectors of 5 dimensions .*; rank 0 has vectors of 4 dimensions"),
    "dtype": (1, r"it has vectors of 4 dimensions \(torch\.float64.*; rank 0 has .*torch\.float32"),
    "no keys": (1, r"it has .* no keys.*; rank 0 has .* keys of shape"),
    "two keys": (1, r"it has .*keys of shape \(n, 2\).*; rank 0 has .*keys of shape"),
    "no graph": (1, r"it has .* no graph.*; rank 0 has .* a graph"),
    "guide": (1, r"it has .*a veto by 6 dimensions.*; rank 0 has .*a veto by 5 dimensions"),
}


def loss(exchange: Exchange, rank: int, what: str) -> Tensor:
    generator = torch.Generator().manual_seed(rank)
    culprit = what in WRONG and rank == min(WRONG[what][0], exchange.world - 1)
    dim = 5 if culprit and what == "dimensions" else 4

    def normal(rows: int, dim: int = dim) -> Tensor:
        return torch.randn(rows, dim, generator=generator)

    queries, documents, keys = normal(3), normal(3), torch.arange(3) + rank
    given: dict[str, Any] = {"keys": keys}
    if what == "guide":
        given["guide"] = Batch(*(normal(3, 6 if culprit else 5) for _ in range(2)))
    if culprit and what in ("not finite", "two"):
        queries[2, 1] = float("nan") if what == "two" else float("inf")
    if what == "two" and rank == exchange.world - 1 and not culprit:
        documents[1] = 0  # a second rank with something to say: everybody hears the first one
    if culprit and what == "zero":
        documents[0] = 0
    if culprit and what == "negatives":
        given["negatives"] = normal(2, 3)
    if culprit and what == "keys":
        given["keys"] = keys[:2]
    if culprit and what == "weights":
        given["weights"] = -torch.eye(3)
    if culprit and what == "dtype":
        queries, documents = queries.double(), documents.double()
    if culprit and what == "no keys":
        del given["keys"]
    if culprit and what == "two keys":
        given["keys"] = torch.stack([keys, keys], 1)
    config = GISTEmbedConfig() if what == "guide" else InfoNCEConfig()
    with torch.set_grad_enabled(not (culprit and what == "no graph")):
        return config.build(4)(Batch(queries.requires_grad_(), documents, **given), exchange).detach()


def error(exchange: Exchange, rank: int, what: str) -> tuple[str, str, float]:
    start = time.monotonic()
    try:
        loss(exchange, rank, what)
    except RayembError as caught:
        return type(caught).__name__, str(caught), time.monotonic() - start
    return "", "nothing was raised", time.monotonic() - start


@pytest.mark.parametrize("what", WRONG)
def test_an_error_of_one_rank_is_raised_by_all_of_them(world: int, name: str, what: str) -> None:
    rank, message = WRONG[what]
    found = [report[name]["errors"][what] for report in reports(world)]
    assert {kind for kind, _, _ in found} == {ExchangeError.__name__}
    texts = {text for _, text, _ in found}
    assert len(texts) == 1
    text = texts.pop()
    assert text.startswith(f"rank {min(rank, world - 1)} of {world}: ")
    with pytest.raises(ExchangeError, match=message):
        raise ExchangeError(text)
    assert max(seconds for _, _, seconds in found) < 5


def test_the_step_after_an_error_goes_well(world: int, name: str) -> None:
    losses = [report[name]["after"] for report in reports(world)]
    assert all(value > 0 for value in losses)


def waiting_for_a_rank_that_raised(rank: int) -> tuple[str, float]:
    """What the others see when rank 0 raises before it comes to its exchange: nothing, until the group's timeout.

    Nobody can tell them. So whatever can go wrong is said by `agree`, and a process that raises elsewhere must end:
    then its connections close, and the others raise at once.
    """
    group = dist.new_group(timeout=timedelta(seconds=3))
    if rank == 0:
        return "raised alone", 0.0
    start = time.monotonic()
    try:
        loss(Ring(group=group), rank, "nothing")
    except RuntimeError as caught:
        return str(caught), time.monotonic() - start
    return "nothing was raised", time.monotonic() - start


def test_others_wait_for_a_rank_that_raised_alone_until_the_timeout(world: int) -> None:
    for report in reports(world)[1:]:
        text, seconds = report["late"]
        assert "imed out" in text or "onnection" in text
        assert 1 < seconds < 20 or "onnection" in text


def ends(rank: int, folder: Path) -> None:
    """Rank 0 raises alone and its process ends; rank 1 writes down what it saw."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    Ring().agree(None)  # connections are made
    if rank == 0:
        os._exit(1)  # not SystemExit: gloo's threads may abort an interpreter that shuts down with an open group
    start = time.monotonic()
    try:
        loss(Ring(), rank, "nothing")
    except RuntimeError as caught:
        (folder / "seen").write_text(f"{time.monotonic() - start:.1f} {caught}")
    os._exit(0)


def test_others_raise_at_once_when_the_process_ends(tmp_path: Path) -> None:
    context = mp.get_context("spawn")
    children = [context.Process(target=ends, args=(rank, tmp_path)) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(60)
    assert [child.exitcode for child in children] == [1, 0]
    seconds, text = (tmp_path / "seen").read_text().split(" ", 1)
    assert float(seconds) < 10
    assert "onnection" in text
