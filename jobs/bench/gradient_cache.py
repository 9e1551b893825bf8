"""What the gradient cache costs: a step in micro-batches as a multiple of the plain step, at the same batch size.

    .venv/bin/python jobs/bench/gradient_cache.py

One process, the demo's two towers, a real DeepSpeed engine; plain and cached steps take turns on the same engine
and the same batches. A step in micro-batches encodes everything twice (once without a graph): if a backward pass costs
two forward passes, that is 4/3 of the plain step at least. Memory is the process's peak above its state.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peak_memory import peak, reset_peak
from torch import Tensor

from rayemb.losses import InfoNCEConfig
from rayemb.models import TwoTower, TwoTowerConfig
from rayemb.parallel import Encoded, exchange_named
from rayemb.train.config import TrainConfig
from rayemb.train.engine import create_engine
from rayemb.train.objective import Objective, micro_batches
from rayemb.train.step import train_step

VOCAB, LENGTH = 8000, 16


def batch_of(rows: int, size: int, device: torch.device) -> dict[str, Tensor]:
    """Random pixels and tokens."""
    generator = torch.Generator().manual_seed(0)
    batch = {
        "pixels": torch.randint(0, 256, (rows, 3, size, size), dtype=torch.uint8, generator=generator),
        "tokens": torch.randint(1, VOCAB, (rows, LENGTH), generator=generator),
        "group": torch.arange(rows),
    }
    return {name: value.to(device) for name, value in batch.items()}


def step(engine: Any, batch: dict[str, Tensor], rows: int | None) -> tuple[float, int]:
    """Seconds and peak bytes of one step with micro-batches of `rows` pairs (None: the plain step)."""
    exchange = exchange_named("gather")
    before = reset_peak(engine.device.type)
    started = time.perf_counter()
    parts, whole = micro_batches(batch, rows=rows, tokens=None)

    def loss(encoded: Encoded) -> Tensor:
        value: Tensor = engine.module.share(encoded, whole["group"], exchange)
        return value

    train_step(engine, parts, loss)
    if engine.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started, peak(engine.device.type) - before


def main() -> None:
    """Runs the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[256, 512, 1024], help="pairs per step")
    parser.add_argument("--micro", type=int, nargs="+", default=[32, 64, 128], help="pairs per micro-batch")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each")
    parser.add_argument("--stage", type=int, default=1, choices=[0, 1, 2, 3], help="ZeRO stage")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="also write the table there")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29533")
    store = f"file://{tempfile.mkdtemp()}/store"
    dist.init_process_group("nccl" if gpu else "gloo", init_method=store, rank=0, world_size=1)
    table = run(arguments)
    print(table)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(table)


def run(arguments: argparse.Namespace) -> str:
    """Measures turn by turn and gives the table."""
    config = TrainConfig(workers=1, zero_stage=arguments.stage, gpus_per_worker=float(torch.cuda.is_available()))
    model = TwoTowerConfig()
    module = Objective(TwoTower(model, VOCAB).train(), InfoNCEConfig().build(model.dim))
    engine = create_engine(module, config)
    lines = [
        f"`{' '.join(['python', *sys.argv])}`: demo towers, {engine.device}, {arguments.threads} threads, ZeRO-"
        f"{arguments.stage}, torch {torch.__version__}. Median seconds of {arguments.repeats} steps, taking turns.",
        "",
        "| pairs | micro-batch | step | multiple of the plain step | peak MiB above the engine's state |",
        "|---|---|---|---|---|",
    ]
    for rows in arguments.batch:
        batch = batch_of(rows, model.image_size, engine.device)
        kinds = [None, *(size for size in arguments.micro if size < rows)]
        found: dict[int | None, list[tuple[float, int]]] = {kind: [] for kind in kinds}
        for turn in range(arguments.repeats + 1):
            for kind in kinds:
                measured = step(engine, batch, kind)
                if turn:  # the first turn warms up
                    found[kind].append(measured)
        plain = statistics.median(seconds for seconds, _ in found[None])
        for kind in kinds:
            seconds = statistics.median(seconds for seconds, _ in found[kind])
            memory = max(memory for _, memory in found[kind]) / 2**20
            name = "none" if kind is None else str(kind)
            lines.append(f"| {rows:,} | {name} | {seconds:.3g} s | {seconds / plain:.2f} | {memory:,.0f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
