"""LoRA on real DeepSpeed engines: the base stays as it is to the last bit, what is saved is plain weights."""

import os
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from rayemb.config import load
from rayemb.errors import RayembError
from rayemb.losses import InfoNCEConfig
from rayemb.models import TextTokenizer, TwoTower
from rayemb.parallel import exchange_named, mean_over_ranks
from rayemb.train.adapters import LoRAConfig, add_adapters, merged
from rayemb.train.config import TrainConfig
from rayemb.train.engine import create_engine, full_state, set_rates
from rayemb.train.objective import Objective, micro_batches
from rayemb.train.parameters import parameter_groups
from rayemb.train.step import train_step
from rayemb.train.worker import create_objective
from tests.models.test_pretrained import minilm  # noqa: F401
from tests.parallel.processes import run_processes

ROWS, STEPS, STAGES = 8, 5, (2, 3)
NOUNS = ("heart", "ship", "tree", "key", "apple", "bell", "clock", "drum")
QUERIES = [f"a drawing of a {noun}" for noun in NOUNS]
TEXTS = [f"{noun} number {number}" for number, noun in enumerate(NOUNS)]


def config(source: str, stage: int) -> TrainConfig:
    overrides = [
        "model={image: null, dim: 32, tokenizer: {max_length: 16}}",
        f"model.text={{name: transformers, source: {source}}}",
        "adapters={name: lora, rank: 4, alpha: 8, dropout: 0.1, targets: 'attention.self.(query|value)|intermediate'}",
        f"zero_stage={stage}",
        f"steps={STEPS}",
        f"batch_size={ROWS}",
        "schedule={name: constant, warmup_steps: 0}",
        "optimizer={name: adamw, learning_rate: 5e-3}",
    ]
    return load(TrainConfig, None, overrides)


@dataclass
class Found:
    start: dict[str, Tensor] = field(default_factory=dict)
    end: dict[str, Tensor] = field(default_factory=dict)
    restored: dict[str, Tensor] = field(default_factory=dict)
    vectors: Tensor = field(default_factory=lambda: torch.zeros(0))
    losses: list[float] = field(default_factory=list)


def batch(tokenizer: TextTokenizer) -> dict[str, Tensor]:
    queries, tokens = (torch.from_numpy(tokenizer(texts, pad_to=16)) for texts in (QUERIES, TEXTS))
    return {"query_tokens": queries, "tokens": tokens, "keys": torch.arange(ROWS)}


def run_stage(rank: int, world: int, source: str, stage: int, folder: str) -> Found:
    settings, found = config(source, stage), Found()
    tokenizer = TextTokenizer.from_source(source, 16)
    module = create_objective(settings, tokenizer)
    engine = create_engine(module, settings)
    found.start = full_state(engine, module.network, stage) or {}
    exchange, share = exchange_named("ring"), slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    mine = {name: value[share] for name, value in batch(tokenizer).items()}
    for step in range(STEPS):
        set_rates(engine, settings, step)
        parts, whole = micro_batches(mine, rows=2, tokens=None)
        done = train_step(engine, parts, lambda encoded, whole=whole: module.share(encoded, whole, exchange))
        found.losses.append(float(mean_over_ranks(done.loss)))
    found.end = full_state(engine, module.network, stage) or {}
    engine.eval()
    with torch.no_grad():
        found.vectors = engine(batch(tokenizer)).rows["documents"]
    engine.save_checkpoint(folder, tag="last")
    other = create_objective(settings, tokenizer)
    engine = create_engine(other, settings)
    engine.load_checkpoint(folder, tag="last")
    found.restored = full_state(engine, other.network, stage) or {}
    return found


def on_rank(rank: int, world: int, source: str, folder: str) -> dict[int, Found]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    return {stage: run_stage(rank, world, source, stage, f"{folder}/{stage}") for stage in STAGES}


