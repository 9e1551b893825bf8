"""LIMIT tasks and reports (S031): texts, recall against a naive loop, and MiniLM beside BM25 on real sentences."""

import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import bm25s
import numpy as np
import pytest
import pytrec_eval
from nltk.stem import PorterStemmer
from numpy.typing import NDArray

from rayemb.evaluate.diagnostics.limit import limit_recall, limit_report, limit_task
from rayemb.evaluate.diagnostics.limit_free import cyclic_embeddings, free_embeddings, limit_sets
from rayemb.evaluate.diagnostics.limit_words import FIRST, LAST, LIKES
from rayemb.evaluate.metrics import MetricError

Array = NDArray[np.float32]
Encode = Callable[[list[str]], Array]


def likes(document: str) -> list[str]:
    return re.split(", | and ", document.split(" likes ")[1].rstrip("."))


@pytest.mark.parametrize(
    ("n", "k", "queries", "distractors"), [(46, 2, 1000, 0), (7, 3, None, 5), (5, 5, None, 2), (1, 1, None, 0)]
)
def test_each_query_is_liked_by_exactly_its_k_people(n: int, k: int, queries: int | None, distractors: int) -> None:
    task = limit_task(n, k, queries=queries, distractors=distractors, seed=1)
    assert len(task.documents) == len(set(task.document_ids)) == n + distractors
    assert len(task.queries) == len(set(task.queries)) == min(queries or 10**9, math.comb(n, k))
    assert len({tuple(row) for row in task.relevant}) == len(task.queries)
    wanted = [question.removeprefix("Who likes ").rstrip("?") for question in task.queries]
    owned = [likes(document) for document in task.documents]
    for thing, row in zip(wanted, task.relevant, strict=True):
        assert [at for at, own in enumerate(owned) if thing in own] == row.tolist()
    assert len({len(own) for own in owned}) == 1  # length tells nothing
    assert all(len(set(own)) == len(own) for own in owned)
    assert all(text.startswith(f"{name} likes ") for name, text in zip(task.document_ids, task.documents, strict=True))
    qrels = task.qrels()
    assert qrels["query_0"] == {task.document_ids[at]: 1 for at in task.relevant[0]}


def test_defaults_have_the_shape_of_limit_small() -> None:
    task = limit_task()
    assert (len(task.documents), task.relevant.shape) == (46, (1000, 2))
    assert 40 <= len(likes(task.documents[0])) <= 50
    again, other = limit_task(), limit_task(seed=1)
    assert again.documents == task.documents
    assert other.documents != task.documents


def test_no_word_stands_for_another() -> None:
    stem = PorterStemmer().stem
    counts = Counter(stem(word) for word in (*LIKES, *{*FIRST, *LAST}))
    assert [word for word, count in counts.items() if count > 1] == []


def test_own_things_and_more_than_the_house_has() -> None:
    task = limit_task(4, 2, queries=None, things=[f"thing{i}" for i in range(20)])
    assert all("thing" in question for question in task.queries)
    large = limit_task(90, 2, queries=None)  # 4,005 queries, 1,585 words
    assert len(set(large.queries)) == 4005


def test_a_task_that_cannot_be_is_refused_by_name() -> None:
    with pytest.raises(MetricError, match="3 documents have no sets of 4"):
        limit_task(3, 4)
    with pytest.raises(
        MetricError, match=r"likes: 2 are too few: document \d+ \(\w+ \w+\) is asked for by \d+ queries"
    ):
        limit_task(6, 2, likes=2)
    with pytest.raises(MetricError, match="things: 'a' is there twice"):
        limit_task(3, 1, things=["a", "b", "a"])
    with pytest.raises(MetricError, match="things: 5 are needed, there are 3"):
        limit_task(3, 1, things=["a", "b", "c"])
    with pytest.raises(MetricError, match="queries"):
        limit_task(3, 1, queries=0)
    with pytest.raises(MetricError, match="distractors"):
        limit_task(3, 1, distractors=-1)
    with pytest.raises(MetricError, match="names for"):
        limit_task(3, 1, distractors=10_000_000)


def naive_ranks(scores: NDArray[np.float64], row: NDArray[np.int64]) -> list[int]:
    own = sorted((float(scores[at]) for at in row), reverse=True)
    others = [float(s) for at, s in enumerate(scores) if at not in row]
    return [1 + at + sum(s >= value for s in others) for at, value in enumerate(own)]


@pytest.mark.parametrize("levels", [2, 5, 10_000])
def test_recall_is_the_naive_one_with_ties_against_the_scorer(levels: int) -> None:
    rng = np.random.default_rng(levels)
    sets = limit_sets(12, 3, 40)
    scores = rng.integers(0, levels, size=(40, 12)).astype(np.float64)
    ranks = np.array([naive_ranks(s, row) for s, row in zip(scores, sets, strict=True)])
    found = limit_recall(scores, sets, cuts=(1, 3, 7, 12, 50))
    assert found == pytest.approx({cut: (ranks <= cut).mean() for cut in (1, 3, 7, 12)}, abs=1e-12)
    assert limit_recall(np.zeros((40, 12)), sets, cuts=(3, 9, 10, 12)) == pytest.approx({3: 0, 9: 0, 10: 1 / 3, 12: 1})


