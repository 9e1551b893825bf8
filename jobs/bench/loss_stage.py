"""Peak memory and time of the loss stage, beside the losses of open_clip, sentence-transformers and PML.

    .venv/bin/python jobs/bench/loss_stage.py                 # CPU, two gloo workers, 1k to 64k pairs
    .venv/bin/python jobs/bench/loss_stage.py --device cuda   # one process per GPU, 32k to 1M candidates

Each measurement is a fresh group of processes that makes its rows, forgets its peak, and runs forward and backward;
implementations take turns, round by round. Time is the slowest worker's median, memory the highest worker's peak
above its inputs. Rows are unit vectors, and gradients go to all of them.
"""

import argparse
import importlib.util
import json
import math
import os
import resource
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from peak_memory import peak, reset_peak
from torch import Tensor

Step = Callable[[Tensor, Tensor], Tensor]
TEMPERATURE = 0.05
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def rayemb_loss(directions: Any, exchange: Any, kernels: Any = "auto") -> Step:
    """InfoNCE in tiles."""
    from rayemb.losses import Batch, InfoNCEConfig
    from rayemb.parallel import Tiling, exchange_named

    config = InfoNCEConfig(temperature=TEMPERATURE, directions=directions, duplicates="negative")
    loss = config.build(1)
    how = exchange_named(exchange, Tiling(kernels=kernels))
    return lambda queries, documents: cast(Tensor, loss.to(queries.device)(Batch(queries, documents), how))


