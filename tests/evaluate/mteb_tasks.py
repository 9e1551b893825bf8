"""Small tasks of mteb in memory, and the same data as files for our own."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mteb
import numpy as np
from datasets import Dataset
from mteb.abstasks import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata

from rayemb.evaluate.tasks import RetrievalConfig

WORDS = "red green blue round square small large old new ship tree house river bird stone lamp road cloud field door"
QUIET = {"show_progress_bar": False}
KS = (1, 3, 5, 10, 20)


def run(model: Any, task: Any, split: str = "test") -> dict[str, Any]:
    found = mteb.evaluate(model, [task], cache=None, co2_tracker=False, show_progress_bar=False, encode_kwargs=QUIET)
    scores: dict[str, Any] = found.task_results[0].scores[split][0]
    return scores


def metadata(name: str, kind: str, main: str) -> TaskMetadata:
    return TaskMetadata(
        name=name,
        dataset={"path": "NA", "revision": "NA"},
        description="made here",
        reference=None,
        type=kind,
        category="t2t",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score=main,
        date=None,
        domains=None,
        task_subtypes=None,
        license=None,
        annotations_creators=None,
        dialect=None,
        sample_creation=None,
        bibtex_citation=None,
    )


def retrieval_task(
    corpus: list[dict[str, str]],
    queries: list[dict[str, str]],
    qrels: dict[str, dict[str, int]],
    ks: Sequence[int] = KS,
) -> AbsTaskRetrieval:
    class Here(AbsTaskRetrieval):
        metadata = metadata("HereRetrieval", "Retrieval", "ndcg_at_10")
        k_values = ks

        def load_data(self, *_: Any, **__: Any) -> None:
            parts = {"corpus": Dataset.from_list(corpus), "queries": Dataset.from_list(queries)}
            self.dataset = {"default": {"test": {**parts, "relevant_docs": qrels, "top_ranked": None}}}
            self.data_loaded = True

    return Here()


def pairs_task(base: type, name: str, kind: str, main: str, rows: list[dict[str, Any]]) -> Any:
    def load_data(self: Any, *_: Any, **__: Any) -> None:
        self.dataset, self.data_loaded = {"test": Dataset.from_list(rows)}, True

    return type(name, (base,), {"metadata": metadata(name, kind, main), "load_data": load_data})()


def jsonl(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


class Data:
    """Texts of few words with graded judgements that no model meets wholly; one query without any."""

    def __init__(self, documents: int = 60, queries: int = 25, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        words = WORDS.split()

        def text(length: int) -> str:
            return " ".join(rng.choice(words, length, replace=False))

        self.corpus = [
            {"id": f"d{n}", "title": text(2) if n % 3 else "", "text": text(int(rng.integers(3, 9)))}
            for n in range(documents)
        ]
        self.queries = [{"id": f"q{n}", "text": text(3)} for n in range(queries)]
        self.qrels: dict[str, dict[str, int]] = {}
        for query in self.queries[1:]:
            wanted = set(query["text"].split())
            shared = {row["id"]: len(wanted & set(f"{row['title']} {row['text']}".split())) for row in self.corpus}
            self.qrels[query["id"]] = {name: count - 1 for name, count in shared.items() if count}
            self.qrels[query["id"]][str(rng.choice(self.corpus)["id"])] = 2

    def task(self, ks: Sequence[int] = KS) -> AbsTaskRetrieval:
        return retrieval_task(self.corpus, self.queries, self.qrels, ks)

    def config(self, folder: Path, measures: Sequence[str]) -> RetrievalConfig:
        judged = [{"query": q, "document": d, "grade": g} for q, of in self.qrels.items() for d, g in of.items()]
        return RetrievalConfig(
            corpus=jsonl(folder / "corpus.jsonl", self.corpus),
            queries=jsonl(folder / "queries.jsonl", self.queries),
            qrels=jsonl(folder / "qrels.jsonl", judged),
            measures=tuple(measures),
            ties="trec",
        )
