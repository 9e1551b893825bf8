"""The gradient cache against plain autograd over the whole batch, in one process and in two."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from rayemb.errors import RayembError
from rayemb.parallel.cache import Encoded, cut, gradient_cache, most_over_ranks, split, take_rows
from tests.parallel.gather import gather_rows
from tests.parallel.processes import run_processes

WIDTH, DIM, RAGGED = 6, 4, {"negatives": "counts"}
Grads = dict[str, Tensor]


class Toy(nn.Module):
    """Two towers with dropout, hard negatives through the second, a temperature and a matrix of the loss."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.query = nn.Sequential(nn.Linear(WIDTH, 16), nn.GELU(), nn.Dropout(dropout), nn.Linear(16, DIM))
        self.document = nn.Sequential(nn.Linear(WIDTH, 16), nn.Dropout(dropout), nn.GELU(), nn.Linear(16, DIM))
        self.log_scale = nn.Parameter(torch.tensor([1.0]))
        self.metric = nn.Parameter(torch.randn(DIM, DIM))

    def forward(self, batch: dict[str, Tensor]) -> Encoded:
        rows = {
            "queries": self.query(batch["queries"]),
            "documents": self.document(batch["documents"]),
            "negatives": self.document(batch["negatives"]),
        }
        return Encoded(rows, {"log_scale": self.log_scale.clone(), "metric": self.metric.clone()})


def contrast(encoded: Encoded) -> Tensor:
    """Each query against all documents and negatives of all ranks; this rank's share of the mean."""
    documents = gather_rows(encoded.rows["documents"])
    keys = torch.cat([documents.rows, gather_rows(encoded.rows["negatives"]).rows])
    logits = encoded.shared["log_scale"].exp() * encoded.rows["queries"] @ encoded.shared["metric"] @ keys.T
    targets = torch.arange(documents.count) + documents.start
    return F.cross_entropy(logits, targets, reduction="sum") * documents.weight


def toy(dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> Toy:
    torch.manual_seed(0)
    return Toy(dropout).to(dtype)


def batch(rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    counts = torch.arange(rows) % 3
    sizes = {"queries": rows, "documents": rows, "negatives": int(counts.sum())}
    made = {name: torch.randn(n, WIDTH, generator=generator, dtype=torch.float64) for name, n in sizes.items()}
    return {**made, "counts": counts}


def limited(rows: int, limit: int | None) -> list[dict[str, Tensor]]:
    return cut(batch(rows), split(torch.ones(rows, dtype=torch.int64), rows=limit), RAGGED)[0]


def grads(module: nn.Module) -> Grads:
    return {name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None}


def cached(
    module: Callable[[Any], Encoded], parts: list[Any], loss: Callable[[Encoded], Tensor] = contrast, **options: Any
) -> tuple[Tensor, list[bool]]:
    calls: list[bool] = []

    def backward(scalar: Tensor, last: bool) -> None:
        calls.append(last)
        scalar.backward()

    return gradient_cache(module, parts, loss, backward, **options), calls


def close(found: Grads, expected: Grads) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize(("limit", "rounds"), [(None, 1), (11, 1), (4, 3), (3, 4), (1, 11)])
def test_cached_is_the_plain_step(limit: int | None, rounds: int) -> None:
    plain, module = toy(), toy()
    expected = contrast(plain(batch(11)))
    expected.backward()
    value, calls = cached(module, limited(11, limit))
    assert not value.requires_grad
    torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-10)
    close(grads(module), grads(plain))
    assert calls == [False] * (rounds - 1) + [True]


def test_cached_is_the_plain_step_whatever_the_order_of_rows() -> None:
    plain, module = toy(), toy()
    contrast(plain(batch(11))).backward()
    parts = split(torch.arange(11) % 5, budget=9)
    micro_batches, whole = cut(batch(11), parts, RAGGED)
    cached(module, micro_batches)
    close(grads(module), grads(plain))
    assert torch.equal(torch.cat([part["queries"] for part in micro_batches]), whole["queries"])


@pytest.mark.parametrize("rounds", [None, 7])
def test_dropout_is_the_same_in_both_passes(rounds: int | None) -> None:
    """And gradients are those of the same micro-batches with all graphs kept, and the generator moves the same."""

    def noisy(encoded: Encoded) -> Tensor:
        return contrast(encoded) * (1 + torch.rand((), dtype=torch.float64))

    kept, module, parts = toy(0.5), toy(0.5), limited(11, 4)
    torch.manual_seed(3)
    encoded = [kept(part) for part in parts]
    rows = {name: torch.cat([part.rows[name] for part in encoded]) for name in encoded[0].rows}
    expected = noisy(Encoded(rows, encoded[0].shared))
    expected.backward()
    state = torch.get_rng_state()
    seen: list[tuple[bool, dict[str, Tensor]]] = []

    def forward(part: dict[str, Tensor]) -> Encoded:
        result = module(part)
        seen.append((torch.is_grad_enabled(), {name: value.detach() for name, value in result.rows.items()}))
        return result

    torch.manual_seed(3)
    value, _ = cached(forward, parts, noisy, rounds=rounds)
    count = len(seen) // 2
    assert [graph for graph, _ in seen] == [False] * count + [True] * count
    for (_, first), (_, second) in zip(seen[: len(parts)], seen[count:], strict=False):
        assert all(torch.equal(first[name], second[name]) for name in first)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-10)
    close(grads(module), grads(kept))
    assert torch.equal(torch.get_rng_state(), state)


