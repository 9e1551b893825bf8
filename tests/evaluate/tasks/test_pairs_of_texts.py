"""STS, pair classification and reranking against sentence-transformers' evaluators; wrong files by line."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers.evaluation import (
    BinaryClassificationEvaluator,
    EmbeddingSimilarityEvaluator,
    RerankingEvaluator,
)

from rayemb.config import from_mapping
from rayemb.evaluate.encoders import ModelEncoder
from rayemb.evaluate.errors import EvaluateError
from rayemb.evaluate.tasks import Means, PairClassificationConfig, RerankingConfig, STSConfig
from tests.evaluate.tasks.conftest import DOCUMENTS, QUERIES, jsonl


def rows_of(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def test_sts_is_sentence_transformers(pairs: str, encoder: ModelEncoder, theirs: Any) -> None:
    rows = rows_of(pairs)
    a, b, scores = ([row[name] for row in rows] for name in ("sentence1", "sentence2", "score"))
    expected = EmbeddingSimilarityEvaluator(a, b, scores, write_csv=False)(theirs)
    task = from_mapping(STSConfig, {"data": pairs})
    found = task.load("sts").run(encoder, Means())
    figures = task.figures(found.items.columns)
    assert figures["spearman"] == pytest.approx(expected["spearman_cosine"], abs=1e-6)
    assert figures["pearson"] == pytest.approx(expected["pearson_cosine"], abs=1e-6)
    assert {"rankme", "alignment"} <= set(found.diagnostics)
    assert found.shown.space is not None
    assert len(found.shown.examples) == 6


def test_pair_classification_is_sentence_transformers(pairs: str, encoder: ModelEncoder, theirs: Any) -> None:
    rows = rows_of(pairs)
    a, b, labels = ([row[name] for row in rows] for name in ("sentence1", "sentence2", "label"))
    expected = BinaryClassificationEvaluator(a, b, labels, write_csv=False)(theirs)
    task = from_mapping(PairClassificationConfig, {"data": pairs})
    found = task.load("pairs").run(encoder, Means())
    figures = task.figures(found.items.columns)
    for name, other in (("average_precision", "ap"), ("accuracy", "accuracy"), ("f1", "f1")):
        assert figures[name] == pytest.approx(expected[f"cosine_{other}"], abs=1e-6), name
    assert found.shown.similarities is not None
    assert sum(found.shown.similarities.positives) == sum(labels)
    # The worst of those that are the same, then of those that are not.
    assert [example.hits[0].relevant for example in found.shown.examples] == [True] * 3 + [False] * 3


def candidates() -> list[dict[str, Any]]:
    return [
        {
            "query": text,
            "positive": [t for _, t, s in DOCUMENTS[n::7] if s == subject],
            "negative": [t for _, t, s in DOCUMENTS[n::5] if s != subject],
        }
        for n, (_, text, subject) in enumerate(QUERIES)
    ]


def test_reranking_is_sentence_transformers(tmp_path: Path, encoder: ModelEncoder, theirs: Any) -> None:
    expected = RerankingEvaluator(candidates(), at_k=10, write_csv=False)(theirs)
    task = from_mapping(RerankingConfig, {"data": jsonl(tmp_path / "r.jsonl", candidates())})
    found = task.load("rerank").run(encoder, Means())
    figures = task.figures(found.items.columns)
    for name, other in (("map", "map"), ("mrr@10", "mrr@10"), ("ndcg@10", "ndcg@10")):
        assert figures[name] == pytest.approx(expected[other], abs=1e-6), name
    best = found.shown.examples[-1].hits
    assert [hit.score for hit in best] == sorted((hit.score for hit in best), reverse=True)


class Constant:
    """All inputs are one to it."""

    name, digest = "constant", "c"

    def texts(self, texts: Any, *, kind: str = "text") -> Any:
        return np.tile(np.float32([1, 0]), (len(texts), 1))


def test_a_constant_encoder_earns_nothing(pairs: str, tmp_path: Path) -> None:
    task = from_mapping(STSConfig, {"data": pairs})
    figures = task.figures(task.load("t").run(Constant(), Means(map=None)).items.columns)  # type: ignore[arg-type]
    assert np.isnan(figures["spearman"])
    rerank = from_mapping(RerankingConfig, {"data": jsonl(tmp_path / "r.jsonl", candidates())})
    found = rerank.load("t").run(Constant(), Means(show=False))  # type: ignore[arg-type]
    assert rerank.figures(found.items.columns)["mrr@10"] < 0.2


@pytest.mark.parametrize(
    ("kind", "rows", "message"),
    [
        (STSConfig, [{"sentence1": "a", "sentence2": "b", "score": 1}, {"sentence1": "a", "sentence2": "", "score": 2}],
         r"line 2: sentence2 is empty"),
        (STSConfig, [{"sentence1": "a", "sentence2": "b", "score": 1}, {"sentence1": "a", "sentence2": "c"}],
         r"line 2: score None is no number"),
        (STSConfig, [{"sentence1": "a", "sentence2": "b", "score": float("inf")}], r"score is inf, not a finite"),
        (STSConfig, [{"sentence1": "a", "sentence2": "b", "score": 1}] * 3, r"all scores are 1"),
        (STSConfig, [{"sentence1": 3, "sentence2": "b", "score": 1}], r"line 1: sentence1 is no text but a int"),
        (PairClassificationConfig, [{"sentence1": "a", "sentence2": "b", "label": 2}], r"line 1: label 2 is neither 1"),
        (PairClassificationConfig, [{"sentence1": "a", "sentence2": "b", "label": 1}], r"all pairs have the label 1"),
        (RerankingConfig, [{"query": "a", "positive": ["x"], "negative": []}], r"line 1: there is no negative"),
        (RerankingConfig, [{"query": "a", "positive": ["x"], "negative": ["x"]}], r"candidate 'x' stands twice"),
        (RerankingConfig, [{"query": "a", "positive": "x", "negative": ["y"]}], r"positive is no list of texts"),
        (RerankingConfig, [{"query": "a", "positive": ["x", " "], "negative": ["y"]}], r"positive holds an empty text"),
    ],
)  # fmt: skip
def test_bad_rows_are_named(tmp_path: Path, kind: Any, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(EvaluateError, match=message):
        from_mapping(kind, {"data": jsonl(tmp_path / "x.jsonl", rows)}).load("task")


def test_columns_may_have_other_names(tmp_path: Path, pairs: str, encoder: ModelEncoder) -> None:
    rows = [{"anchor": r["sentence1"], "sentence2": r["sentence2"], "gold": r["score"]} for r in rows_of(pairs)]
    path = jsonl(tmp_path / "other.jsonl", rows)
    mapped = from_mapping(STSConfig, {"data": path, "columns": {"sentence1": "anchor", "score": "gold"}})
    plain = from_mapping(STSConfig, {"data": pairs})
    a, b = (t.figures(t.load("t").run(encoder, Means(show=False)).items.columns) for t in (mapped, plain))
    assert a == b
    with pytest.raises(EvaluateError, match=r"there is no column 'sentence1'.*columns there: anchor, sentence2, gold"):
        from_mapping(STSConfig, {"data": path}).load("t")
