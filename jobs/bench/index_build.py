"""Build time and peak memory of an index: raw FAISS in one process, rayemb's tasks one after another, and on Ray.

`python jobs/bench/index_build.py --rows 1000000 --dim 128 --output jobs/bench/results/index_build.md`

Every cell is a process of its own over the same embeddings table. Raw FAISS reads all vectors, trains on the same
sample, adds and writes. `tasks` is what a Ray worker does for each shard, all shards in one process: its peak is
that of the largest shard. `on Ray` is `build_index` with as many workers as there are cores, recall not measured.
Peaks are above what the process holds after its imports. autofaiss 2.18 takes no part: it fails with FAISS 1.15.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

FACTORIES = ("Flat", "SQ8", "IVF1024,Flat", "IVF1024,SQ8", "IVF1024,PQ64x4fs,Refine(SQfp16)", "HNSW32")


def main() -> None:
    """Runs the cells, or one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--shards", type=int, default=4)
    parser.add_argument("--factories", nargs="*", default=FACTORIES)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--output")
    parser.add_argument("--cell", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        kind, table, factory, shards, folder = json.loads(arguments.cell)
        print(json.dumps(KINDS[kind](table, factory, shards, folder)))
        return
    with tempfile.TemporaryDirectory() as folder:
        table = write_table(f"{folder}/embeddings", arguments.rows, arguments.dim)
        lines = [
            f"`{' '.join(['python', *sys.argv])}`: {arguments.rows:,} rows of {arguments.dim} dimensions, "
            f"{arguments.shards} shards, {len(os.sched_getaffinity(0))} cores.\n",
            "| factory | kind | seconds | index MB | largest file MB | peak MB | peak / largest file |",
            "|---|---|---|---|---|---|---|",
        ]
        print("\n".join(lines), flush=True)
        for factory in arguments.factories:
            for kind in arguments.kinds:
                line = row(kind, table, factory, arguments.shards, folder)
                print(line, flush=True)
                lines.append(line)
    if arguments.output:
        Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.output).write_text("\n".join(lines) + "\n")


def row(kind: str, table: str, factory: str, shards: int, folder: str) -> str:
    """One cell as a line of the table; what went wrong, if it did."""
    with tempfile.TemporaryDirectory(dir=folder) as out:
        cell = json.dumps([kind, table, factory, shards, out])
        done = subprocess.run([sys.executable, __file__, "--cell", cell], capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["?"])[-1]
        return f"| {factory} | {kind} | - ({why[:80]}) | | | | |"
    found = json.loads(done.stdout.splitlines()[-1])
    peak = f"{found['peak'] / 1e6:,.0f}" if found["peak"] else "-"
    share = f"{found['peak'] / found['largest']:.2f}" if found["peak"] else "-"
    return (
        f"| {factory} | {kind} | {found['seconds']:.1f} | {found['bytes'] / 1e6:,.0f} | "
        f"{found['largest'] / 1e6:,.0f} | {peak} | {share} |"
    )


def write_table(uri: str, rows: int, dim: int) -> str:
    """An embeddings table of unit vectors that lie near a twelve-dimensional surface, block by block."""
    import lance
    import pyarrow as pa

    from rayemb.data.embeddings import embeddings_schema

    schema = embeddings_schema([], dim, "0" * 64, images=False)
    rng = np.random.default_rng(0)
    surface = rng.normal(size=(12, dim)).astype(np.float32)

    def batches() -> Iterator[pa.RecordBatch]:
        for low in range(0, rows, 20_000):
            count = min(20_000, rows - low)
            x = rng.normal(size=(count, 12)).astype(np.float32) @ surface
            x += rng.normal(size=(count, dim)).astype(np.float32)
            x /= np.linalg.norm(x, axis=1, keepdims=True)
            ids = pa.array([str(i) for i in range(low, low + count)])
            yield pa.RecordBatch.from_arrays(
                [ids, pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), dim)], schema=schema
            )

    lance.write_dataset(pa.RecordBatchReader.from_batches(schema, batches()), uri, schema=schema)
    return uri


def raw(uri: str, factory: str, shards: int, folder: str) -> dict[str, Any]:
    """FAISS alone: all vectors in memory, one index."""
    import faiss

    from rayemb.data.embeddings import EmbeddingsTable

    table = EmbeddingsTable.open(uri)
    with measured() as found:
        vectors = table.vectors(0, table.rows)
        index = faiss.index_factory(table.dim, factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            index.train(
                vectors[np.random.default_rng(0).choice(len(vectors), min(50_000, len(vectors)), replace=False)]
            )
        index.add(vectors)
        faiss.write_index(index, f"{folder}/index.faiss")
    return found.with_files(folder)


def by_tasks(uri: str, factory: str, shards: int, folder: str) -> dict[str, Any]:
    """The tasks of a build, one after another in this process."""
    from rayemb.data.embeddings import EmbeddingsTable
    from rayemb.index import IndexConfig, tasks
    from rayemb.index.ledger import Ledger

    table = EmbeddingsTable.open(uri)
    ledger = Ledger(folder, "v-20260101T000000-00000000")
    with measured() as found:
        trained = tasks.train(uri, table.version, IndexConfig(factory=factory), ledger)
        bounds = np.linspace(0, table.rows, shards + 1).astype(int).tolist()
        for number, (low, high) in enumerate(pairwise(bounds)):
            tasks.build_shard(trained, "", uri, table.version, ledger, number, high - low, low)
    return found.with_files(folder)


def on_ray(uri: str, factory: str, shards: int, folder: str) -> dict[str, Any]:
    """`build_index` on a private cluster, which is not counted."""
    from rayemb.cluster import ClusterConfig, connect
    from rayemb.index import IndexConfig, build_index

    with connect(ClusterConfig()), measured() as found:
        build_index(uri, folder, IndexConfig(factory=factory, shards=shards, recall_queries=0))
    found.peak = 0  # of the driver: the workers' are those of the tasks
    return found.with_files(folder)


KINDS = {"raw FAISS": raw, "tasks": by_tasks, "on Ray": on_ray}


class measured:  # noqa: N801  # reads as a sentence
    """Seconds and peak memory of its body."""

    def __enter__(self) -> "measured":
        from peak_memory import reset_peak

        self.base, self.started = reset_peak("cpu"), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        from peak_memory import peak

        self.seconds, self.peak = time.perf_counter() - self.started, peak("cpu") - self.base

    def with_files(self, folder: str) -> dict[str, Any]:
        """The figures, with the sizes of the FAISS files in `folder`."""
        sizes = [path.stat().st_size for path in Path(folder).rglob("*.faiss") if path.name != "trained.faiss"]
        return {"seconds": self.seconds, "peak": self.peak, "bytes": sum(sizes), "largest": max(sizes)}


if __name__ == "__main__":
    main()