def test_what_the_loss_does_not_reach_gets_zeros() -> None:
    """Not None: DeepSpeed would keep the gradient of the step before."""

    def no_metric(encoded: Encoded) -> Tensor:
        return (encoded.rows["queries"] @ encoded.rows["queries"].T).square().mean() * encoded.shared["log_scale"].sum()

    for limit in (None, 4):
        module = toy()
        cached(module, limited(11, limit), no_metric)
        found = grads(module)
        assert found.keys() == dict(module.named_parameters()).keys()
        assert not found["metric"].any()
        assert not found["document.0.weight"].any()
        assert found["query.0.weight"].any()
        assert found["log_scale"].any()


def test_a_frozen_tower_stays_frozen() -> None:
    plain, module = toy(), toy()
    for each in (plain, module):
        each.document.requires_grad_(False)
    contrast(plain(batch(11))).backward()
    cached(module, limited(11, 4))
    close(grads(module), grads(plain))


def test_rows_in_bf16_come_back_through_fp32() -> None:
    dtypes, seen = [], []

    def loss(encoded: Encoded) -> Tensor:
        seen.extend(value.dtype for value in encoded.rows.values())
        return contrast(Encoded({k: v.float() for k, v in encoded.rows.items()}, encoded.shared))

    def forward(part: dict[str, Tensor]) -> Encoded:
        result = module({name: value.float() for name, value in part.items()})
        return Encoded({name: value.bfloat16() for name, value in result.rows.items()}, result.shared)

    def backward(scalar: Tensor, last: bool) -> None:
        dtypes.append(scalar.dtype)
        scalar.backward()

    expected = toy(dtype=torch.float32)
    module = expected
    loss(forward(batch(11))).backward()
    module = toy(dtype=torch.float32)
    gradient_cache(forward, limited(11, 4), loss, backward)
    assert set(seen) == {torch.bfloat16}
    assert set(dtypes) == {torch.float32}
    for name, value in grads(expected).items():
        torch.testing.assert_close(grads(module)[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_activations_of_one_micro_batch_at_a_time() -> None:
    def peak(limit: int | None) -> int:
        held = most = 0

        class Saved:
            def __init__(self, tensor: Tensor) -> None:
                self.tensor = tensor

        def free(size: int) -> None:
            nonlocal held
            held -= size

        def pack(tensor: Tensor) -> Saved:
            nonlocal held, most
            saved, size = Saved(tensor), tensor.numel()
            held, most = held + size, max(most, held + size)
            weakref.finalize(saved, free, size)
            return saved

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
            cached(toy(), limited(64, limit), lambda encoded: encoded.rows["documents"].mean())
        return most

    assert peak(4) < peak(None) / 4


def on_rank(rank: int, world: int) -> list[tuple[Tensor, Grads, int]]:
    found = []
    for shares in ((7, 4), (11, 0), (5, 6)):
        start = sum(shares[:rank])
        mine = take_rows(batch(11), torch.arange(start, start + shares[rank]), RAGGED)
        for limit in (None, (3, 2)[rank]):
            module, calls = toy(), 0

            def forward(part: dict[str, Tensor], module: Toy = module) -> Encoded:
                nonlocal calls
                calls += 1
                # Like ZeRO-3's gathering of weights: a rank that calls less often would wait for ever.
                torch.distributed.all_reduce(torch.zeros(1))
                return module(part)

            parts = split(torch.ones(shares[rank], dtype=torch.int64), rows=limit)
            rounds = most_over_ranks(len(parts))
            value, _ = cached(forward, cut(mine, parts, RAGGED)[0], rounds=rounds)
            torch.distributed.all_reduce(value)
            for parameter in module.parameters():
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= world
            found.append((value / world, grads(module), calls))
    return found


def test_two_processes_have_the_gradient_of_one() -> None:
    plain = toy()
    expected = contrast(plain(batch(11)))
    expected.backward()
    first, second = run_processes(2, on_rank)
    assert [calls for _, _, calls in first] == [calls for _, _, calls in second] == [1, 6, 1, 8, 1, 6]
    for value, found, _ in first + second:
        torch.testing.assert_close(value, expected.detach(), rtol=1e-10, atol=1e-10)
        close(found, grads(plain))


def test_refuses_what_would_train_wrongly() -> None:
    module, parts = toy(), limited(6, 2)
    with pytest.raises(RayembError, match="no micro-batches"):
        cached(module, [])
    with pytest.raises(RayembError, match="2 rounds are too few for 3"):
        cached(module, parts, rounds=2)
    with pytest.raises(RayembError, match=r"parameter \(4, 4\) that forward did not return"):
        cached(module, parts, lambda encoded: (encoded.rows["queries"] @ module.metric).sum())
    with pytest.raises(RayembError, match="nothing that forward returned"):
        cached(module.requires_grad_(False), parts)
    module.requires_grad_(True)
    for given_parts in (parts, parts[:1]):
        with pytest.raises(RayembError, match="parameter 'metric' itself"):
            cached(lambda part: Encoded(module(part).rows, {"metric": module.metric}), given_parts)
    names = iter("ab" * 3)
    with pytest.raises(RayembError, match=r"\['a'\] for one micro-batch and \['b'\]"):
        cached(lambda part: Encoded({next(names): module(part).rows["queries"]}, {}), parts)


@given(
    st.lists(st.integers(0, 50), max_size=40),
    st.one_of(st.none(), st.integers(1, 12)),
    st.one_of(st.none(), st.integers(1, 120)),
)
def test_split_takes_each_row_once_and_keeps_the_limits(costs: list[int], rows: int | None, budget: int | None) -> None:
    parts = split(torch.tensor(costs, dtype=torch.int64), rows=rows, budget=budget)
    assert parts
    assert sorted(torch.cat(parts).tolist()) == list(range(len(costs)))
    if len(parts) > 1:
        assert all(len(part) for part in parts)
    for part in parts:
        longest = max((costs[i] for i in part.tolist()), default=0)
        assert rows is None or len(part) <= rows
        assert budget is None or len(part) <= 1 or len(part) * longest <= budget
    if budget is None:
        assert torch.cat(parts).tolist() == list(range(len(costs)))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        assert len(parts) == (1 if rows is None else max(1, -(-len(costs) // rows)))
    else:
        lengths = [costs[i] for part in parts for i in part.tolist()]
        assert lengths == sorted(lengths, reverse=True)


def test_split_refuses_limits_and_costs_that_mean_nothing() -> None:
    for options in ({"rows": 0}, {"budget": -1}):
        with pytest.raises(RayembError, match="give 1 or more"):
            split(torch.ones(3, dtype=torch.int64), **options)
    for costs in (torch.ones(3), torch.tensor([1, -1]), torch.ones(2, 2, dtype=torch.int64)):
        with pytest.raises(RayembError, match="whole numbers"):
            split(costs)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12), st.data())
def test_what_belongs_to_a_row_travels_with_it(counts: list[int], data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, len(counts) - 1), max_size=12))
    owners = [row for row, count in enumerate(counts) for _ in range(count)]
    whole = {"key": torch.arange(len(counts)), "counts": torch.tensor(counts), "negatives": torch.arange(len(owners))}
    taken = take_rows(whole, torch.tensor(rows, dtype=torch.int64), RAGGED)
    assert taken["key"].tolist() == rows
    assert taken["counts"].tolist() == [counts[row] for row in rows]
    assert taken["negatives"].tolist() == [i for row in rows for i, owner in enumerate(owners) if owner == row]


def test_counts_that_do_not_add_up_are_refused() -> None:
    whole = {"counts": torch.tensor([1, 2]), "negatives": torch.zeros(2, 5)}
    with pytest.raises(RayembError, match="'negatives' has 2 entries, its counts say 3"):
        take_rows(whole, torch.tensor([0]), RAGGED)
