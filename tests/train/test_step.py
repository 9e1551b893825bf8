"""Real DeepSpeed engines on two gloo processes: cached steps against one process with the whole batch."""

import contextlib
import logging
import math
import os
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rayemb.errors import RayembError
from rayemb.parallel import mean_over_ranks
from rayemb.parallel.cache import Encoded, cut, split, take_rows
from rayemb.train.engine import CPU_BUCKET, deepspeed_config
from rayemb.train.step import Reduction, train_step
from tests.parallel.gather import gather_rows
from tests.parallel.processes import run_processes

WORLD, WIDTH, DIM, CLASSES, RAGGED = 2, 12, 64, 1000, {"negatives": "counts"}
Values = dict[str, Tensor]
Result = tuple[Values, list[float]]


@dataclass(frozen=True)
class Case:
    """One engine; what the tests ask of it is asked of its parameters after the last step."""

    stage: int
    reduction: Reduction
    optimizer: str = "adamw"
    offload: bool = False
    precision: str = "fp32"
    cached: bool = True

    def __str__(self) -> str:
        words = [f"zero{self.stage}", self.reduction, self.optimizer, self.precision]
        return "-".join(words + ["offload"] * self.offload + ["plain"] * (not self.cached))


EXACT = [
    Case(stage, reduction, optimizer, offload)
    for offload in (False, True)
    for stage in (0, 1, 2, 3)
    for reduction in ("boundary", "coalesce")
    for optimizer in ("sgd", "adamw")
    if stage or (reduction == "boundary" and not offload)
]
BF16 = [
    Case(stage, reduction, "sgd", offload, "bf16", cached)
    for offload in (False, True)
    for stage in (1, 2, 3)
    for reduction, cached in (("boundary", False), ("boundary", True), ("coalesce", True))
]
# Rows of each rank in each of four steps, and the most rows of a micro-batch there (None: the plain step).
SHARES = ((7, 5), (6, 6), (12, 0), (0, 12))
LIMITS = ((2, 3), (None, None), (4, 4), (None, None))
WITHOUT_PROXIES = 1  # a step whose loss does not reach the largest parameter
BF16_SHARES, BF16_LIMIT = ((64, 64),), 2


