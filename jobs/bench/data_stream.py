"""Rows per second into a trainer, beside webdataset and Ray Data; waiting; memory over the size of the corpus.

    python jobs/bench/data_stream.py --icons ICONS            # the folder that jobs/bench/icons.py made; ~15 minutes
    python jobs/bench/data_stream.py --icons ICONS --parts throughput --processes 1 2 --rounds 5

throughput: the same real rows, decoded and tokenised by the same functions into the same arrays: rayemb's stream from
its corpus, webdataset + torch DataLoader from tar shards, and the same plan through Ray Data, each with as many
decoding processes, in turns. Rows per second once the first batch is there, and per CPU second of all processes
(raylet, object store and scheduler included).
waiting: a real training (two towers, DeepSpeed); the share of its time that it waits for rows.
memory: peak memory of the decoder and the planner at three sizes of corpus (synthetic rows).
"""

import argparse
import functools
import io
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import ray
from PIL import Image

from rayemb import storage
from rayemb.cluster import ClusterConfig, connect
from rayemb.config import load
from rayemb.data import Corpus, CorpusConfig, StreamSettings, build_corpus, open_members, open_stream
from rayemb.data.augment import AugmentConfig
from rayemb.data.corpus import SCHEMA
from rayemb.data.decode import ColumnReader, Decoder, DecodeSettings, Piece
from rayemb.data.keys import keys_of, text_keys
from rayemb.data.mix import CorpusEntry, MixConfig
from rayemb.data.plan import Planner
from rayemb.data.stream import LoaderConfig
from rayemb.models import TextTokenizer, TokenizerConfig, decode_image, image_tensor
from rayemb.train import TrainConfig, train

SIZE, BATCH = 64, 256
Batches = Iterator[int]
Arm = Callable[[Path, TextTokenizer, int, int], Batches]


def from_rayemb(icons: Path, tokenizer: TextTokenizer, processes: int, seed: int, distinct: bool = False) -> Batches:
    """Rows of each batch of our stream; `distinct`: without duplicates of an image or a text."""
    entries = {"icons": CorpusEntry(uri=str(icons / "corpus"), main_caption=1.0)}
    mix = MixConfig(distinct=["query", "text"]) if distinct else MixConfig()
    settings = StreamSettings(entries, mix, BATCH, seed)
    decode = DecodeSettings(tokenizer, SIZE, seed, AugmentConfig())
    loader = LoaderConfig(decoders=processes, prefetch=4)
    stream = open_stream(settings, open_members(entries), decode, loader, world=1)
    for batch in stream.batches(0, 1 << 30):
        used(batch.arrays["pixels"], batch.arrays["tokens"])
        yield len(batch.arrays["pixels"])


def from_webdataset(icons: Path, tokenizer: TextTokenizer, processes: int, seed: int) -> Batches:
    """Rows of each batch of webdataset in torch's DataLoader."""
    import webdataset as wds
    from torch.utils.data import DataLoader

    def decode(sample: dict[str, bytes]) -> tuple[Any, str]:
        return image_tensor(decode_image(sample["png"]), SIZE), sample["txt"].decode()

    def collate(samples: Sequence[tuple[Any, str]]) -> tuple[Any, Any]:
        return np.stack([pixels for pixels, _ in samples]), tokenizer([text for _, text in samples])

    shards = sorted(map(str, (icons / "webdataset").glob("*.tar")))
    dataset = wds.WebDataset(shards, shardshuffle=len(shards), seed=seed).shuffle(1000).map(decode)
    dataset = dataset.batched(BATCH, collation_fn=collate)
    for pixels, tokens in DataLoader(dataset, batch_size=None, num_workers=processes, prefetch_factor=4):
        used(np.asarray(pixels), np.asarray(tokens))
        yield len(pixels)


