"""Real DeepSpeed engines on two gloo processes: the gradient of the whole batch at every ZeRO stage."""

import os

import pytest
import torch
from torch import Tensor

from rayemb.losses import InfoNCEConfig
from rayemb.models import ConvNetConfig, TextTransformerConfig, TwoTower, TwoTowerConfig
from rayemb.parallel import Alone, exchange_named
from rayemb.train.config import TrainConfig
from rayemb.train.engine import create_engine, full_state
from rayemb.train.objective import Objective
from tests.parallel.processes import run_processes

ROWS, VOCAB = 8, 64
CONFIG = TrainConfig(
    model=TwoTowerConfig(
        dim=16,
        image=ConvNetConfig(image_size=16, widths=(8, 16), depths=(1, 1)),
        text=TextTransformerConfig(width=16, depth=1, heads=2),
    ),
    batch_size=ROWS,
    workers=2,
    # A learning rate so small that the weights stay, and no clipping: the gradient itself is looked at.
    gradient_clipping=0.0,
)


def objective() -> Objective:
    torch.manual_seed(0)
    return Objective(TwoTower(CONFIG.model, VOCAB), InfoNCEConfig(temperature=0.1).build(CONFIG.model.dim))


def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (ROWS, 3, 16, 16), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, VOCAB, (ROWS, 6), generator=generator)
    return {"pixels": pixels, "tokens": tokens, "keys": torch.tensor([0, 1, 2, 3, 0, 4, 5, 1])}


def on_rank(rank: int, world: int) -> dict[int, tuple[dict[str, Tensor], dict[str, Tensor] | None]]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    from deepspeed.utils import safe_get_full_grad

    share = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    found = {}
    for stage in (0, 1, 2, 3):
        config = CONFIG.model_copy(update={"zero_stage": stage})
        module, mine = objective(), {name: part[share] for name, part in batch().items()}
        engine = create_engine(module, config)
        engine.backward(module.share(engine(mine), mine, exchange_named("gather")))
        grads = {name: safe_get_full_grad(p).clone() for name, p in engine.module.named_parameters()}
        found[stage] = grads, full_state(engine, engine.module.network, stage)
    return found


@pytest.mark.slow
def test_every_zero_stage_has_the_gradient_of_one_process() -> None:
    whole = objective()
    whole.share(whole(batch()), batch(), Alone()).backward()
    expected = {name: p.grad for name, p in whole.named_parameters()}
    for rank, stages in enumerate(run_processes(2, on_rank)):
        for stage, (grads, state) in stages.items():
            assert grads.keys() == expected.keys()
            for name, grad in grads.items():
                torch.testing.assert_close(
                    grad.reshape(expected[name].shape), expected[name], rtol=1e-4, atol=1e-7, msg=f"{stage} {name}"
                )
            assert (state is None) == (rank != 0)
            if state is not None:
                for name, value in whole.network.state_dict().items():
                    assert torch.equal(state[name], value), (stage, name)
