"""Gradient cache: the exact gradient of a loss over many rows, with the activations of a few at a time.

A contrastive loss needs the vectors of the whole batch, but not their graphs. So each micro-batch is encoded twice:
once without a graph, for its vectors; then, when the loss has given the gradient of every vector, once more with a
graph, through which that gradient goes on to the weights. It costs one more forward pass, and is no approximation
(Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup").

Exact as long as a row's vector depends on nothing but the row, the weights and torch's default generators, whose
state is replayed. Layers with statistics of the batch (BatchNorm) see micro-batches instead of the batch.

Shapes: B rows of this rank, b of one micro-batch, D the width of a vector.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rayemb.errors import RayembError

M = TypeVar("M")


class Encoded(NamedTuple):
    """What the loss needs of a micro-batch, or of a batch.

    A named tuple of dicts and not a dataclass: DeepSpeed finds the tensors of a forward's result only in tuples,
    lists and dicts, and hangs its backward hooks on those that it finds.
    """

    rows: dict[str, Tensor]  # name -> (n, ...), a number of rows for each name
    shared: dict[str, Tensor]  # the loss's own parameters as values on the graph, the same in each micro-batch


def gradient_cache(
    forward: Callable[[M], Encoded],
    micro_batches: Sequence[M],
    loss: Callable[[Encoded], Tensor],
    backward: Callable[[Tensor, bool], None],
    *,
    rounds: int | None = None,
) -> Tensor:
    """The value of `loss` over all micro-batches, detached; its gradient went through `backward`.

    `forward(micro_batch)` is called twice a micro-batch, first without a graph. `loss(encoded)` is called once, with
    the rows of all micro-batches in their order, and gives this rank's scalar share; what it trains of its own must
    come in `encoded.shared`. `backward(scalar, last)` is called once a micro-batch and must back-propagate `scalar`,
    whose value means nothing. With one micro-batch it is the plain step: one forward, `backward(loss, True)`.

    `rounds`, from `most_over_ranks`, is how often *every* rank calls forward, for forwards or backwards that hold
    collectives (ZeRO): a rank with fewer micro-batches repeats its smallest one with weight zero. A rank without rows
    takes part with one micro-batch of zero rows.
    """
    if not micro_batches:
        raise RayembError(
            "there are no micro-batches", where="gradient_cache", fix="give a rank without rows one of zero rows"
        )
    rounds = len(micro_batches) if rounds is None else rounds
    if rounds < len(micro_batches):
        raise RayembError(f"{rounds} rounds are too few for {len(micro_batches)} micro-batches", where="gradient_cache")
    if rounds == 1:
        encoded = forward(micro_batches[0])
        _refuse_parameters(encoded)
        value = loss(encoded)
        # Plus zero times everything: see `_surrogate` about parameters that no gradient reaches.
        backward(value + _surrogate(encoded, {}, {}), True)
        return value.detach()
    first = _encode(forward, micro_batches, rounds)
    leaves = _concatenate(first.encoded)
    value = loss(leaves)
    gradients = _gradients(value, leaves)
    value, sizes = value.detach(), [{name: rows.shape[0] for name, rows in part.rows.items()} for part in first.encoded]
    # Here a single pass over the whole batch would have left the generators: the loss may have drawn, too.
    after = _Random.now()
    for index in range(rounds):
        padding = index >= len(micro_batches)
        source = first.smallest if padding else index
        first.random[source].restore()
        encoded = forward(micro_batches[source])
        row_gradients = _share(gradients.rows, sizes, source) if not padding else {}
        backward(_surrogate(encoded, row_gradients, gradients.shared if index == 0 else {}), index == rounds - 1)
    after.restore()
    return value


def most_over_ranks(count: int, device: torch.device | str = "cpu") -> int:
    """The largest `count` of all ranks; `count` without a process group. The device is the one of the backend."""
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return count
    most = torch.tensor([count], dtype=torch.int64, device=device)
    dist.all_reduce(most, op=dist.ReduceOp.MAX)
    return int(most)


def split(costs: Tensor, *, rows: int | None = None, budget: int | None = None) -> list[Tensor]:
    """Micro-batches as row indices, each row in exactly one; without limits, one micro-batch.

    `costs` (B,) int: the length of each row (tokens, pixels). `rows`: at most so many rows, in the order given and
    in shares as even as they can be. `budget`: at most so much padded cost, rows times the longest of them; rows are
    then sorted by length, the longest first, so that padding is small and a budget that is too large for the memory
    shows itself at once. A row that is over the budget alone is a micro-batch of its own: the rows of a corpus cannot
    be refused one by one in the middle of a run. For no rows: one micro-batch of none, since a rank must take part.
    """
    for name, limit in (("rows", rows), ("budget", budget)):
        if limit is not None and limit < 1:
            raise RayembError(f"{name} is {limit}", where="split", fix="give 1 or more, or None for no limit")
    if costs.ndim != 1 or costs.is_floating_point() or bool((costs < 0).any()):
        raise RayembError("costs must be whole numbers of 0 or more, one for each row", where="split")
    total = costs.shape[0]
    if budget is None:
        count = 1 if rows is None else max(1, -(-total // rows))
        return list(torch.arange(total, device=costs.device).tensor_split(count))
    order = torch.argsort(costs, descending=True, stable=True)
    lengths = costs[order].tolist()
    parts, start = [], 0
    while start < total:
        count = max(1, budget // max(1, lengths[start]))
        count = count if rows is None else min(count, rows)
        parts.append(order[start : start + count])
        start += count
    return parts or [order]


def take_rows(batch: Mapping[str, Tensor], rows: Tensor, ragged: Mapping[str, str] | None = None) -> dict[str, Tensor]:
    """The batch of these rows, in this order; what belongs to a row travels with it.

    `ragged` maps a tensor that holds several entries for each row (hard negatives), or none, to the name of the
    (B,) counts in the same batch: entries lie in the order of the rows. All other tensors have one entry a row.
    """
    ragged = ragged or {}
    return {
        name: tensor[_positions(batch[ragged[name]], rows, name, tensor.shape[0]) if name in ragged else rows]
        for name, tensor in batch.items()
    }


def cut(
    batch: Mapping[str, Tensor], parts: Sequence[Tensor], ragged: Mapping[str, str] | None = None
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """The micro-batches of `split`, and the whole batch in their order: the keys that go with the encoded rows.

    Tensors are as wide as in the batch: who splits by a budget cuts each micro-batch to its own longest row.
    """
    return [take_rows(batch, part, ragged) for part in parts], take_rows(batch, torch.cat(list(parts)), ragged)


@dataclass(frozen=True)
class _Random:
    """State of the generators that a forward draws from: the CPU's and, once it is used, this process's GPU's."""

    cpu: Tensor
    cuda: Tensor | None

    @classmethod
    def now(cls) -> "_Random":
        used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        return cls(torch.get_rng_state(), torch.cuda.get_rng_state() if used else None)

    def restore(self) -> None:
        torch.set_rng_state(self.cpu)
        if self.cuda is not None:
            torch.cuda.set_rng_state(self.cuda)