def test_recall_is_trec_evals_where_nothing_is_tied() -> None:
    task = limit_task(20, 2, queries=50)
    scores = np.random.default_rng(0).normal(size=(50, 20))
    run = {
        query: dict(zip(task.document_ids, map(float, row), strict=True))
        for query, row in zip(task.query_ids, scores, strict=True)
    }
    found = pytrec_eval.RelevanceEvaluator(task.qrels(), {"recall.2,10"}).evaluate(run)
    mine = limit_recall(scores, task.relevant, cuts=(2, 10))
    for cut in (2, 10):
        assert mine[cut] == pytest.approx(np.mean([row[f"recall_{cut}"] for row in found.values()]), abs=1e-9)


def test_the_report_is_the_same_in_blocks_and_knows_perfect_and_constant_models() -> None:
    sets = limit_sets(12, 2)
    queries, documents = cyclic_embeddings(12, 2, sets)
    fit = free_embeddings(sets, 12, 4, steps=200, seeds=1)
    whole = limit_report(queries, documents, sets, free=fit)
    assert whole == limit_report(queries, documents, sets, free=fit, block=7)
    assert whole.solved == whole.recall[2] == 1
    assert set(whole.recall) == {2, 10}  # 20 is more than there are
    assert whole.free_solved == pytest.approx(fit.solved)
    assert whole.distance == pytest.approx(fit.solved - 1)
    assert whole.reachable is True
    assert whole.chance == pytest.approx(1 / 66)
    assert whole.chance_recall[10] == pytest.approx(10 / 12)
    flat = limit_report(np.ones((66, 4)), np.ones((12, 4)), sets, free=fit)
    assert flat.solved == flat.recall[2] == 0
    assert flat.distance == flat.free_solved == pytest.approx(fit.solved)


def bm25(documents: list[str], queries: list[str]) -> Array:
    index = bm25s.BM25()
    index.index(bm25s.tokenize(documents, stopwords="en", show_progress=False), show_progress=False)
    tokens = bm25s.tokenize(queries, stopwords="en", show_progress=False, return_ids=False)
    return np.stack([index.get_scores(words) for words in tokens])


def test_minilm_is_far_from_its_dimension_and_bm25_is_not(minilm: Encode) -> None:
    fit = None
    for seed in range(3):
        task = limit_task(20, 2, queries=150, seed=seed)
        queries, documents = minilm(task.queries), minilm(task.documents)
        fit = free_embeddings(task.relevant, 20, 384, steps=200, seeds=1)
        report = limit_report(queries, documents, task.relevant, cuts=(2, 10), free=fit)
        lexical = limit_recall(bm25(task.documents, task.queries), task.relevant, cuts=(2, 10))
        assert report.free_solved == 1  # 384 dimensions are more than enough
        assert report.chance_recall[2] < report.recall[2] < lexical[2] - 0.2
        assert lexical[2] > 0.99
        assert report.distance > 0.5
        lengths = [np.linalg.norm(documents[:, :d], axis=1) for d in (32, 384)]
        short, full = (
            limit_recall(queries[:, :d] @ documents[:, :d].T / length, task.relevant, cuts=(10,))[10]
            for d, length in zip((32, 384), lengths, strict=True)
        )
        assert short < full + 0.02  # fewer dimensions are no better


def test_one_vector_a_word_does_what_one_vector_a_person_does_not(minilm_model: Any) -> None:
    task = limit_task(16, 2, queries=60, seed=4)
    one = minilm_model.encode(task.documents, normalize_embeddings=True) @ minilm_model.encode(task.queries).T
    tokens = {}
    for name, texts in (("queries", task.queries), ("documents", task.documents)):
        found = minilm_model.encode(texts, output_value="token_embeddings", show_progress_bar=False)
        tokens[name] = [x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True) for x in found]
    many = np.array([[(q @ d.T).max(axis=1).sum() for d in tokens["documents"]] for q in tokens["queries"]])
    single = limit_recall(one.T, task.relevant, cuts=(2,))[2]
    assert limit_recall(many, task.relevant, cuts=(2,))[2] > single + 0.2


def test_bad_vectors_and_relevance_are_named() -> None:
    sets = limit_sets(6, 2)
    queries, documents = cyclic_embeddings(6, 2, sets)
    with pytest.raises(MetricError, match="queries have 4 dimensions, documents 3"):
        limit_report(queries, documents[:, :3], sets)
    with pytest.raises(MetricError, match="query 14 wants document 5, there are 5"):
        limit_recall((queries @ documents.T)[[14] * 15][:, :5], np.where(np.arange(15)[:, None] == 14, [4, 5], [0, 1]))
    with pytest.raises(MetricError, match="query 3 names a document twice"):
        limit_report(queries, documents, np.where(np.arange(15)[:, None] == 3, [2, 2], [0, 1]))
    with pytest.raises(MetricError, match="15 queries have 14 rows"):
        limit_report(queries, documents, sets[:14])
    with pytest.raises(MetricError, match="cuts"):
        limit_recall(queries @ documents.T, sets, cuts=(0,))
    with pytest.raises(MetricError, match="block"):
        limit_report(queries, documents, sets, block=0)
    with pytest.raises(MetricError, match="free: was fitted to 3 queries"):
        limit_report(queries, documents, sets, free=free_embeddings(sets[:3], 6, 4, steps=1))
    broken = queries.copy()
    broken[4, 0] = np.nan
    with pytest.raises(MetricError, match="queries: row 4 holds NaN"):
        limit_report(broken, documents, sets)
