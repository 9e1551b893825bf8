"""What live updates cost: writes a second, how soon they are found, and what searches lose beside them.

`python jobs/bench/live.py --rows 200000 --dim 128 --output jobs/bench/results/live.md`

One process, one thread for FAISS, a local disk. Writes are durable Lance commits; *fresh* is from the call of the write
to the answer of a search that finds its item. Searches are of one query each, over the index alone and with updates
beside it: half of them replace rows of the index, half are new.
"""

import argparse
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import faiss
import lance
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayemb.cluster import ClusterConfig, connect
from rayemb.data.embeddings import ID, VECTOR, embeddings_schema
from rayemb.index import Index, IndexConfig, build_index
from rayemb.index.live.log import log_uri

SIZES = (1, 10, 100, 1000)
BESIDE = (0, 100, 1_000, 10_000, 50_000)
QUERIES = 400


def main() -> None:
    """Builds an index, writes to it, prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--factory", default="IVF1024,Flat")
    parser.add_argument("--output")
    arguments = parser.parse_args()
    faiss.omp_set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        lines = measure(Path(folder), arguments.rows, arguments.dim, arguments.factory)
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.output:
        Path(arguments.output).parent.mkdir(parents=True, exist_ok=True)
        Path(arguments.output).write_text(text)


def measure(folder: Path, rows: int, dim: int, factory: str) -> list[str]:
    """The tables, as lines of Markdown."""
    rng = np.random.default_rng(0)
    x, table, uri = unit(rng, rows, dim), str(folder / "e.lance"), str(folder / "i")
    columns = {
        ID: pa.array([f"row-{i}" for i in range(rows)]),
        VECTOR: pa.FixedSizeListArray.from_arrays(pa.array(x.reshape(-1)), dim),
        "group": pa.array([f"g{i % 100}" for i in range(rows)]),
    }
    schema = embeddings_schema([pa.field("group", pa.string())], dim, "bench", images=False)
    lance.write_dataset(pa.table(columns, schema=schema), table)
    with connect(ClusterConfig()):
        build_index(table, uri, IndexConfig(factory=factory, shards=1, recall_queries=0))
    lines = [f"{rows:,} x {dim}, {factory}, nprobe 16", "", *written(uri, rng, dim), ""]
    shutil.rmtree(log_uri(table))  # the searches are beside updates of their own
    return lines + searched(uri, rng, x)


def written(uri: str, rng: np.random.Generator, dim: int) -> list[str]:
    """Writes and how fresh they are, by items a write."""
    lines = ["| items a write | writes/s | items/s | fresh p50 ms | fresh p95 ms |", "|---|---|---|---|---|"]
    with Index.open(uri, live=True) as index:
        for size in SIZES:
            count, fresh = max(20, min(300, 3000 // size)), []
            vectors = unit(rng, count * size, dim)
            ids = [f"new-{size}-{i}" for i in range(count * size)]
            started = time.perf_counter()
            for at in range(0, count * size, size):
                index.upsert(ids[at : at + size], vectors[at : at + size], [{"group": "new"}] * size)
            seconds = time.perf_counter() - started
            for at in range(0, count * size, size):
                begun = time.perf_counter()
                index.upsert(ids[at : at + size], vectors[at : at + size], [{"group": "again"}] * size)
                found = index.ids(index.search(vectors[at : at + 1], 1).keys).to_pylist()
                fresh.append(time.perf_counter() - begun)
                assert found == [ids[at]], "the write was not found"
            p50, p95 = np.percentile(fresh, (50, 95)) * 1000
            rate = count / seconds
            lines.append(f"| {size} | {rate:,.0f} | {rate * size:,.0f} | {p50:.1f} | {p95:.1f} |")
    return lines


def searched(uri: str, rng: np.random.Generator, x: NDArray[np.float32]) -> list[str]:
    """Searches a second beside so many updates."""
    queries = unit(rng, QUERIES, x.shape[1])
    lines = ["| updates beside | open s | search p50 ms | filtered 1 % p50 ms |", "|---|---|---|---|"]
    plain = Index.open(uri)
    cells = [f"{1000 * median(lambda q: plain.search(q, 10), queries):.3f}"]
    cells.append(f"{1000 * median(lambda q: plain.search(q, 10, {'group': 'g7'}), queries):.3f}")
    lines.append(f"| not followed | | {cells[0]} | {cells[1]} |")
    with Index.open(uri, live=True) as index:
        done = 0
        for count in BESIDE:
            while done < count:
                step = min(1000, count - done)
                ids = [f"row-{i}" if i % 2 else f"beside-{i}" for i in range(done, done + step)]
                index.upsert(ids, unit(rng, step, x.shape[1]), [{"group": f"g{i % 100}"} for i in range(step)])
                done += step
            opening = time.perf_counter()
            Index.open(uri, live=True).close()
            opened = time.perf_counter() - opening
            search = 1000 * median(lambda q: index.search(q, 10), queries)
            filtered = 1000 * median(lambda q: index.search(q, 10, {"group": "g7"}), queries)
            lines.append(f"| {count:,} | {opened:.2f} | {search:.3f} | {filtered:.3f} |")
    return lines


def median(ask: Callable[[NDArray[np.float32]], object], queries: NDArray[np.float32]) -> float:
    """Seconds of the median call, after one to warm up."""
    ask(queries[:1])
    times = []
    for i in range(len(queries)):
        started = time.perf_counter()
        ask(queries[i : i + 1])
        times.append(time.perf_counter() - started)
    return float(np.median(times))


def unit(rng: np.random.Generator, rows: int, dim: int) -> NDArray[np.float32]:
    """Random unit vectors `(rows, dim)` float32."""
    x = rng.normal(size=(rows, dim)).astype(np.float32)
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True), np.float32)


if __name__ == "__main__":
    main()
