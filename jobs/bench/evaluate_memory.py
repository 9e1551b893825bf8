"""Memory and time of an evaluation of 1M x 128 vectors from an embeddings table, each part in a process of its own.

`python jobs/bench/evaluate_memory.py [--rows 1000000] [--queries 1000]`. The bound: every part stays under 4 GB.

search: the 100 best rows of each query (retrieval, kNN); ranks: the rank of its best relevant row (image-text recall).
Neither part imports more than it needs; the peak is the process's own (VmHWM), Python and its libraries included.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

BOUND_GB = 4.0


def table(folder: str, rows: int, dim: int) -> str:
    """An embeddings table of random unit vectors, written block by block."""
    import lance
    import numpy as np
    import pyarrow as pa

    from rayemb.data.embeddings import embeddings_schema

    schema = embeddings_schema([], dim, "bench", images=False)
    rng = np.random.default_rng(0)

    def batches():  # type: ignore[no-untyped-def]
        for start in range(0, rows, 50_000):
            count = min(50_000, rows - start)
            x = rng.standard_normal((count, dim)).astype(np.float32)
            x /= np.linalg.norm(x, axis=1, keepdims=True)
            column = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), dim)
            yield pa.record_batch([[str(n) for n in range(start, start + count)], column], schema=schema)

    uri = f"{folder}/embeddings.lance"
    lance.write_dataset(pa.RecordBatchReader.from_batches(schema, batches()), uri)
    return uri


def part(name: str, uri: str, queries: int) -> dict[str, float | str]:
    """One part, in this process."""
    import numpy as np

    from rayemb.evaluate.exact import TableVectors, exact_search
    from rayemb.evaluate.exact_ranks import exact_ranks

    corpus = TableVectors(uri)
    rng = np.random.default_rng(1)
    own = np.sort(rng.choice(corpus.rows, queries, replace=False))
    noise = rng.standard_normal((queries, 128)).astype(np.float32)
    asked = np.concatenate([corpus.read(int(n), int(n) + 1) for n in own[:queries]]) + 0.1 * noise
    asked /= np.linalg.norm(asked, axis=1, keepdims=True)
    started = time.monotonic()
    if name == "search":
        found = exact_search(asked, corpus, 100)
        share = float((found.rows[:, :1] == own[:, None]).mean())
    else:
        ranks = exact_ranks(asked, corpus, own, np.arange(corpus.rows))
        share = float((ranks == 1).mean())
    seconds = time.monotonic() - started
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1e6
    return {"part": name, "peak_gb": round(peak, 2), "seconds": round(seconds, 1), "first_is_own": share}


def main() -> int:
    """Every part in a process of its own; exit code 1 if one is over the bound."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--part", nargs=2, metavar=("NAME", "TABLE"))
    args = parser.parse_args()
    if args.part:
        sys.stdout.write(json.dumps(part(*args.part, args.queries)) + "\n")
        return 0
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        uri = table(folder, args.rows, 128)
        for name in ("search", "ranks"):
            command = [sys.executable, __file__, "--queries", str(args.queries), "--part", name, uri]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            sys.stdout.write(done.stdout)
            worst = max(worst, json.loads(done.stdout)["peak_gb"])
    sys.stdout.write(f"{args.rows:,} x 128, {args.queries:,} queries: at most {worst} GB of {BOUND_GB:g}\n")
    return int(worst >= BOUND_GB)


if __name__ == "__main__":
    sys.exit(main())
