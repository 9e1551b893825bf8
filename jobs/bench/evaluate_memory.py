"""Memory and time of an evaluation of 1M x 128 vectors from an embeddings table, each part in a process of its own.

`python jobs/bench/evaluate_memory.py [--rows 1000000] [--queries 1000]`. The bound: every part stays under 4 GB.

search: the 100 best rows of each query (retrieval); ranks: the rank of its best relevant row (image-text recall);
clustering: k-means of all rows and its figures; knn, probe: classification of the queries' rows by all others.
The peak is the process's own (VmHWM), Python and its libraries included.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

BOUND_GB = 4.0
PARTS = ("search", "ranks", "clustering", "knn", "probe")
CLASSES = 10


def table(folder: str, rows: int, dim: int) -> str:
    """An embeddings table of random unit vectors, written block by block."""
    import lance
    import numpy as np
    import pyarrow as pa

    from rayemb.data.embeddings import embeddings_schema

    schema = embeddings_schema([], dim, "bench", images=False)
    rng = np.random.default_rng(0)

    def batches() -> Iterator[pa.RecordBatch]:
        for start in range(0, rows, 50_000):
            count = min(50_000, rows - start)
            x = rng.standard_normal((count, dim)).astype(np.float32)
            x /= np.linalg.norm(x, axis=1, keepdims=True)
            column = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), dim)
            yield pa.record_batch([[str(n) for n in range(start, start + count)], column], schema=schema)

    uri = f"{folder}/embeddings.lance"
    lance.write_dataset(pa.RecordBatchReader.from_batches(schema, batches()), uri)
    return uri


def search(name: str, uri: str, queries: int) -> dict[str, float]:
    """The share of queries, made of rows, that find their row first."""
    import numpy as np

    from rayemb.evaluate.exact import TableVectors, exact_search
    from rayemb.evaluate.exact_ranks import exact_ranks

    corpus = TableVectors(uri)
    rng = np.random.default_rng(1)
    own = np.sort(rng.choice(corpus.rows, queries, replace=False))
    noise = rng.standard_normal((queries, 128)).astype(np.float32)
    asked = np.concatenate([corpus.read(int(n), int(n) + 1) for n in own[:queries]]) + 0.1 * noise
    asked /= np.linalg.norm(asked, axis=1, keepdims=True)
    if name == "search":
        first = exact_search(asked, corpus, 100).rows[:, 0] == own
    else:
        first = exact_ranks(asked, corpus, own, np.arange(corpus.rows)) == 1
    return {"first_is_own": float(first.mean())}


class Rows:
    """An encoder that knows the vectors: a text is the number of a row."""

    name, digest = "rows", ""

    def __init__(self, uri: str) -> None:
        from rayemb.evaluate.exact import TableVectors

        self.vectors = TableVectors(uri)

    def texts(self, texts: Sequence[str], *, kind: str = "text") -> Any:
        """The vectors of rows that follow each other."""
        return self.vectors.read(int(texts[0]), int(texts[-1]) + 1)

    def images(self, images: Sequence[bytes]) -> Any:
        """Refuses them."""
        from rayemb.evaluate.errors import EvaluateError

        raise EvaluateError("there are vectors of rows alone, none of pictures", where=self.name)


def task(name: str, uri: str, queries: int) -> dict[str, float]:
    """The figures of a task of a suite, with its page's pictures; of random vectors they are those of chance."""
    from rayemb.evaluate.tasks.base import Means
    from rayemb.evaluate.tasks.classification import Classification, ClassificationConfig
    from rayemb.evaluate.tasks.clustering import Clustering, ClusteringConfig
    from rayemb.evaluate.tasks.labelled import Labelled, LabelledData

    encoder, data = Rows(uri), LabelledData(file="rows")

    def items(start: int, stop: int) -> Labelled:
        names = [str(n) for n in range(start, stop)]
        return Labelled("rows", "", "text", names, [str(n % CLASSES) for n in range(start, stop)], names)

    rows = encoder.vectors.rows
    if name == "clustering":
        clusters = ClusteringConfig(data=data, starts=1)
        found = Clustering(clusters, name, "", items(0, rows)).run(encoder, Means())
        return clusters.figures(found.items.columns)
    classes = ClassificationConfig(train=data, test=data, methods=(name,), strengths=(0.1, 1.0))
    known, asked = items(0, rows - queries), items(rows - queries, rows)
    found = Classification(classes, name, "", known, asked).run(encoder, Means())
    return classes.figures(found.items.columns)


def part(name: str, uri: str, queries: int) -> dict[str, Any]:
    """One part, in this process."""
    started = time.monotonic()
    found = (search if name in ("search", "ranks") else task)(name, uri, queries)
    seconds = time.monotonic() - started
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1e6
    return {"part": name, "peak_gb": round(peak, 2), "seconds": round(seconds, 1)} | found


def main() -> int:
    """Every part in a process of its own; exit code 1 if one is over the bound."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--part", nargs=2, metavar=("NAME", "TABLE"))
    args = parser.parse_args()
    if args.part:
        sys.stdout.write(json.dumps(part(args.part[0], args.part[1], args.queries)) + "\n")
        return 0
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        uri = table(folder, args.rows, 128)
        for name in PARTS:
            command = [sys.executable, __file__, "--queries", str(args.queries), "--part", name, uri]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            sys.stdout.write(done.stdout)
            worst = max(worst, json.loads(done.stdout)["peak_gb"])
    sys.stdout.write(f"{args.rows:,} x 128, {args.queries:,} queries: at most {worst} GB of {BOUND_GB:g}\n")
    return int(worst >= BOUND_GB)


if __name__ == "__main__":
    sys.exit(main())
