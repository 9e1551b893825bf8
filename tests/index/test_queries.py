"""Kinds of queries over a real index of three shards, against naive Python over all rows."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import bm25s
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rayemb.index import Effort, FilterError, Fusion, Hits, Index, Query, QueryError, Rerank
from rayemb.index.config import IndexConfig
from rayemb.index.lexical import words
from rayemb.index.queries import diversify, fuse

from .conftest import Built
from .tables import build_here, random_vectors, write_table

ROWS, DIM = 300, 16
X = random_vectors(ROWS, DIM)
RNG = np.random.default_rng(3)
TEXTS = [" ".join(RNG.choice(["red", "blue", "Heart", "star", "ÉTÉ", "of", "a"], RNG.integers(0, 7)))
         for _ in range(ROWS)]  # fmt: skip
PAYLOAD: dict[str, list[Any]] = {
    "text": TEXTS,
    # One group holds half of all rows and is near to nothing else; some rows are of no group.
    "group": [None if i % 10 == 9 else "big" if i % 2 else f"g{i % 14}" for i in range(ROWS)],
    "number": [i % 5 for i in range(ROWS)],
    "real": [i / 7 for i in range(ROWS)],
}


@pytest.fixture(scope="module", params=["rows", "hash", "cell"])
def index(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Index:
    folder = tmp_path_factory.mktemp("queries")
    # All eight lists are probed: exact.
    config = IndexConfig(factory="IVF8,Flat", nprobe=8, shards=3, by=request.param, words="text")
    build_here(write_table(folder / "e", X, PAYLOAD), folder / "index", config)
    return Index.open(str(folder / "index"))


def _order(scores: NDArray[np.floating[Any]]) -> list[int]:
    return [int(key) for key in np.argsort(-scores, kind="stable")]


def _keys(hits: Hits) -> list[int]:
    assert hits.keys.shape == hits.scores.shape
    return hits.keys[0].tolist()


def _id(key: int) -> str:
    return f"item-{key}"


def test_only_what_reaches_the_score_is_found(index: Index) -> None:
    scores = X @ X[0]
    expected = [key for key in _order(scores) if scores[key] >= 0.3]
    assert _keys(index.query(X[0], Query(ROWS, min_score=0.3))) == expected
    assert 3 < len(expected) < ROWS
    assert _keys(index.query(X[0], Query(3, min_score=0.3))) == expected[:3]
    assert _keys(index.query(X[0], Query(3, min_score=1.5))) == []


def test_an_item_finds_its_neighbours_and_not_itself(index: Index) -> None:
    expected = [key for key in _order(X @ X[120]) if key != 120][:7]
    assert _keys(index.query(None, Query(7, positive=(_id(120),)))) == expected


def test_examples_are_the_mean_of_the_good_minus_the_mean_of_the_bad(index: Index) -> None:
    target = (X[3] + X[200]) / 2 - (X[50] + X[51] + X[299]) / 3
    expected = [key for key in _order(X @ target) if key not in (3, 200, 50, 51, 299)][:9]
    query = Query(9, positive=(_id(3), _id(200)), negative=(_id(50), _id(51), _id(299)))
    hits = index.query(None, query)
    assert _keys(hits) == expected
    assert np.allclose(hits.scores[0], (X @ target)[expected] / np.linalg.norm(target), atol=1e-6)
    # A vector of its own is one of the good.
    both = (X[7] + X[3]) / 2
    expected = [key for key in _order(X @ both) if key != 3][:5]
    assert _keys(index.query(X[7], Query(5, positive=(_id(3),)))) == expected


@pytest.mark.parametrize(
    ("query", "where", "message"),
    [
        (Query(3, positive=("item-1", "nobody")), "positive[1]", "no item 'nobody'"),
        (Query(3, negative=("item-1",)), "positive", "nothing says what is wanted"),
        (Query(3), "positive", "nothing says what is wanted"),
        (Query(3, positive=("item-1",), negative=("item-1",)), "negative", "cancel each other out"),
        (Query(3, positive=("item-1",), group_by="real"), "group_by", "no plain values"),
    ],
)
def test_examples_that_say_nothing_are_an_error(index: Index, query: Query, where: str, message: str) -> None:
    with pytest.raises(QueryError, match=message) as caught:
        index.query(None, query)
    assert caught.value.where == where


def test_a_group_by_an_unknown_column_is_named(index: Index) -> None:
    with pytest.raises(QueryError, match="no such field") as caught:
        index.query(X[0], Query(3, {"number": 1}, group_by="nosuch"))
    assert caught.value.where == "group_by"
    with pytest.raises(FilterError) as caught:
        index.query(X[0], Query(3, {"and": [{"number": "1"}]}, group_by="group"))
    assert caught.value.where == "filter.and[0].number"


@pytest.mark.parametrize(
    "options",
    [
        {"diversity": 0.5, "group_by": "group"},
        {"diversity": 0.0, "fusion": Fusion("a")},
        {"min_score": 0.1, "fusion": Fusion("a")},
    ],
)
def test_kinds_that_do_not_go_together_are_an_error(options: dict[str, Any]) -> None:
    with pytest.raises(QueryError):
        Query(3, **options)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 30), st.integers(1, 12), st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.integers(0, 10**6))
def test_diversity_is_the_greedy_choice(candidates: int, k: int, diversity: float, seed: int) -> None:
    vectors = random_vectors(candidates, 4, seed)
    relevance = np.random.default_rng(seed).random(candidates).astype(np.float32)
    chosen: list[int] = []
    while len(chosen) < min(k, candidates):
        values = {
            i: (1 - diversity) * relevance[i] - diversity * max((vectors[i] @ vectors[j] for j in chosen), default=0)
            for i in range(candidates) if i not in chosen
        }  # fmt: skip
        chosen.append(max(values, key=lambda i: (values[i], -i)))
    found = diversify(relevance, vectors, k, diversity)
    assert len(found) == len(set(found)) == len(chosen)
    for i, (mine, wanted) in enumerate(zip(found, chosen, strict=True)):
        if mine != wanted:  # equal to float32's last bit
            scores = [(1 - diversity) * relevance[each] - diversity
                      * max((vectors[each] @ vectors[j] for j in chosen[:i]), default=0)
                      for each in (mine, wanted)]  # fmt: skip
            assert abs(scores[0] - scores[1]) < 1e-6
            break


def test_no_diversity_is_the_plain_order_and_more_is_less_alike(index: Index) -> None:
    def alike(keys: list[int]) -> float:
        return float((X[keys] @ X[keys].T)[np.triu_indices(len(keys), 1)].mean())

    plain = _order(X @ X[0])[:10]
    assert _keys(index.query(X[0], Query(10, diversity=0.0))) == plain
    likeness = [alike(_keys(index.query(X[0], Query(10, diversity=each)))) for each in (0.0, 0.5, 0.9)]
    assert likeness[0] > likeness[1] > likeness[2]


@pytest.mark.parametrize("column", ["group", "number"])
@pytest.mark.parametrize(("k", "size"), [(1, 1), (3, 2), (8, 4), (50, 50)])
@pytest.mark.parametrize("filter", [None, {"real": {"lt": 20}}])
def test_groups_hold_their_best_rows_in_the_order_of_the_first(
    index: Index, column: str, k: int, size: int, filter: dict[str, Any] | None
) -> None:
    scores = X @ X[0]
    groups: dict[Any, list[int]] = {}
    for key in _order(scores):
        if PAYLOAD[column][key] is not None and (filter is None or PAYLOAD["real"][key] < 20):
            groups.setdefault(PAYLOAD[column][key], []).append(key)
    expected = [key for group in list(groups.values())[:k] for key in group[:size]]
    assert _keys(index.query(X[0], Query(k, filter, group_by=column, group_size=size))) == expected


# -- words -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["red heart", "été", "heart HEART star", "of a red", "nothing known", ""])
@pytest.mark.parametrize("filter", [None, {"number": {"in": [1, 2]}}, {"real": {"gt": 40}}])
def test_words_score_as_bm25s_scores_the_whole_corpus(index: Index, text: str, filter: dict[str, Any] | None) -> None:
    oracle = bm25s.BM25(k1=1.2, b=0.75, method="lucene")
    oracle.index([words(each) for each in TEXTS], show_progress=False)
    known = [word for word in words(text) if word in oracle.vocab_dict]
    scores = oracle.get_scores(known) if known else np.zeros(ROWS)
    keep = np.array([filter is None or (PAYLOAD["number"][i] in (1, 2) if "number" in filter else i / 7 > 40)
                     for i in range(ROWS)])  # fmt: skip
    hits = index.words(text, 500, filter)
    found = hits.keys[0] >= 0
    assert sorted(hits.keys[0][found].tolist()) == np.flatnonzero((scores > 0) & keep).tolist()
    assert np.allclose(hits.scores[0][found], scores[hits.keys[0][found]], rtol=1e-5)
    assert (np.diff(hits.scores[0][found]) <= 0).all()


def test_words_are_cut_at_what_is_no_letter_and_folded() -> None:
    assert words("Straße_nord, l'été: 3×A-b\n中文") == ["strasse", "nord", "l", "été", "3", "a", "b", "中文"]


def test_reciprocal_ranks_and_convex_weights_are_added() -> None:
    dense = Hits(np.array([[0.9, 0.5, 0.1, -np.inf]], np.float32), np.array([[4, 7, 2, -1]]))
    lexical = Hits(np.array([[6.0, 2.0, 2.0]], np.float32), np.array([[2, 9, 4]]))
    hits = fuse(dense, lexical, Fusion("x"))
    expected = {4: 1 / 61 + 1 / 63, 2: 1 / 63 + 1 / 61, 7: 1 / 62, 9: 1 / 62}
    assert _keys(hits) == [2, 4, 7, 9]
    assert np.allclose(hits.scores[0], [expected[key] for key in _keys(hits)])
    hits = fuse(dense, lexical, Fusion("x", "convex", 0.25))
    assert _keys(hits) == [4, 7, 2, 9]
    assert np.allclose(hits.scores[0], [0.75, 0.375, 0.25, 0.0])


def test_a_word_lifts_a_row_that_its_vector_does_not(index: Index) -> None:
    wanted = next(i for i in range(ROWS) if words(TEXTS[i]) == ["été"] and i in _order(X @ X[0])[60:])
    hits = index.query(X[0], Query(10, fusion=Fusion("été", "convex", 0.9)))
    assert wanted in _keys(hits)
    assert wanted not in _keys(index.query(X[0], Query(10)))


class Longest:
    """The longer document wins."""

    def scores(self, queries: Sequence[str], documents: Sequence[str]) -> NDArray[np.float32]:
        assert set(queries) == {"anything"}
        return np.array([len(text) for text in documents], np.float32)


def test_a_re_ranking_orders_the_candidates_by_its_own_scores(index: Index) -> None:
    candidates = _order(X @ X[0])[:20]
    expected = sorted(candidates, key=lambda key: (-len(TEXTS[key]), key))[:5]
    hits = index.query(X[0], Query(5, rerank=Rerank("anything", "text", 20, Longest())))
    assert _keys(hits) == expected
    assert hits.scores[0].tolist() == [len(TEXTS[key]) for key in expected]


def test_vectors_come_by_key(index: Index) -> None:
    keys = [299, 0, 100, 149, 150, 0]
    assert (index.vectors(keys) == X[keys]).all()
    with pytest.raises(QueryError, match="no row 300"):
        index.vectors([300])


def test_an_index_without_words_says_so(flat: Built) -> None:
    with Index.open(flat.uri) as index, pytest.raises(QueryError, match="no words"):
        index.words("g5", 10)


@pytest.mark.parametrize(
    "kind",
    [
        {},
        {"positive": (_id(3),)},
        {"diversity": 0.3},
        {"group_by": "number", "group_size": 9},
        {"fusion": Fusion("red")},
    ],
)
def test_the_effort_of_a_query_reaches_its_searches(kind: dict[str, Any], tmp_path: Path) -> None:
    table = write_table(tmp_path / "e", X, PAYLOAD)
    for nprobe in (1, 32):
        config = IndexConfig(factory="IVF32,Flat", nprobe=nprobe, shards=2, words="text")
        build_here(table, tmp_path / str(nprobe), config)
    with Index.open(str(tmp_path / "1")) as narrow, Index.open(str(tmp_path / "32")) as wide:
        expected = _keys(wide.query(X[9], Query(20, **kind)))
        assert _keys(narrow.query(X[9], Query(20, **kind))) != expected
        assert _keys(narrow.query(X[9], Query(20, effort=Effort(nprobe=32), **kind))) == expected


def test_a_recall_needs_a_measured_one_and_no_effort_beside(index: Index) -> None:
    with pytest.raises(QueryError, match="not both"):
        Query(3, effort=Effort(), recall=0.9)
    with pytest.raises(QueryError, match="not measured"):
        index.query(X[9], Query(3, recall=0.9))
