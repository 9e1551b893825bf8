"""BM25 of one shard beside bm25s and tantivy: seconds to build, bytes, milliseconds a query.

    .venv/bin/python jobs/bench/lexical.py --rows 200000            # a minute; tantivy is measured if it is installed

Texts of ten words and queries of three, drawn from 20,000 by Zipf's law. tantivy takes no list of rows as a filter; it
is left out there. One thread. Prints a section of Markdown.
"""

import argparse
import importlib
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import bm25s
import numpy as np

from rayemb.index.lexical import LexicalShard, postings, terms_of, words

WORDS, LENGTH, ASKED, QUERIES, K = 20_000, 10, 3, 50, 10


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """What `work` gives, and its seconds."""
    begin = time.perf_counter()
    return work(), time.perf_counter() - begin


def line(name: str, seconds: float, size: int, plain: float, filtered: float | None) -> str:
    """A line of the table."""
    last = "" if filtered is None else f"{filtered / QUERIES * 1e3:.2f}"
    return f"| {name} | {seconds:.1f} | {size / 1e6:.1f} | {plain / QUERIES * 1e3:.2f} | {last} |"


def with_tantivy(texts: list[str], queries: list[str]) -> str | None:
    """tantivy's line, if it is there."""
    try:
        tantivy: Any = importlib.import_module("tantivy")
    except ImportError:
        return None
    with tempfile.TemporaryDirectory() as folder:
        schema = tantivy.SchemaBuilder()
        schema.add_text_field("text", stored=False)
        schema.add_unsigned_field("key", stored=True)
        index = tantivy.Index(schema.build(), path=folder)

        def build() -> None:
            writer = index.writer(200_000_000, 1)
            for key, text in enumerate(texts):
                writer.add_document(tantivy.Document(text=text, key=key))
            writer.commit()
            writer.wait_merging_threads()

        _, seconds = timed(build)
        size = sum(os.path.getsize(os.path.join(folder, file)) for file in os.listdir(folder))
        index.reload()
        searcher = index.searcher()
        _, plain = timed(lambda: [searcher.search(index.parse_query(each, ["text"]), K).hits for each in queries])
        return line("tantivy", seconds, size, plain, None)


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=200_000)
    rows = parser.parse_args().rows
    rng = np.random.default_rng(0)
    often = 1 / np.arange(1, WORDS + 1)
    often /= often.sum()
    vocabulary = np.array([f"w{i}" for i in range(WORDS)])
    texts = [" ".join(each) for each in vocabulary[rng.choice(WORDS, (rows, LENGTH), p=often)]]
    queries = [" ".join(vocabulary[rng.choice(WORDS, ASKED, p=often)]) for _ in range(QUERIES)]
    mask = rng.random(rows) < 0.1
    print(f"{rows:,} texts\n\n| | build s | MB | ms a query | ms, 10 % pass |\n|---|---|---|---|---|")

    def own() -> tuple[LexicalShard, int]:
        found = postings(texts)
        terms = terms_of([found])
        shard = LexicalShard(found, terms, rows=rows, all_rows=rows, length=rows * LENGTH)
        return shard, found.nbytes + terms.nbytes

    (shard, size), seconds = timed(own)
    _, plain = timed(lambda: [shard.search(each, K) for each in queries])
    _, filtered = timed(lambda: [shard.search(each, K, mask) for each in queries])
    print(line("rayemb", seconds, size, plain, filtered))

    def peer() -> Any:
        index = bm25s.BM25(k1=1.2, b=0.75)
        index.index([words(text) for text in texts], show_progress=False)
        return index

    index, seconds = timed(peer)
    size = sum(index.scores[name].nbytes for name in ("data", "indices", "indptr"))

    def ask(**options: Any) -> None:
        for each in queries:
            index.retrieve([words(each)], k=K, show_progress=False, **options)

    _, plain = timed(ask)
    _, filtered = timed(lambda: ask(weight_mask=mask.astype(np.float32)))
    print(line(f"bm25s {bm25s.__version__}", seconds, size, plain, filtered))
    print(with_tantivy(texts, queries) or "tantivy is not installed")


if __name__ == "__main__":
    main()