class Proxies(nn.Module):
    """The loss's own parameters, a large one among them; it must be *called*, so that ZeRO-3 gathers them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CLASSES, DIM))
        self.log_scale = nn.Parameter(torch.tensor([math.log(5.0)]))

    def forward(self) -> Values:
        return {"proxies": self.weight.clone(), "log_scale": self.log_scale.clone()}


class Objective(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        towers = [
            nn.Sequential(
                nn.Linear(WIDTH, 32), nn.LayerNorm(32), nn.GELU(), nn.Dropout(dropout), nn.Linear(32, DIM, bias=False)
            )
            for _ in range(2)
        ]
        self.query, self.document = towers
        self.own = Proxies()

    def forward(self, batch: dict[str, Tensor]) -> Encoded:
        queries, documents, negatives = (
            batch[name].to(self.query[4].weight.dtype) for name in ("queries", "documents", "negatives")
        )
        rows = {
            "queries": F.normalize(self.query(queries), dim=-1),
            "documents": F.normalize(self.document(documents), dim=-1),
            "negatives": F.normalize(self.document(negatives), dim=-1),
        }
        return Encoded(rows, self.own())


def objective(dropout: float) -> Objective:
    torch.manual_seed(0)
    # Weights that bf16 holds exactly: the engines of both precisions start at the same ones.
    return Objective(dropout).bfloat16().float()


class Loss:
    """Symmetric contrast between ranks, and classification by proxies unless `proxies` is off."""

    def __init__(self, labels: Tensor, proxies: bool = True) -> None:
        self.labels, self.proxies = labels, proxies

    def __call__(self, encoded: Encoded) -> Tensor:
        rows = {name: value.float() for name, value in encoded.rows.items()}
        queries, documents, negatives = (gather_rows(rows[name]) for name in ("queries", "documents", "negatives"))
        scale = encoded.shared["log_scale"].float().exp()
        targets = torch.arange(queries.count) + queries.start
        keys = torch.cat([documents.rows, negatives.rows])
        value = F.cross_entropy(scale * rows["queries"] @ keys.T, targets, reduction="sum")
        value = value + F.cross_entropy(scale * rows["documents"] @ queries.rows.T, targets, reduction="sum")
        if self.proxies:
            proxies = F.normalize(encoded.shared["proxies"].float(), dim=-1)
            value = value + F.cross_entropy(scale * rows["queries"] @ proxies.T, self.labels, reduction="sum")
        return value * queries.weight


def batch(step: int, rows: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    counts = torch.arange(rows) % 3
    sizes = {"queries": rows, "documents": rows, "negatives": int(counts.sum())}
    made = {name: torch.randn(n, WIDTH, generator=generator) for name, n in sizes.items()}
    return {**made, "counts": counts, "labels": torch.randint(0, CLASSES, (rows,), generator=generator)}


def micro_batches(
    step: int, rank: int, shares: tuple[int, ...], limit: int | None
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    start = sum(shares[:rank])
    mine = take_rows(batch(step, sum(shares)), torch.arange(start, start + shares[rank]), RAGGED)
    # By length where there is a limit, so that rows change places.
    lengths = 1 + mine["counts"]
    return cut(mine, split(lengths, rows=limit, budget=limit and 3 * limit), RAGGED)


def optimizer(name: str, module: nn.Module) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(module.parameters(), lr=0.1)
    return torch.optim.AdamW(module.parameters(), lr=1e-2, weight_decay=0.1, eps=1e-5)


def clipping(name: str) -> float:
    return 0.5 if name == "adamw" else 0.0


def one_process(name: str, shares: tuple[tuple[int, ...], ...], limits: Any, dropout: float) -> Result:
    """Parameters after the last step, and each step's loss: plain torch, one graph over the rows of all ranks."""
    module = objective(dropout)
    chosen, losses = optimizer(name, module), []
    for step, rows in enumerate(shares):
        encoded: list[Encoded] = []
        labels = []
        for rank in range(WORLD):
            # Each rank's own numbers, drawn micro-batch by micro-batch.
            torch.manual_seed(1000 * step + rank)
            parts, whole = micro_batches(step, rank, rows, limits[step][rank])
            encoded += [module(part) for part in parts]
            labels.append(whole["labels"])
        together = {key: torch.cat([part.rows[key] for part in encoded]) for key in encoded[0].rows}
        loss = Loss(torch.cat(labels), step != WITHOUT_PROXIES)(Encoded(together, encoded[0].shared))
        chosen.zero_grad()
        loss.backward()
        for parameter in module.parameters():
            # ZeRO's optimizers have no "no gradient", and the rest should not differ from them.
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        norm = torch.nn.utils.clip_grad_norm_(module.parameters(), clipping(name) or math.inf)
        assert not clipping(name) or norm > 2 * clipping(name)
        losses.append(float(loss.detach()))
        chosen.step()
    return {key: value.detach().clone() for key, value in module.named_parameters()}, losses


def engine_of(case: Case, module: nn.Module) -> Any:
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    config = deepspeed_config(stand_in(case))
    if case.stage == 3:
        # Every parameter is sharded, the small ones too, which DeepSpeed would keep whole.
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer(case.optimizer, module), config=config, dist_init_required=False
    )
    return engine


def stand_in(case: Case) -> Any:
    return SimpleNamespace(
        batch_size=WORLD,
        workers=WORLD,
        zero_stage=case.stage,
        precision=case.precision,
        offload_optimizer=case.offload,
        # Half of the cases: the optimizer alone is another one.
        offload_parameters=case.offload and case.stage == 3 and case.reduction == "coalesce",
        gpus_per_worker=0,
        gradient_clipping=clipping(case.optimizer),
    )


def run_case(rank: int, case: Case) -> Result:
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    exact = case.precision == "fp32"
    module = objective(0.2 if exact else 0.0)
    engine, losses = engine_of(case, module), []
    for step, shares in enumerate(SHARES if exact else BF16_SHARES):
        limit = LIMITS[step][rank] if exact else BF16_LIMIT if case.cached else None
        torch.manual_seed(1000 * step + rank)
        parts, whole = micro_batches(step, rank, shares, limit)
        value = train_step(engine, parts, Loss(whole["labels"], step != WITHOUT_PROXIES), reduction=case.reduction)
        losses.append(float(mean_over_ranks(value.loss)))
    if exact:
        gathered = deepspeed.zero.GatheredParameters(list(module.parameters()))
        with gathered if case.stage == 3 else contextlib.nullcontext():
            return {name: value.detach().clone() for name, value in module.named_parameters()}, losses
    shapes = {name: value.shape for name, value in objective(0.0).named_parameters()}
    return {
        name: safe_get_full_fp32_param(value).reshape(shapes[name]).clone() for name, value in module.named_parameters()
    }, losses