@pytest.fixture(scope="module")
def trained(minilm: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Found]:  # noqa: F811
    return run_processes(2, on_rank, minilm, str(tmp_path_factory.mktemp("adapters")))[0]


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_the_base_stays_and_the_merged_model_gives_the_vectors_of_the_adapted_one(
    stage: int,
    trained: dict[int, Found],
    minilm: str,  # noqa: F811
) -> None:
    found, settings = trained[stage], config(minilm, stage)
    assert found.losses[-1] < found.losses[0] - 0.2
    tokenizer = TextTokenizer.from_source(minilm, 16)
    moved = {name for name, value in found.start.items() if not torch.equal(found.end[name], value)}
    adapters = {name for name in found.start if ".lora_" in name}
    assert len(adapters) == 2 * 3 * 6
    assert moved == adapters | {"text_projection.weight"}
    assert all(torch.equal(found.restored[name], value) for name, value in found.end.items())
    plain = TwoTower(settings.model.resolved(), tokenizer.vocab_size)
    names = list(plain.state_dict())
    weights = merged(plain, LoRAConfig(**settings.adapters.model_dump()), found.end)  # type: ignore[union-attr]
    assert list(weights) == names
    again = TwoTower(settings.model.resolved(), tokenizer.vocab_size).eval()
    again.load_state_dict(weights)
    with torch.no_grad():
        vectors = again.encode_text(batch(tokenizer)["tokens"])
    torch.testing.assert_close(vectors, found.vectors, rtol=0, atol=1e-5)
    # By the formula, whatever peft does.
    query = "text.model.encoder.layer.3.attention.self.query"
    low, high = (found.end[f"{query}.lora_{part}.default.weight"] for part in "AB")
    expected = found.start[f"{query}.base_layer.weight"] + 8 / 4 * high @ low
    torch.testing.assert_close(weights[f"{query}.weight"], expected, rtol=0, atol=1e-6)


SMALL = [
    "model={dim: 16, image: {image_size: 16, widths: [8, 16], depths: [1, 1]}, text: {width: 16, depth: 2, heads: 2}}"
]


def small(*overrides: str) -> tuple[Objective, TrainConfig]:
    settings = load(TrainConfig, None, [*SMALL, *overrides])
    torch.manual_seed(0)
    return Objective(TwoTower(settings.model, 64), InfoNCEConfig().build(16)), settings


def test_adapters_change_nothing_at_first_and_are_the_same_everywhere() -> None:
    ids = torch.randint(1, 64, (3, 6), generator=torch.Generator().manual_seed(0))
    (one, settings), (two, _) = small(), small()
    before = one.network.encode_text(ids)
    assert add_adapters(one.network, LoRAConfig(), seed=3) == 2 * 4  # qkv, out, up and down of two blocks
    torch.manual_seed(99)
    add_adapters(two.network, LoRAConfig(), seed=3)
    torch.testing.assert_close(one.network.encode_text(ids), before, rtol=0, atol=0)
    assert all(torch.equal(value, two.state_dict()[name]) for name, value in one.state_dict().items())
    trained = [p for group in parameter_groups(one, settings) for p in group["params"]]
    names = {name for name, value in one.named_parameters() if any(value is other for other in trained)}
    assert not {name for name in names if name.startswith("network.text.") and ".lora_" not in name}
    # The other tower, the projections and the temperature learn as ever.
    assert {"network.image_projection.weight", "network.text_projection.weight", "losses.0.scale.log_scale"} <= names


@pytest.mark.parametrize("targets", ["no_such_layer", r"^network\.text\.tokens"])
def test_targets_that_match_no_layer_are_refused(targets: str) -> None:
    objective, _ = small()
    with pytest.raises(RayembError, match="no linear layer of a block matches") as caught:
        add_adapters(objective.network, LoRAConfig(targets=targets), seed=0)
    assert caught.value.where == "train.adapters.targets"
    assert "network.text.blocks.0.up" in str(caught.value.fix)


def test_a_pattern_is_checked_when_the_config_is_read() -> None:
    from rayemb.config import ConfigError

    with pytest.raises(ConfigError, match="not a regular expression"):
        load(TrainConfig, None, ["adapters={targets: '('}"])
