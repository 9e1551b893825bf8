"""Every loss at any world size, by any exchange, in any tiles, cached or not, is the loss of one process.

The matrix: all losses with their options, gather and ring, W = 1 to 4 real processes, even and ragged ranks (one row,
none), hard negatives (none, two, a different number per query), one tile and many, plain and cached steps. The oracle
is `tests.losses.oracles`: loops over explicit pairs of the whole batch in fp64.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import cache
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from pydantic import TypeAdapter
from torch import Tensor, nn

from rayemb.losses import AnyLoss, Batch, Loss
from rayemb.parallel import NO_KEY, ExchangeName, Tiling, exchange_named
from rayemb.parallel.cache import Encoded, cut, gradient_cache, split
from tests.losses.oracles import reference_steps
from tests.parallel.processes import run_processes

WIDTH, DIM, TOTAL, STEPS, MEMORY = 5, 6, 6, 3, 5
NEGATIVES = {"none": [0] * TOTAL, "two": [2] * TOTAL, "ragged": [0, 3, 1, 0, 2, 1]}
SIZES: dict[int, list[tuple[int, ...]]] = {
    1: [(6,)],
    2: [(3, 3), (5, 1), (0, 6)],
    3: [(2, 2, 2), (4, 1, 1), (3, 0, 3)],
    4: [(2, 1, 3, 0)],
}
TILES = {"one": Tiling(), "many": Tiling(2, 3)}
# Half of exchange x tiles x cached, so chosen that every two of them meet in every combination.
HOW: list[tuple[ExchangeName, str, bool]] = [
    ("gather", "one", False),
    ("gather", "many", True),
    ("ring", "many", False),
    ("ring", "one", True),
]


@dataclass(frozen=True)
class Option:
    """A loss, and what its batch has besides vectors."""

    config: dict[str, Any]
    has: tuple[str, ...] = (
        "keys",
    )  # keys, keys2, negative_keys, weights, sparse, tasks, labels, guide, memory, single
    progress: float = 0.0

    def build(self) -> Loss:
        """The loss in fp64, its parameters moved away from where they start."""
        torch.manual_seed(7)
        loss: Loss = parsed(self.config).build(DIM).double()
        with torch.no_grad():
            for name, parameter in loss.named_parameters():
                if parameter.requires_grad:
                    parameter += torch.randn_like(parameter) * (0.5 if name.endswith("proxies") else 0.1)
        return loss


LOSS: TypeAdapter[Any] = TypeAdapter(AnyLoss)


def parsed(config: Mapping[str, Any]) -> Any:
    return LOSS.validate_python(config)


def learned(name: str, temperature: float = 0.25, **options: Any) -> dict[str, Any]:
    return {"name": name, "temperature": temperature, "learnable_temperature": True, **options}


Q2D, D2Q, Q2Q, D2D = "query_to_document", "document_to_query", "query_to_query", "document_to_document"
JOINT: dict[str, Any] = {"directions": (Q2D, D2Q, Q2Q, D2D), "partition": "joint"}
BOTH = ("keys", "negative_keys")
INFONCE = learned("infonce")
GTE = learned("infonce", **JOINT, duplicates="ignore")

OPTIONS: dict[str, Option] = {
    "infonce": Option(INFONCE, BOTH),
    "infonce-margin-ignore": Option(learned("infonce", margin=0.2, duplicates="ignore"), BOTH),
    "infonce-negative": Option(learned("infonce", duplicates="negative"), BOTH),
    "infonce-two-keys": Option(learned("infonce", directions=(Q2D,)), ("keys2", "negative_keys")),
    "infonce-backwards": Option(learned("infonce", directions=(D2Q,)), ("keys2",)),
    "infonce-no-keys": Option(INFONCE, ()),
    "infonce-weights": Option(learned("infonce", margin=0.1, duplicates="ignore"), ("keys", "weights")),
    "infonce-sparse-weights": Option(INFONCE, (*BOTH, "sparse")),
    "infonce-memory": Option(learned("infonce", directions=(Q2D,), duplicates="ignore"), (*BOTH, "memory")),
    "gte": Option(GTE, BOTH),
    "gte-positive": Option(learned("infonce", **JOINT, margin=0.1), (*BOTH, "memory")),
    "gte-negative": Option(learned("infonce", **JOINT, duplicates="negative"), ("keys2",)),
    "gte-weights": Option(GTE, (*BOTH, "sparse", "memory")),
    "joint-two": Option(learned("infonce", directions=(Q2D, Q2Q), partition="joint"), ()),
    "siglip": Option(learned("siglip", bias=-2.0), BOTH),
    "siglip-positive": Option(learned("siglip", bias=-2.0, duplicates="positive"), (*BOTH, "memory")),
    "siglip-weights": Option(learned("siglip", bias=1.0, duplicates="negative"), ("keys2", "weights")),
    "nt_xent": Option(learned("nt_xent"), BOTH),
    "nt_xent-positive": Option(learned("nt_xent", duplicates="positive"), ("keys2", "memory")),
    "supcon": Option(learned("supcon"), BOTH),
    "supcon-single": Option(learned("supcon"), (*BOTH, "single", "memory")),
    "decoupled": Option(learned("decoupled"), BOTH),
    "decoupled-weights": Option(learned("decoupled", duplicates="positive"), ("keys", "weights")),
    "decoupled-one-way": Option(learned("decoupled", symmetric=False), ("keys2", "memory")),
    "debiased": Option(learned("debiased", 0.5, positive_rate=0.2), BOTH),
    "debiased-floor": Option(learned("debiased", 0.1, positive_rate=0.6, symmetric=False), ("keys", "weights")),
    "gist": Option(learned("gist_embed"), ("guide",)),
    "gist-absolute": Option(learned("gist_embed", margin=0.3), (*BOTH, "guide")),
    "gist-relative": Option(learned("gist_embed", margin=0.5, margin_strategy="relative"), ("keys2", "guide")),
    "gist-documents-only": Option(
        learned("gist_embed", contrast_queries=False, contrast_documents=False), ("guide", "weights")
    ),
    "rzenembed": Option(learned("rzenembed", hardness=3.0, false_negative_above=0.3, tasks=3), (*BOTH, "tasks")),
    "rzenembed-sharper": Option(
        learned("rzenembed", hardness=2.0, detach_hardness=False, false_negative_above=0.5), (*BOTH, "memory")
    ),
    "rzenembed-plain": Option(learned("rzenembed", hardness=0.0, false_negative_above=1.0), ("keys2",)),
    "proxies": Option(learned("class_proxies", classes=7), ("labels",)),
    "cosface": Option(learned("class_proxies", classes=4, margin=0.3), ("labels",)),
    "arcface": Option(learned("class_proxies", classes=4, margin=0.1, angular_margin=1.2), ("labels",)),
    "focal": Option({"name": "focal", "gamma": 0.5, "loss": INFONCE}, BOTH),
    "focal-detached": Option({"name": "focal", "gamma": 2.0, "detach": True, "loss": GTE}, BOTH),
    "progressive": Option({"name": "progressive", "noise_above": 0.7, "loss": INFONCE}, BOTH, progress=0.2),
    "progressive-late": Option({"name": "progressive", "loss": learned("supcon")}, BOTH, progress=0.9),
    "matryoshka": Option({"name": "matryoshka", "dims": (2, 4, DIM), "loss": INFONCE}, BOTH),
    "matryoshka-gist": Option(
        {"name": "matryoshka", "dims": (DIM, 3), "weights": (1.0, 0.3), "loss": learned("gist_embed", margin=0.1)},
        ("keys", "guide"),
    ),
    "matryoshka-siglip": Option(
        {"name": "matryoshka", "dims": (3,), "weights": (0.5,), "loss": learned("siglip", bias=-1.0)}, ("keys",)
    ),
    "memory": Option({"name": "cross_batch_memory", "size": 9, "loss": INFONCE}, BOTH),
    "memory-small": Option({"name": "cross_batch_memory", "size": 4, "loss": GTE}, ()),
    "memory-siglip": Option({"name": "cross_batch_memory", "size": 7, "loss": learned("siglip", bias=-2.0)}, ("keys",)),
    "nested": Option(
        {
            "name": "progressive",
            "loss": {
                "name": "focal",
                "gamma": 1.0,
                "loss": {"name": "matryoshka", "dims": (4, 6), "loss": learned("rzenembed", hardness=1.0, tasks=3)},
            },
        },
        (*BOTH, "tasks"),
        progress=0.6,
    ),
}


LOSSES = {option.config["name"] for option in OPTIONS.values()}
FIRST = {next(name for name, option in OPTIONS.items() if option.config["name"] == loss) for loss in LOSSES} | {"gte"}


class Case(NamedTuple):
    """One cell of the matrix."""

    option: str
    negatives: str
    sizes: tuple[int, ...]
    exchange: ExchangeName
    tiles: str
    cached: bool

    def __str__(self) -> str:
        how = "cached" if self.cached else "plain"
        parts = (self.option, f"negatives {self.negatives}", f"ranks {self.sizes}", self.exchange, f"{self.tiles} tile")
        return ", ".join((*parts, how))


def cases(world: int) -> list[Case]:
    names = ["infonce", "gte", "supcon"] if world == 4 else list(OPTIONS)
    if world == 1:
        how = [("gather", tiles, cached) for tiles, cached in product(TILES, (False, True))]
        return [Case(*cell[:3], *cell[3]) for cell in product(names, NEGATIVES, SIZES[1], how)]
    found = []
    for name, (n, negatives), (s, sizes) in product(names, enumerate(NEGATIVES), enumerate(SIZES[world])):
        # A loss's first options meet everything, its further ones every second way by turns; from W = 3 on half of it.
        every = (1 if name in FIRST else 2) * (1 if world == 2 else 2)
        how = HOW[(n + s) % every :: every]
        found += [Case(name, negatives, sizes, *way) for way in how]
    return found


# -- one batch of all ranks, and a rank's part of it ---------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Inputs of the encoder with everything else of a batch, of all ranks or of one."""

    inputs: dict[str, Tensor]  # queries, documents, negatives, counts
    rest: dict[str, Any] = field(default_factory=dict)

    def batch(self, rows: Mapping[str, Tensor]) -> Batch:
        return Batch(**rows, **self.rest)