def on_rank(rank: int, world: int, cases: list[Case]) -> dict[Case, Result]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed  # noqa: F401

    logging.disable(logging.WARNING)
    return {case: run_case(rank, case) for case in cases}


@pytest.fixture(scope="module")
def trained() -> dict[Case, Result]:
    """All engines in two processes once: to start them and import DeepSpeed takes longer than most of the cases."""
    first, second = run_processes(WORLD, on_rank, [*EXACT, *BF16])
    for case, (values, _) in first.items():
        for name, value in values.items():
            assert torch.equal(value, second[case][0][name]), (case, name)
    return first


@pytest.fixture(scope="module")
def expected() -> dict[str, Result]:
    return {name: one_process(name, SHARES, LIMITS, 0.2) for name in ("sgd", "adamw")}


@pytest.mark.slow
@pytest.mark.parametrize("case", EXACT, ids=str)
def test_steps_are_those_of_one_process(case: Case, trained: dict[Case, Result], expected: dict[str, Result]) -> None:
    """Ragged ranks and micro-batches, dropout, temperature, a large parameter of the loss, clipping with AdamW."""
    (found, losses), (wanted, right_losses) = trained[case], expected[case.optimizer]
    start = {name: value.detach() for name, value in objective(0.2).named_parameters()}
    assert losses == pytest.approx(right_losses, abs=1e-5)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert float((found[name] - value).abs().max()) < 1e-5, name
        update, right = found[name] - start[name], value - start[name]
        assert float((update * right).sum() / (right * right).sum()) == pytest.approx(1, abs=1e-4), name


def distance(found: Values, wanted: Values) -> float:
    """Of two updates, relative to the second."""
    start = {name: value.detach() for name, value in objective(0.0).named_parameters()}
    difference = torch.cat([(found[name] - wanted[name]).flatten() for name in wanted])
    return float(difference.norm() / torch.cat([(wanted[name] - start[name]).flatten() for name in wanted]).norm())


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in BF16 if case.cached], ids=str)
def test_bf16_is_as_near_to_fp32_as_the_plain_engine(case: Case, trained: dict[Case, Result]) -> None:
    """Some 60 micro-batches, whose gradients `coalesce` and stage 1 sum in bf16; the plain step has one."""
    wanted, _ = one_process("sgd", BF16_SHARES, ((None, None),), 0.0)
    plain = Case(case.stage, "boundary", "sgd", case.offload, "bf16", cached=False)
    assert distance(trained[plain][0], wanted) < 1e-2
    assert distance(trained[case][0], trained[plain][0]) < 1e-2
    in_fp32 = case.stage > 1 and case.reduction == "boundary"
    assert distance(trained[case][0], wanted) < distance(trained[plain][0], wanted) * (1.05 if in_fp32 else 1.5)


def test_coalescing_is_refused_where_deepspeed_has_none() -> None:
    engine = SimpleNamespace(
        device="cpu", optimizer=torch.optim.SGD([torch.zeros(1)]), zero_optimization_stage=lambda: 0
    )
    with pytest.raises(RayembError, match=r"stage 0 with the optimizer SGD.*use 'boundary'"):
        train_step(engine, [{}], Loss(torch.zeros(0)), reduction="coalesce")


def test_offload_goes_to_deepspeed_and_is_refused_without_shards() -> None:
    config = deepspeed_config(stand_in(Case(2, "auto", offload=True)))
    offload = {"device": "cpu", "pin_memory": False}
    expected = {"stage": 2, "reduce_bucket_size": CPU_BUCKET, "offload_optimizer": offload}
    assert config["zero_optimization"] == expected
    assert "offload_optimizer" not in deepspeed_config(stand_in(Case(2, "auto")))["zero_optimization"]
    with pytest.raises(RayembError, match="stage 0 cannot offload"):
        deepspeed_config(stand_in(Case(0, "auto", offload=True)))


@pytest.mark.parametrize(("stage", "offload", "wide"), [(1, False, False), (1, True, True), (2, False, True)])
def test_bf16_gradients_are_summed_in_fp32_where_it_is_cheap(stage: int, offload: bool, wide: bool) -> None:
    config = deepspeed_config(stand_in(Case(stage, "auto", offload=offload, precision="bf16")))
    assert ("data_types" in config) == wide
    assert "data_types" not in deepspeed_config(stand_in(Case(stage, "auto", offload=offload)))
