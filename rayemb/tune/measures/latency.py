"""How long a model takes for one query."""

import time
from typing import Literal

import numpy as np
import torch
from pydantic import Field

from rayemb.data import Corpus
from rayemb.tune.measures.base import Measure, Trained, first_rows


class Latency(Measure):
    """Milliseconds for one text query, alone, on one CPU thread: the median over real ones.

    Other trials run beside it and it is the machine's figure: compare only within a sweep, and models that differ in
    size.
    """

    name: Literal["latency"] = "latency"
    split: str = Field("val", description="where the queries are from")
    queries: int = Field(50, ge=1, description="how many are timed")

    @property
    def metrics(self) -> tuple[str, ...]:
        """See `Measure.metrics`."""
        return ("query_ms",)

    def measure(self, trained: Trained) -> dict[str, float]:
        """See `Measure.measure`."""
        corpus = Corpus.open(trained.corpus_uri)
        side = "query" if corpus.kind == "text_pair" else "text"
        texts = [text for text in first_rows(corpus, self.split, self.queries, [side])[side] if text]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            trained.model.embed_texts(texts[:1], kind="query")  # what only the first call pays for
            taken = []
            for text in texts:
                began = time.perf_counter()
                trained.model.embed_texts([text], kind="query")
                taken.append(time.perf_counter() - began)
        finally:
            torch.set_num_threads(threads)
        return {"query_ms": 1000 * float(np.median(taken))}
