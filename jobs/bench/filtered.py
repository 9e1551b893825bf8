"""Filtered search over selectivity: recall@10 and queries a second of one shard, beside brute force (card S041).

    .venv/bin/python jobs/bench/filtered.py                        # 100,000 synthetic vectors: 5 minutes of one core
    .venv/bin/python jobs/bench/filtered.py --embeddings URI --types "IVF256,Flat" --shares 0.1 0.01

Random filters, and anti-correlated ones: they keep the rows that are furthest from what is asked for. Recall is against
exact search over the rows that pass. QPS: single queries each with a filter that was never seen before (its evaluation
counts), single queries with one filter, and 64 queries at once; brute force is FAISS's flat index with a bitmap of the
rows that pass, evaluation included. One thread, seconds of CPU time. Prints a section of Markdown.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss as _faiss
import lance
import numpy as np
import pyarrow as pa
from faiss.contrib.datasets import SyntheticDataset
from numpy.typing import NDArray

from rayemb.data.embeddings import ID, VECTOR, EmbeddingsTable, embeddings_schema
from rayemb.index import Effort
from rayemb.index.faiss_index import FaissShard, make_index
from rayemb.index.keys import Keys
from rayemb.index.manifest import ShardFile
from rayemb.index.payload import Payload
from rayemb.index.selection import Selection
from rayemb.index.shard import Shard

faiss: Any = _faiss
Floats = NDArray[np.float32]

K, QUERIES, SECONDS = 10, 200, 0.3
TYPES = ["Flat", "IVF1024,Flat", "HNSW32", "PQ64x4fs"]
SHARES = [1.0, 0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.001]


def unit(x: Floats) -> Floats:
    """Rows of length one."""
    return np.ascontiguousarray(x / np.linalg.norm(x, axis=1, keepdims=True), np.float32)


def table_of(folder: str, x_ND: Floats, payload: dict[str, Any]) -> EmbeddingsTable:
    """An embeddings table on disk."""
    columns = {name: pa.array(values) for name, values in payload.items()}
    schema = embeddings_schema([pa.field(n, a.type) for n, a in columns.items()], x_ND.shape[1], "0" * 64, images=False)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(x_ND.ravel()), x_ND.shape[1])
    data = {ID: pa.array([str(i) for i in range(len(x_ND))]), VECTOR: vectors, **columns}
    lance.write_dataset(pa.table(data, schema=schema), folder)
    return EmbeddingsTable.open(folder)


def shard_of(factory: str, x_ND: Floats, table: EmbeddingsTable, effort: Effort) -> Shard:
    """A shard of one type over all rows."""
    index = make_index(x_ND.shape[1], factory)
    index.train(x_ND[:50_000])
    index.add(x_ND)
    info = ShardFile(file="s", start=0, rows=len(x_ND), bytes=0, sha256="")
    payload = Payload(table.columns(0, len(x_ND), [ID, "random", "nearness"]))
    return Shard(info, FaissShard(index), Keys(0, len(x_ND)), table, payload, effort)


def rate(work: Callable[[int], Any], queries: int = 1) -> float:
    """Queries a second of CPU time."""
    work(0)
    done, begin = 0, time.process_time()
    while time.process_time() - begin < SECONDS or done < 3:
        done += 1
        work(done)
    return done * queries / (time.process_time() - begin)


def recall(keys: NDArray[np.int64], x_ND: Floats, queries: Floats, mask: NDArray[np.bool_]) -> float:
    """Share of the exact K best that were found; of all that pass where those are fewer."""
    scores = np.where(mask, queries @ x_ND.T, -np.inf)
    count = min(K, int(mask.sum()))
    last = -np.partition(-scores, count - 1, axis=1)[:, count - 1 : count]
    found = np.take_along_axis(scores, np.maximum(keys, 0), 1)
    return float(((keys >= 0) & (found >= last - 1e-6)).sum(axis=1).clip(max=count).mean() / count)


def row(shard: Shard, brute: Any, x_ND: Floats, queries: Floats, column: str, share: float) -> str:
    """A line of the table."""

    def filter_of(i: int) -> dict[str, Any]:
        # Of the same selectivity, and another text each time.
        return {column: {"lt": share + i * 1e-9}}

    mask = shard.payload.mask(filter_of(0))
    answer = shard.answer(queries, K, filter_of(0))
    single = shard.answer(queries[:1], K, filter_of(0)).strategy
    found = recall(answer.keys, x_ND, queries, mask)
    singles = np.concatenate([shard.search(query[None], K, filter_of(0))[1] for query in queries])
    found_single = recall(singles, x_ND, queries, mask)
    new = rate(lambda i: shard.search(queries[i % len(queries)][None], K, filter_of(i)))
    same = rate(lambda i: shard.search(queries[i % len(queries)][None], K, filter_of(0)))
    batch = rate(lambda i: shard.search(queries[:64], K, filter_of(0)), 64)

    def exact(i: int) -> None:
        selection = Selection(shard.payload.mask(filter_of(i)))
        parameters = faiss.SearchParameters(sel=selection.selector)
        brute.search(queries[i % len(queries)][None], K, params=parameters)

    flat = rate(exact)
    cells = [f"{100 * share:g} %", column, f"{single} / {answer.strategy}", f"{found_single:.3f} / {found:.3f}"]
    cells += [f"{new:,.0f}", f"{same:,.0f}", f"{batch:,.0f}", f"{flat:,.0f}", f"{new / flat:.1f}"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--embeddings", help="URI of an embeddings table; default: synthetic vectors")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--types", nargs="+", default=TYPES)
    parser.add_argument("--shares", nargs="+", type=float, default=SHARES)
    parser.add_argument("--nprobe", type=int, default=64)
    parser.add_argument("--ef-search", type=int, default=64)
    parser.add_argument("--kinds", nargs="+", default=["random", "nearness"])
    options = parser.parse_args()
    faiss.omp_set_num_threads(1)
    rng = np.random.default_rng(0)
    if options.embeddings:
        source = EmbeddingsTable.open(options.embeddings)
        everything = unit(source.vectors(0, min(source.rows, options.rows)))
        picked = rng.permutation(len(everything))
        x_ND, asked = everything[picked[2000:]], everything[picked[:2000]]
    else:
        data = SyntheticDataset(options.dim, 0, options.rows, 2000)
        x_ND, asked = unit(data.get_database()), unit(data.get_queries())
    # What is asked for lies on one side; `nearness` is small for the rows of the other.
    nearness = np.argsort(np.argsort(x_ND @ asked[0])) / len(x_ND)
    correlated = asked[np.argsort(-(asked @ asked[0]))[:QUERIES]]
    columns = {"random": rng.permutation(len(x_ND)) / len(x_ND), "nearness": nearness}
    print(f"{len(x_ND):,} x {x_ND.shape[1]}, nprobe {options.nprobe}, ef_search {options.ef_search}, k {K}\n")
    brute = faiss.IndexFlatIP(x_ND.shape[1])
    brute.add(x_ND)
    with tempfile.TemporaryDirectory() as folder:
        table = table_of(str(Path(folder) / "table"), x_ND, columns)
        for factory in options.types:
            begin = time.perf_counter()
            shard = shard_of(factory, x_ND, table, Effort(options.nprobe, options.ef_search))
            sys.stderr.write(f"{factory}: built in {time.perf_counter() - begin:.1f} s\n")
            _, keys = shard.search(asked[:QUERIES], K)
            plain = recall(keys, x_ND, asked[:QUERIES], np.ones(len(x_ND), np.bool_))
            speed = rate(lambda i, shard=shard: shard.search(asked[i % QUERIES][None], K))  # type: ignore[misc]
            print(f"{factory}: without a filter recall@{K} {plain:.3f}, {speed:,.0f} QPS\n")
            print("| pass | filter | strategy, one / 64 | recall@10, one / 200 | new filter QPS | same filter QPS "
                  "| 64 at once QPS | brute force QPS | times |")  # fmt: skip
            print("|" + "---|" * 9)
            for kind in options.kinds:
                queries = asked[:QUERIES] if kind == "random" else correlated
                for share in options.shares:
                    print(row(shard, brute, x_ND, queries, kind, share), flush=True)
            print()


if __name__ == "__main__":
    main()