def from_ray_data(icons: Path, tokenizer: TextTokenizer, processes: int, seed: int) -> Batches:
    """Rows of each batch of the same plan, one block a batch, through Ray Data in order."""
    entries = {"icons": CorpusEntry(uri=str(icons / "corpus"), main_caption=1.0)}
    members = open_members(entries)
    readers = {"icons": ColumnReader(members[0])}
    plan = Planner(entries, {"icons": members[0].groups}, readers, MixConfig(), batch_size=BATCH, seed=seed)
    rows = [np.sort(plan.next().parts[0].ordinals).tolist() for _ in range(400)]  # type: ignore[union-attr]

    class Decode:
        def __init__(self) -> None:
            self.decoder = Decoder(members, DecodeSettings(tokenizer, SIZE, seed, AugmentConfig()))

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            (step,) = batch["step"]
            arrays, _ = self.decoder(Piece(int(step), ((0, np.asarray(rows[step])),)))
            return {name: arrays[name] for name in ("pixels", "tokens")}

    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    dataset = ray.data.from_items([{"step": step} for step in range(len(rows))], override_num_blocks=len(rows))
    dataset = dataset.map_batches(
        Decode, batch_size=1, num_cpus=0.5, compute=ray.data.ActorPoolStrategy(size=processes)
    )
    for batch in dataset.iter_batches(batch_size=BATCH, prefetch_batches=4):
        used(batch["pixels"], batch["tokens"])
        yield len(batch["pixels"])


ARMS: dict[str, Arm] = {
    "rayemb": from_rayemb,
    "rayemb, distinct": functools.partial(from_rayemb, distinct=True),
    "webdataset": from_webdataset,
    "ray data": from_ray_data,
}


def used(*arrays: np.ndarray[Any, Any]) -> None:
    """Reads every byte, as a copy to a device would."""
    for array in arrays:
        np.array(array)


def cpu_seconds() -> float:
    """CPU time of this process and all below it, the cluster's own processes among them."""
    total = 0.0
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total


def measured(batches: Batches, rows: int) -> tuple[float, float, float]:
    """Rows per second and per CPU second after the first batches, and the seconds until the first."""
    began = time.monotonic()
    next(batches)
    first = time.monotonic() - began
    for _ in range(8):  # what was decoded ahead while the pipeline started
        next(batches)
    start, cpu, seen = time.monotonic(), cpu_seconds(), 0
    while seen < rows:
        seen += next(batches)
    return seen / (time.monotonic() - start), seen / (cpu_seconds() - cpu), first


def throughput(icons: Path, processes: list[int], rounds: int, rows: int) -> None:
    """The table of rows per second."""
    tokenizer = TextTokenizer.train(
        [
            text
            for file in sorted((icons / "parquet").glob("*.parquet"))
            for text in pq.read_table(file)["text"].to_pylist()
        ],
        TokenizerConfig(),
    )
    print("| processes | arm | rows/s (each turn) | median | rows per CPU second | first batch, s |")
    print("|---|---|---|---|---|---|")
    for count in processes:
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in ARMS}
        for turn in range(rounds):
            for name in list(ARMS)[turn % len(ARMS) :] + list(ARMS)[: turn % len(ARMS)]:
                batches = ARMS[name](icons, tokenizer, count, turn)
                found[name].append(measured(batches, rows))
                batches.close()  # type: ignore[attr-defined]
                time.sleep(2)
        for name, turns in found.items():
            speeds, per_cpu, firsts = zip(*turns, strict=True)
            each = ", ".join(f"{speed:,.0f}" for speed in speeds)
            print(
                f"| {count} | {name} | {each} | {statistics.median(speeds):,.0f} | {statistics.median(per_cpu):,.0f} | "
                f"{statistics.median(firsts):.1f} |"
            )
        ours, theirs = (statistics.median(turn[0] for turn in found[name]) for name in ("rayemb", "webdataset"))
        cpu = [statistics.median(turn[1] for turn in found[name]) for name in ("rayemb", "webdataset")]
        print(
            f"\n{count} decoding processes: {ours / theirs:.2f} x webdataset's rows/s, "
            f"{cpu[0] / cpu[1]:.2f} x per CPU second\n"
        )


def waiting(icons: Path, workers: list[int], steps: int) -> None:
    """The table of waiting."""
    print("| workers | decoders of each | pairs/s | share of the time waiting for rows (each report) |")
    print("|---|---|---|---|")
    for count in workers:
        overrides = [
            f"steps={steps}",
            "evaluation.tasks={}",
            f"workers={count}",
            "logging.every=10",
            "checkpoints.every=100000",
        ]
        place = icons / f"training-{count}"
        storage.delete(str(place))
        model = train(load(TrainConfig, None, overrides), str(icons / "corpus"), f"{place}/model", f"{place}/runs")
        history = model.info["training"]
        shares = ", ".join(f"{row['time/data']:.1%}" for row in history)
        print(f"| {count} | 1 | {history[-1]['pairs_per_second_overall']:.0f} | {shares} |")


