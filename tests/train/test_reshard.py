"""A checkpoint goes on at another number of ranks as if nothing had happened; real DeepSpeed engines on gloo."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rayemb.train.reshard import load_resharded
from tests.parallel.processes import run_processes

ROWS = 12


class Net(nn.Module):
    """Two groups of parameters, one with a single entry, which most ranks have no share of, and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(7, 13), nn.Tanh(), nn.Linear(13, 5))
        self.scale = nn.Parameter(torch.ones(1))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.scale * self.body(x)


def engine_of(stage: int, dtype: str) -> Any:
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    net = Net()
    groups = [
        {"params": list(net.body.parameters()), "weight_decay": 0.1},
        {"params": [net.scale], "weight_decay": 0.0},
    ]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == "bf16"},
        "steps_per_print": 10**9,
    }
    if dtype == "bf16" and stage >= 2:
        config["data_types"] = {"grad_accum_dtype": "fp32"}
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    return deepspeed.initialize(model=net, optimizer=optimizer, config=config, dist_init_required=False)[0]


def go(rank: int, world: int, folder: str, begin: int, end: int, cases: list[tuple[int, str]]) -> dict[str, Any]:
    import os

    os.environ["DS_ACCELERATOR"] = "cpu"
    import torch.distributed as dist

    found: dict[str, Any] = {}
    for stage, dtype in cases:
        name, losses = f"{stage}-{dtype}", []
        engine = engine_of(stage, dtype)
        at = Path(folder) / name
        if begin:
            written = json.loads((at / f"world-{begin}.json").read_text())
            load_resharded(engine, at / f"step-{begin}", written)
        for step in range(begin, end):
            generator = torch.Generator().manual_seed(step)
            x, y = torch.randn(ROWS, 7, generator=generator), torch.randn(ROWS, 5, generator=generator)
            # Ragged shares of one global batch: the sum over ranks is the loss of one process.
            mine = torch.arange(ROWS).tensor_split(world)[rank]
            out = engine(x[mine].to(torch.bfloat16 if dtype == "bf16" else torch.float32))
            loss = (out.float() - y[mine]).square().sum() * world / ROWS
            engine.backward(loss)
            engine.step()
            engine.module.seen += 1
            total = loss.detach() / world
            dist.all_reduce(total)
            losses.append(float(total))
        engine.save_checkpoint(str(at), tag=f"step-{end}")
        if rank == 0:
            (at / f"world-{end}.json").write_text(json.dumps(world))
        decays = [group["weight_decay"] for group in engine.optimizer.param_groups]
        found[name] = {"losses": losses, "decays": decays, "seen": float(engine.module.seen)}
    return found


@pytest.mark.slow
def test_two_then_one_then_three_ranks_go_on_as_one_run(tmp_path: Path) -> None:
    cases = [(1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16"), (3, "bf16")]
    whole = run_processes(2, go, str(tmp_path / "whole"), 0, 9, cases)[0]
    folder = str(tmp_path / "parts")
    parts = [run_processes(world, go, folder, begin, begin + 3, cases)[0] for world, begin in ((2, 0), (1, 3), (3, 6))]
    for stage, dtype in cases:
        name = f"{stage}-{dtype}"
        losses = [loss for part in parts for loss in part[name]["losses"]]
        # bf16 rounds what each rank adds up, so another cut of the rows is another rounding.
        tolerance = 1e-5 if dtype == "fp32" else 2e-2
        assert losses == pytest.approx(whole[name]["losses"], rel=tolerance), name
        assert losses[6:] != pytest.approx(whole[name]["losses"][:3], rel=0.1)
        assert parts[-1][name]["decays"] == [0.1, 0.0]
        assert parts[-1][name]["seen"] == 9