@dataclass(frozen=True)
class _FirstPass:
    encoded: list[Encoded]
    random: list[_Random]  # before each micro-batch
    smallest: int


@dataclass(frozen=True)
class _Gradients:
    rows: dict[str, Tensor]
    shared: dict[str, Tensor]


@torch.no_grad()
def _encode(forward: Callable[[M], Encoded], micro_batches: Sequence[M], rounds: int) -> _FirstPass:
    encoded: list[Encoded] = []
    random: list[_Random] = []
    for micro_batch in micro_batches:
        random.append(_Random.now())
        encoded.append(forward(micro_batch))
    sizes = [sum(rows.numel() for rows in part.rows.values()) for part in encoded]
    smallest = sizes.index(min(sizes))
    after = _Random.now()
    for _ in range(rounds - len(micro_batches)):
        forward(micro_batches[smallest])
    # Padding must not move the generators: the numbers of this rank would depend on the other ranks' batches.
    after.restore()
    return _FirstPass(encoded, random, smallest)


def _concatenate(parts: Sequence[Encoded]) -> Encoded:
    """All rows in order, and the shared values, as leaves of a new graph."""
    first = parts[0]
    _refuse_parameters(first)
    for part in parts[1:]:
        if part.rows.keys() != first.rows.keys() or part.shared.keys() != first.shared.keys():
            names = [sorted([*encoded.rows, *encoded.shared]) for encoded in (first, part)]
            raise RayembError(
                f"forward gave {names[0]} for one micro-batch and {names[1]} for another",
                where="gradient_cache",
                fix="give the same names each time, with zero rows where there are none",
            )
    return Encoded(
        {name: _leaf(torch.cat([part.rows[name] for part in parts])) for name in first.rows},
        {name: _leaf(value.clone()) for name, value in first.shared.items()},
    )