def data_of_all(case: Case, step: int) -> Data:
    """The same whatever the ranks' sizes are, but for soft weights, which stay within a rank."""
    generator = torch.Generator().manual_seed(100 + step)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def integers(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    option, counts = OPTIONS[case.option], torch.tensor(NEGATIVES[case.negatives])
    more = int(counts.sum())
    inputs = {"queries": normal(TOTAL, WIDTH), "documents": normal(TOTAL, WIDTH), "negatives": normal(more, WIDTH)}
    # Few values, so that keys repeat within ranks and across them.
    keys, negative_keys = integers(4, TOTAL, 2), integers(5, more, 2)
    keys[1::2, 1], negative_keys[::2, 1] = NO_KEY, NO_KEY
    memory_keys = integers(5, MEMORY, 2)
    if "keys2" not in option.has:
        keys, negative_keys, memory_keys = keys[:, 0], negative_keys[:, 0], memory_keys[:, 0]
    rest: dict[str, Any] = {
        "negative_rows": torch.repeat_interleave(torch.arange(TOTAL), counts),
        "keys": keys,
        "negative_keys": negative_keys,
        "weights": block_weights(case.sizes, more, normal),
        "tasks": integers(3, TOTAL),
        "labels": integers(4, TOTAL),
        "guide": Batch(normal(TOTAL, 4), normal(TOTAL, 4), normal(more, 4)),
        "memory": normal(MEMORY, DIM),
        "memory_keys": memory_keys,
        "progress": option.progress,
    }
    if "single" in option.has:
        del inputs["documents"]
    if not more:
        del inputs["negatives"]
        rest["negative_rows"] = rest["negative_keys"] = None
        rest["guide"] = replace(rest["guide"], negatives=None)
    for name in absent(option):
        rest[name] = None
    return Data({**inputs, "counts": counts}, rest)


def absent(option: Option) -> Iterator[str]:
    """What the option's batches have not."""
    has = set(option.has)
    if not has & {"keys", "keys2"}:
        yield "keys"
    if not has & {"weights", "sparse"}:
        yield "weights"
    if "memory" not in has:
        yield "memory_keys"
    yield from {"negative_keys", "tasks", "labels", "guide", "memory"} - has


def block_weights(sizes: tuple[int, ...], more: int, normal: Any) -> Tensor:
    """Soft positives among the documents and hard negatives of the query's own rank; the second query has none."""
    weights = normal(TOTAL, TOTAL + more)
    weights = torch.where(weights > 0.5, weights, 0.0)
    ranks = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    owners = ranks[torch.arange(more) * TOTAL // max(1, more)] if more else ranks[:0]
    weights[ranks[:, None] != torch.cat([ranks, owners])[None]] = 0.0
    weights[1] = 0.0
    return weights


def data_of_rank(case: Case, step: int, rank: int) -> Data:
    data, option = data_of_all(case, step), OPTIONS[case.option]
    rows = slice(sum(case.sizes[:rank]), sum(case.sizes[: rank + 1]))
    counts = data.inputs["counts"]
    further = slice(int(counts[: rows.start].sum()), int(counts[: rows.stop].sum()))
    mine = {name: part[further if name == "negatives" else rows] for name, part in data.inputs.items()}
    rest = dict(data.rest)
    for name, value in data.rest.items():
        if name.startswith("negative") and value is not None:
            rest[name] = value[further] - (rows.start if name == "negative_rows" else 0)
            if name == "negative_keys":
                rest[name] = value[further]
        elif name.startswith("memory") and value is not None:
            rest[name] = value[rank :: len(case.sizes)]
        elif name == "guide" and value is not None:
            negatives = None if value.negatives is None else value.negatives[further]
            rest[name] = Batch(value.queries[rows], value.documents[rows], negatives)
        elif name == "weights" and value is not None:
            rest[name] = torch.cat([value[rows, rows], value[rows, TOTAL:][:, further]], 1)
            rest[name] = rest[name].to_sparse() if "sparse" in option.has else rest[name]
        elif isinstance(value, Tensor):
            rest[name] = value[rows]
    return Data(mine, rest)


# -- what is trained -----------------------------------------------------------------------------------------------


class Model(nn.Module):
    """Two small towers and a loss with its parameters."""

    def __init__(self, option: Option) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.query = nn.Sequential(nn.Linear(WIDTH, 7), nn.Tanh(), nn.Linear(7, DIM))
        self.document = nn.Sequential(nn.Linear(WIDTH, DIM), nn.Tanh())
        self.double()
        self.loss = option.build()

    def encode(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        towers = {"queries": self.query, "documents": self.document, "negatives": self.document}
        return {name: tower(inputs[name]) for name, tower in towers.items() if name in inputs}


class Outcome(NamedTuple):
    """The loss of all steps together, every parameter's gradient, and the parameters that no gradient reached."""

    loss: float
    gradients: dict[str, Tensor]
    unreached: frozenset[str]


def steps_of(option: Option) -> int:
    return STEPS if option.config["name"] == "cross_batch_memory" else 1


@cache
def expected(option: str, negatives: str, sizes: tuple[int, ...]) -> Outcome:
    """The oracle; `sizes` only where it depends on them."""
    case = Case(option, negatives, sizes, "gather", "one", False)
    model, batches = Model(OPTIONS[option]), []
    for step in range(steps_of(OPTIONS[option])):
        data = data_of_all(case, step)
        batches.append(data.batch(model.encode(data.inputs)))
    losses = reference_steps(parsed(OPTIONS[option].config), batches, dict(model.loss.named_parameters()))
    loss = torch.stack(losses).sum()
    loss.backward()
    return Outcome(loss.item(), gradients(model), frozenset())


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def share_of_rank(case: Case, rank: int, group: Any) -> Outcome:
    model = Model(OPTIONS[case.option])
    exchange = exchange_named(case.exchange, TILES[case.tiles], group)
    total = torch.zeros((), dtype=torch.float64)
    for step in range(steps_of(OPTIONS[case.option])):
        data = data_of_rank(case, step, rank)

        def loss(encoded: Encoded, data: Data = data) -> Tensor:
            out = torch.func.functional_call(model.loss, encoded.shared, (data.batch(encoded.rows), exchange))
            assert isinstance(out, Tensor)
            return out

        def forward(inputs: Mapping[str, Tensor]) -> Encoded:
            shared = {name: p.clone() for name, p in model.loss.named_parameters() if p.requires_grad}
            return Encoded(model.encode(inputs), shared)

        if case.cached:
            ones = torch.ones_like(data.inputs["counts"])
            ragged = {"negatives": "counts"} if "negatives" in data.inputs else {}
            parts, _ = cut(data.inputs, split(ones, rows=2), ragged)
            total += gradient_cache(forward, parts, loss, lambda scalar, last: scalar.backward())
        else:
            value = model.loss(data.batch(model.encode(data.inputs)), exchange)
            value.backward()
            total += value.detach()
    unreached = frozenset(name for name, p in model.named_parameters() if p.requires_grad and p.grad is None)
    found = gradients(model)
    if dist.is_initialized():  # what DDP and DeepSpeed do: average over ranks
        for value in (total, *found.values()):
            dist.all_reduce(value, group=group)
            value /= len(case.sizes)
    return Outcome(float(total), found, unreached)


def on_rank(rank: int, world: int) -> dict[Case, Outcome]:
    # A rank that fails alone leaves the others waiting: not for half an hour.
    group = dist.new_group(timeout=timedelta(seconds=60))
    found = {}
    for case in cases(world):
        try:
            found[case] = share_of_rank(case, rank, group)
        except Exception as error:
            raise AssertionError(f"case: {case}") from error
    return found


@cache
def outcomes(world: int) -> list[dict[Case, Outcome]] | Exception:
    """Of every rank, all cases; one group of processes for all of them."""
    try:
        return run_processes(world, on_rank)
    except Exception as error:
        return error  # kept: every test of this world would start the processes again


# -- the tests -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "option"), [(w, name) for w in SIZES for name in dict.fromkeys(c.option for c in cases(w))]
)
def test_loss_and_gradients_are_those_of_one_process(world: int, option: str) -> None:
    ranks = outcomes(world)
    if isinstance(ranks, Exception):
        raise ranks
    wrong = []
    for case in [case for case in cases(world) if case.option == option]:
        oracle = expected(
            case.option, case.negatives, case.sizes if {"weights", "sparse"} & {*OPTIONS[option].has} else (6,)
        )
        wrong += [f"{case}: {text}" for text in differences(ranks[0][case], oracle)]
        if len({rank[case].unreached for rank in ranks}) > 1:
            wrong.append(f"{case}: gradients reach other parameters on other ranks")
    assert not wrong, "\n" + "\n".join(wrong)


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("option", OPTIONS)
def test_a_batch_of_no_or_one_row(option: str, rows: int) -> None:
    """Of all ranks together: whatever is left, the loss and its gradients are numbers, and zero for no rows."""
    # Rank 1 of these sizes, alone.
    case = Case(option, "ragged", (2, rows, TOTAL - 2 - rows), "gather", "many", False)
    model, data = Model(OPTIONS[option]), data_of_rank(case, 0, 1)
    loss = model.loss(data.batch(model.encode(data.inputs)))
    loss.backward()
    found = [loss.detach(), *gradients(model).values()]
    assert all(value.isfinite().all() for value in found)
    assert rows or not any(value.any() for value in found)


def differences(found: Outcome, oracle: Outcome) -> Iterator[str]:
    if not abs(found.loss - oracle.loss) <= 1e-10 * abs(oracle.loss):
        yield f"loss {found.loss} is not {oracle.loss}"
    if found.gradients.keys() != oracle.gradients.keys():
        yield f"gradients of {sorted(found.gradients)}, not of {sorted(oracle.gradients)}"
        return
    for name, right in oracle.gradients.items():
        grad = found.gradients[name]
        if right.norm() < 1e-12:
            if not grad.norm() < 1e-12:
                yield f"gradient of {name} is not zero"
            continue
        ratio = float((grad * right).sum() / (right * right).sum())
        cosine = float((grad * right).sum() / (grad.norm() * right.norm()))
        if not (abs(ratio - 1) < 1e-10 and abs(cosine - 1) < 1e-10):
            yield f"gradient of {name}: ratio {ratio}, cosine {cosine}"
