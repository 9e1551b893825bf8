"""Step time over workers: measured on this machine, and modelled for 8 to 1,024 GPUs.

    python jobs/bench/scaling.py FOLDER                # after `trainer.py images FOLDER`; ~5 minutes
    python jobs/bench/scaling.py FOLDER --no-measure   # the model alone

Measured: the demo's towers at one global batch with 1, 2 and 4 workers: the same steps, so that only their speed
differs. Beyond as many workers as cores they share cores, and the exchange is paid without a gain.

Modelled, per step and GPU, with W GPUs, P parameters of E bytes, b pairs each, vectors of D entries:

    compute    3 F b / (peak * MFU)                         F: operations of a pair's forward
    loss       2 * 3 * 2 W b b D / (peak * loss MFU)        both directions' logits, forward and backward
    gradients  2 (W - 1) / W * P E                          ZeRO 0 to 2: reduce-scatter and all-gather; ZeRO 3: 3 times
    vectors    2 (W - 1) b D 4                              gather: one side's all-gather, and the reduce-scatter of its
                                                            gradients; the other side's sums of columns, W b numbers,
                                                            are nothing beside it. Ring: the same bytes, 1 hop each

Between nodes each GPU has its own network card; of a collective over W > 8 GPUs the slowest link decides. Gradients
overlap with the backward, down to the last bucket; the exchange of vectors overlaps with nothing: the loss waits.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import trainer
import yaml

from rayemb import storage
from rayemb.models import Model


@dataclass(frozen=True)
class Machine:
    """What a GPU and its links are taken to do."""

    peak: float = 989e12  # H100, dense bf16, FLOP/s
    mfu: float = 0.4
    loss_mfu: float = 0.2
    inside: float = 400e9  # bytes/s of a GPU to the others of its node
    between: float = 45e9  # of a 400 Gbit/s card
    latency: float = 15e-6  # of a hop
    node: int = 8


@dataclass(frozen=True)
class Towers:
    """What is trained."""

    name: str
    parameters: float
    forward: float  # FLOP of a pair
    dim: int


TOWERS = [Towers("CLIP ViT-B/32", 151e6, 14.8e9, 512), Towers("CLIP ViT-L/14", 428e6, 175e9, 768)]
GPUS = [8, 16, 32, 64, 128, 256, 512, 1024]
LAST_BUCKET = 0.1  # of the gradients


def step(towers: Towers, machine: Machine, gpus: int, rows: int) -> dict[str, float]:
    """Seconds of a step by part."""
    bandwidth = machine.inside if gpus <= machine.node else machine.between
    share = (gpus - 1) / gpus
    compute = 3 * towers.forward * rows / (machine.peak * machine.mfu)
    loss = 2 * 3 * 2 * gpus * rows * rows * towers.dim / (machine.peak * machine.loss_mfu)
    gradients = 2 * share * towers.parameters * 2 / bandwidth + 2 * gpus * machine.latency
    hidden = min(gradients * (1 - LAST_BUCKET), compute * 2 / 3)
    vectors = 2 * (gpus - 1) * rows * towers.dim * 4 / bandwidth + 3 * gpus * machine.latency
    return {"compute": compute, "loss": loss, "gradients": gradients - hidden, "vectors": vectors}


def modelled(towers: Towers, machine: Machine, rows: int) -> None:
    """The table of one model at a fixed number of pairs a GPU: the global batch grows with the GPUs."""
    print(f"\n{towers.name}, {rows} pairs a GPU, bf16, ZeRO-1, milliseconds of a step:\n")
    print("| GPUs | global batch | compute | loss | gradients not hidden | vectors | pairs/s | of linear |")
    print("|---" * 8 + "|")
    alone = rows / (3 * towers.forward * rows / (machine.peak * machine.mfu))
    for gpus in GPUS:
        parts = step(towers, machine, gpus, rows)
        pace = gpus * rows / sum(parts.values())
        times = " | ".join(f"{1000 * seconds:.1f}" for seconds in parts.values())
        print(f"| {gpus} | {gpus * rows:,} | {times} | {pace:,.0f} | {pace / (gpus * alone):.0%} |")
    fixed(towers, machine)


def fixed(towers: Towers, machine: Machine, batch: int = 32_768) -> None:
    """One line: up to how many GPUs a global batch of 32,768, which is enough, goes on to gain half of linear."""
    alone = batch / (3 * towers.forward * batch / (machine.peak * machine.mfu))
    paces = {gpus: batch / sum(step(towers, machine, gpus, batch // gpus).values()) for gpus in GPUS}
    line = ", ".join(f"{gpus}: {pace / (gpus * alone):.0%}" for gpus, pace in paces.items())
    print(f"\nThe same at a global batch of {batch:,} over all GPUs, of linear: {line}")


def measured(folder: Path, counts: list[int], steps: int) -> None:
    """Trains with each number of workers in turn."""
    task = trainer.TASKS["images"]
    trainer.prepare(task, folder)
    print("| workers | step, ms | pairs/s | forward | exchange | backward | step | waiting for data |")
    print("|---" * 8 + "|")
    for count in counts:
        out = folder / f"scaling-{count}"
        storage.delete(str(out))
        out.mkdir(parents=True)
        settings = trainer.settings(task, folder, out, 0, count, steps)
        settings["train"] |= {"cpus_per_worker": 0.5, "loader": {"cpus_per_decoder": 0.25}}
        (out / "run.yaml").write_text(yaml.safe_dump(settings))
        trainer.watched([sys.executable, "-m", "rayemb.cli", "train", str(out / "run.yaml")], out / "log")
        rows = Model.load(str(out / "model")).info["training"]
        (first, last) = rows[0], rows[-1]
        seconds = (last["time"] - first["time"]) / (last["step"] - first["step"])
        phases = ("time/forward", "time/exchange", "time/backward", "time/step", "time/data")
        shares = " | ".join(f"{sum(row[phase] for row in rows[1:]) / (len(rows) - 1):.0%}" for phase in phases)
        print(f"| {count} | {1000 * seconds:.0f} | {task.batch_size / seconds:.0f} | {shares} |", flush=True)


def main() -> None:
    """Runs both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the folder of trainer.py")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rows", type=int, default=512, help="pairs a GPU in the model")
    parser.add_argument("--no-measure", action="store_true")
    args = parser.parse_args()
    if not args.no_measure:
        measured((args.folder / "images").absolute(), args.workers, args.steps)
    for towers in TOWERS:
        modelled(towers, Machine(), args.rows)


if __name__ == "__main__":
    main()