def _leaf(value: Tensor) -> Tensor:
    return value.detach().requires_grad_(value.is_floating_point())


def _gradients(value: Tensor, leaves: Encoded) -> _Gradients:
    names = [(kind, name) for kind in (0, 1) for name, leaf in leaves[kind].items() if leaf.requires_grad]
    inputs = [leaves[kind][name] for kind, name in names]
    found: _Gradients = _Gradients({}, {})
    if not value.requires_grad:
        return found
    _refuse_other_leaves(value, inputs)
    for (kind, name), gradient in zip(names, torch.autograd.grad(value, inputs, allow_unused=True), strict=True):
        if gradient is not None:
            (found.shared if kind else found.rows)[name] = gradient
    return found


def _refuse_other_leaves(value: Tensor, inputs: Sequence[Tensor]) -> None:
    """Else a parameter that the loss takes from elsewhere would be trained by the plain step and not by this one."""
    known, seen, stack = {id(leaf) for leaf in inputs}, set(), [value.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [parent for parent, _ in node.next_functions]
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor) and id(variable) not in known:
            raise RayembError(
                f"the loss uses a parameter {tuple(variable.shape)} that forward did not return",
                where="gradient_cache",
                fix="return it in Encoded.shared, and take it from there in the loss",
            )


def _refuse_parameters(encoded: Encoded) -> None:
    """ZeRO-3 takes a parameter's values away when the forward ends; what is computed from it stays."""
    for name, value in encoded.shared.items():
        if isinstance(value, nn.Parameter):
            raise RayembError(
                f"the parameter {name!r} itself is in Encoded.shared", where="gradient_cache", fix="return its clone()"
            )


def _share(gradients: Mapping[str, Tensor], sizes: Sequence[Mapping[str, int]], index: int) -> dict[str, Tensor]:
    """The gradients of the rows of micro-batch `index`."""
    starts = {name: sum(size[name] for size in sizes[:index]) for name in gradients}
    return {name: rows[starts[name] : starts[name] + sizes[index][name]] for name, rows in gradients.items()}


def _surrogate(encoded: Encoded, rows: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> Tensor:
    """A scalar whose gradient with respect to `encoded` is the one given, zero where none is given.

    Zero and not left out: every backward reaches the same parameters on every rank. ZeRO-2 and 3 reduce in the order
    in which gradients arrive, ZeRO-3 adds to last step's gradient what misses the first micro-batch, and ZeRO-2 with
    offload loses what misses the last.
    """
    terms = []
    for values, gradients in ((encoded.rows, rows), (encoded.shared, shared)):
        for name, value in values.items():
            if not value.requires_grad:
                continue
            # fp32 at least: a sum in the rows' bf16 could be infinite, and DeepSpeed scales and checks this scalar.
            wide = value.to(torch.promote_types(value.dtype, torch.float32))
            gradient = gradients.get(name)
            terms.append(wide.sum() * 0 if gradient is None else (wide * gradient.to(wide.dtype)).sum())
    if not terms:
        raise RayembError("nothing that forward returned has a graph", where="gradient_cache", fix="train something")
    return sum(terms[1:], terms[0])


def _positions(counts: Tensor, rows: Tensor, name: str, entries: int) -> Tensor:
    """Where the entries of `rows` lie, `counts` (B,) being the number of entries of each row of the batch."""
    if int(counts.sum()) != entries:
        raise RayembError(f"{name!r} has {entries} entries, its counts say {int(counts.sum())}", where="take_rows")
    starts, wanted = counts.cumsum(0) - counts, counts[rows]
    within = torch.arange(int(wanted.sum()), device=counts.device) - (wanted.cumsum(0) - wanted).repeat_interleave(
        wanted
    )
    return starts[rows].repeat_interleave(wanted) + within