def open_clip_loss() -> Step:
    """ClipLoss with the flags under which its gradients are right."""
    spec = importlib.util.find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("open_clip is missing: pip install --no-deps open_clip_torch==3.3.0")
    # By path: importing the package wants torchvision, which has no CPU build.
    path = Path(spec.submodule_search_locations[0]) / "loss.py"
    found = importlib.util.spec_from_file_location("open_clip_loss", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    many = dist.get_world_size() > 1
    loss = module.ClipLoss(
        local_loss=many, gather_with_grad=many, rank=dist.get_rank(), world_size=dist.get_world_size()
    )
    scale = torch.tensor(1 / TEMPERATURE, requires_grad=True)
    return lambda queries, documents: cast(Tensor, loss(queries, documents, scale.to(queries.device)))


def sentence_transformers_loss(cached: bool) -> Step:
    """MultipleNegativesRankingLoss; cached: its own loss stage, in chunks of 512 rows."""
    from sentence_transformers.sentence_transformer import losses

    many = dist.get_world_size() > 1
    if not cached:
        plain: Any = losses.MultipleNegativesRankingLoss(
            cast(Any, None), scale=1 / TEMPERATURE, gather_across_devices=many
        )
        return lambda queries, documents: cast(Tensor, plain.compute_loss_from_embeddings([queries, documents], None))

    class Nothing(torch.nn.Module):
        def __getitem__(self, index: int) -> "Nothing":
            return self

    loss: Any = losses.CachedMultipleNegativesRankingLoss(
        cast(Any, Nothing()), scale=1 / TEMPERATURE, mini_batch_size=512, gather_across_devices=many
    )

    def step(queries: Tensor, documents: Tensor) -> Tensor:
        # It goes backward by itself, chunk by chunk; what it returns carries the gradients.
        chunks = [list(torch.split(queries, 512)), list(torch.split(documents, 512))]
        return cast(Tensor, loss.calculate_loss(chunks, with_backward=True))

    return step


def pml_loss(name: str) -> Step:
    """NTXent or SupCon of pytorch-metric-learning, both views of all ranks."""
    from pytorch_metric_learning import losses
    from pytorch_metric_learning.utils.distributed import DistributedLossWrapper

    inner = losses.NTXentLoss(TEMPERATURE) if name == "ntxent" else losses.SupConLoss(TEMPERATURE)
    loss = DistributedLossWrapper(inner) if dist.get_world_size() > 1 else inner

    def step(queries: Tensor, documents: Tensor) -> Tensor:
        start = dist.get_rank() * queries.shape[0]
        labels = torch.arange(start, start + queries.shape[0], device=queries.device)
        return cast(Tensor, loss(torch.cat([queries, documents]), torch.cat([labels, labels])))

    return step


def rayemb_views() -> Step:
    """NT-Xent over both views, as PML's two are."""
    from rayemb.losses import Batch, NTXentConfig
    from rayemb.parallel import exchange_named

    loss, exchange = NTXentConfig(temperature=TEMPERATURE).build(1), exchange_named("gather")
    return lambda queries, documents: cast(Tensor, loss(Batch(queries, documents), exchange))


BOTH, ONE = ("query_to_document", "document_to_query"), ("query_to_document",)
IMPLEMENTATIONS: dict[str, Callable[[], Step]] = {
    "rayemb symmetric, gather": lambda: rayemb_loss(BOTH, "gather"),
    "rayemb symmetric, ring": lambda: rayemb_loss(BOTH, "ring"),
    "open_clip ClipLoss": open_clip_loss,
    "rayemb one-way, gather": lambda: rayemb_loss(ONE, "gather"),
    "ST MNRL": lambda: sentence_transformers_loss(cached=False),
    "ST CachedMNRL (loss stage)": lambda: sentence_transformers_loss(cached=True),
    "rayemb NT-Xent": rayemb_views,
    "PML NTXent": lambda: pml_loss("ntxent"),
    "PML SupCon": lambda: pml_loss("supcon"),
}
# Where a cubic loss stops fitting, and where one with twice the rows begins to take minutes a step.
LARGEST = {"PML NTXent": 256, "PML SupCon": 4096, "rayemb NT-Xent": 8192}


def worker(name: str, arguments: argparse.Namespace) -> None:
    """Measures one implementation as one rank and prints a line of JSON."""
    torch.set_num_threads(1)
    rows, repeats, device = arguments.rows[0], arguments.repeats, arguments.device
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(rank)
    shape = (rows // world, arguments.dim)
    sides = [F.normalize(torch.randn(shape, generator=generator), dim=1) for _ in range(2)]
    queries, documents = (side.to(device, DTYPES[arguments.dtype]).requires_grad_() for side in sides)
    step = IMPLEMENTATIONS[name]()
    if device == "cpu":
        resource.setrlimit(resource.RLIMIT_AS, (int(arguments.memory_gb * 2**30),) * 2)
    answer: dict[str, Any] = {}
    try:
        # Libraries and their buffers come with the first call; the batch's own memory is what is asked for.
        backward(step(*(rows[:32].detach().requires_grad_() for rows in (queries, documents))))
        times, before = [], reset_peak(device)
        for _ in range(repeats):
            dist.barrier()
            started = time.perf_counter()
            backward(step(queries, documents))
            synchronize(device)
            times.append(time.perf_counter() - started)
            queries.grad = documents.grad = None
        answer = {"seconds": statistics.median(times), "memory": peak(device) - before}
    except (RuntimeError, MemoryError) as error:
        answer = {"error": str(error).splitlines()[0][:80]}
    print(json.dumps(answer), flush=True)
    os._exit(0)  # a rank that ran out of memory would leave the others in a collective


def backward(loss: Tensor) -> None:
    """The backward pass, unless the loss has done its own."""
    if loss.requires_grad:
        torch.autograd.backward(loss)


def synchronize(device: str) -> None:
    """Waits for the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def measure(name: str, rows: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """The slowest time and the highest memory over the ranks of a fresh group."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    repeats = max(1, min(arguments.repeats, int(5e8 / rows**2)))
    call = [sys.executable, __file__, "--worker", name, "--rows", str(rows), "--repeats", str(repeats)]
    call += ["--dim", str(arguments.dim), "--device", arguments.device, "--dtype", arguments.dtype]
    call += ["--memory-gb", str(arguments.memory_gb)]
    ranks = []
    for rank in range(arguments.workers):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(arguments.workers),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        ranks.append(subprocess.Popen(call, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL))
    lines = [process.communicate()[0].decode().strip().splitlines() for process in ranks]
    answers = [json.loads(line[-1]) if line else {"error": "killed"} for line in lines]
    for answer in answers:
        if "error" in answer:
            return answer
    return {key: max(answer[key] for answer in answers) for key in ("seconds", "memory")}


def main() -> None:
    """Runs the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", help="global batch sizes")
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="fp32", help="of the vectors")
    parser.add_argument("--workers", type=int, help="ranks; 2 on CPU, the GPUs there are on CUDA")
    parser.add_argument("--repeats", type=int, default=5, help="steps per measurement, fewer where they are long")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each implementation; 1 above 8k rows")
    parser.add_argument("--memory-gb", type=float, default=9.0, help="address space of a CPU worker")
    parser.add_argument("--only", nargs="+", choices=list(IMPLEMENTATIONS), help="implementations")
    parser.add_argument("--records", type=Path, help="measurements, one a line; a run that was stopped goes on there")
    parser.add_argument("--output", type=Path, help="also write the table there")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments.worker, arguments)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("no GPU: run without --device cuda")
    arguments.workers = arguments.workers or (torch.cuda.device_count() if arguments.device == "cuda" else 2)
    sizes = arguments.rows or (
        [2**15, 2**17, 2**19, 2**20] if arguments.device == "cuda" else [2**k for k in range(10, 17)]
    )
    table = run(sizes, arguments)
    print(table)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(table)


def run(sizes: list[int], arguments: argparse.Namespace) -> str:
    """Measures what is not yet on record, turn by turn, and gives the table."""
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    records = arguments.records
    for line in records.read_text().splitlines() if records and records.exists() else []:
        name, rows, answer = json.loads(line)
        found.setdefault((name, rows), []).append(answer)
    for rows in sizes:
        for turn in range(arguments.rounds if rows <= 2**13 else 1):
            for name in arguments.only or IMPLEMENTATIONS:
                earlier = found.setdefault((name, rows), [])
                failed = any("error" in one for one in earlier)
                if rows > LARGEST.get(name, math.inf) or failed or len(earlier) > turn:
                    continue
                earlier.append(measure(name, rows, arguments))
                line = json.dumps([name, rows, earlier[-1]])
                print(line, file=sys.stderr, flush=True)
                if records:
                    records.parent.mkdir(parents=True, exist_ok=True)
                    with records.open("a") as file:
                        file.write(line + "\n")
    names = arguments.only or list(IMPLEMENTATIONS)
    ceiling = matmul_rate(arguments)
    lines = [
        f"`{' '.join(['python', *sys.argv])}`: {arguments.workers} worker(s), {arguments.device}, D = {arguments.dim}, "
        f"{arguments.dtype}, torch {torch.__version__}, one thread each; "
        f"matmul ceiling {ceiling / 1e9:.0f} GFLOP/s a worker",
        "",
        "Each cell: seconds of one forward and backward / peak MiB above the inputs, of one worker. -: does not fit.",
        "",
        "| global batch | " + " | ".join(f"{rows:,}" for rows in sizes) + " |",
        "|---" * (len(sizes) + 1) + "|",
    ]
    for name in names:
        lines.append(f"| {name} | " + " | ".join(cell(found[name, rows]) for rows in sizes) + " |")
    for name in names:
        if "symmetric" in name or "one-way" in name:
            lines.append(f"| {name}: share of the matmul ceiling | " + rates(found, name, sizes, ceiling, arguments))
    return "\n".join(lines) + "\n"


def cell(answers: list[dict[str, Any]]) -> str:
    """The best round's time and the highest peak."""
    if not answers or any("error" in answer for answer in answers):
        return "-"
    seconds = min(answer["seconds"] for answer in answers)
    return f"{seconds:.3g} s / {max(answer['memory'] for answer in answers) / 2**20:,.0f}"


def rates(
    found: dict[tuple[str, int], list[dict[str, Any]]],
    name: str,
    sizes: list[int],
    ceiling: float,
    arguments: argparse.Namespace,
) -> str:
    """Achieved rate of the four products (one forward, three backward) against the ceiling."""
    cells = []
    for rows in sizes:
        answers = [answer for answer in found[name, rows] if "seconds" in answer]
        work = 4 * 2 * (rows / arguments.workers) * rows * arguments.dim
        cells.append(f"{work / min(a['seconds'] for a in answers) / ceiling:.0%}" if answers else "-")
    return " | ".join(cells) + " |"


def matmul_rate(arguments: argparse.Namespace) -> float:
    """FLOP/s of a large product on this device, one thread: what the machine can do at most."""
    torch.set_num_threads(1)
    dtype = DTYPES[arguments.dtype] if arguments.device == "cuda" else torch.float32  # as the tiles multiply there
    left, right = (torch.randn(4096, arguments.dim, device=arguments.device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(5):
        synchronize(arguments.device)
        started = time.perf_counter()
        left @ right.T
        synchronize(arguments.device)
        best = min(best, time.perf_counter() - started)
    return float(2 * 4096 * 4096 * arguments.dim / best)


if __name__ == "__main__":
    main()