def memory(folder: Path, sizes: list[int], steps: int) -> None:
    """The table of memory."""
    print("| rows | row groups | planner MiB | decoder MiB | this worker MiB |")
    print("|---|---|---|---|---|")
    tokenizer = TextTokenizer.train(["a drawing of"], TokenizerConfig())
    for rows in sizes:
        uri = synthetic(folder / f"rows-{rows}", rows)
        entries = {"a": CorpusEntry(uri=uri)}
        settings = StreamSettings(entries, MixConfig(distinct=["text"]), BATCH, 0)
        decode = DecodeSettings(tokenizer, SIZE, 0, AugmentConfig(), cache_bytes=64 << 20)
        members = open_members(entries)
        stream = open_stream(settings, members, decode, LoaderConfig(), world=1)
        peaks = {"ray::PlanServer": 0, "ray::DecodeServer": 0, "worker": 0}
        for batch in stream.batches(0, steps):
            used(batch.arrays["pixels"])
            for name in peaks:
                peaks[name] = max(peaks[name], private_bytes(name))
        ray.kill(stream.planner)
        plan, decoder, worker = (peak >> 20 for peak in peaks.values())
        print(f"| {rows:,} | {len(members[0].groups):,} | {plan} | {decoder} | {worker} |")


def private_bytes(name: str) -> int:
    """Memory of the process of this name that it shares with none; of this process for `worker`."""
    if name == "worker":
        return int(psutil.Process().memory_full_info().uss)
    found = [p for p in psutil.Process().children(recursive=True) if name in " ".join(p.cmdline())]
    return max((int(p.memory_full_info().uss) for p in found), default=0)


def synthetic(folder: Path, rows: int) -> str:
    """A corpus of that many rows in files of 10,000, its images noise of 64 pixels."""
    if (folder / "_corpus.json").exists():
        return str(folder)
    rng = np.random.default_rng(0)
    images = []
    for _ in range(500):
        out = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)).save(out, "JPEG")
        images.append(out.getvalue())
    image_keys = keys_of(images)
    files = []
    for start in range(0, rows, 10_000):
        numbers = range(start, min(start + 10_000, rows))
        texts = [f"drawing {n}" for n in numbers]
        keys = text_keys(texts)
        table = pa.table(
            {
                "id": [str(n) for n in numbers],
                "image": [images[n % 500] for n in numbers],
                "query": [None] * len(texts),
                "text": texts,
                "texts": [[text] for text in texts],
                "negatives": [[] for _ in texts],
                "concept": texts,
                "score": [None] * len(texts),
                "style": ["noise"] * len(texts),
                "license": ["CC0"] * len(texts),
                "query_key": [image_keys[n % 500] for n in numbers],
                "text_key": keys,
                "concept_key": keys,
            },
            schema=SCHEMA,
        )
        name = f"split=train/shard-{start // 10_000:05d}.parquet"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, folder / name, row_group_size=256, write_page_checksum=True)
        files.append({"file": name, "rows": len(texts), "sha256": storage.sha256_file(str(folder / name))})
    splits = {"train": {"rows": rows, "files": files}}
    manifest = {
        "format": 2,
        "kind": "image_text",
        "digest": str(rows),
        "fingerprint": "",
        "rows": rows,
        "splits": splits,
    }
    storage.write_json(str(folder / "_corpus.json"), manifest)
    return str(folder)


def main() -> None:
    """Runs the parts that are asked for and prints their tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--icons", type=Path, required=True, help="the folder that jobs/bench/icons.py made")
    parser.add_argument("--parts", nargs="+", default=["throughput", "waiting", "memory"])
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=30_000, help="rows of each turn")
    parser.add_argument("--steps", type=int, default=60, help="steps of each training and of each memory run")
    parser.add_argument("--sizes", nargs="+", type=int, default=[10_000, 100_000, 1_000_000])
    args = parser.parse_args()
    with connect(ClusterConfig(num_cpus=6, object_store_mb=500)):
        config = CorpusConfig.model_validate({"source": {"name": "parquet", "uri": str(args.icons / "parquet")}})
        corpus = build_corpus(config, str(args.icons / "corpus"))
        print(f"{Corpus.open(corpus.uri).splits} rows, batches of {BATCH}, {SIZE} pixels\n")
        if "throughput" in args.parts:
            throughput(args.icons, args.processes, args.rounds, args.rows)
        if "waiting" in args.parts:
            waiting(args.icons, [1, 2], args.steps)
        if "memory" in args.parts:
            memory(args.icons / "synthetic", args.sizes, args.steps)


if __name__ == "__main__":
    main()
