"""Ranked lists against pytrec_eval, mteb's and sentence-transformers' own evaluators, and hand-counted cases."""

import math
from typing import Any

import numpy as np
import pytest
import pytrec_eval
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mteb._evaluators.retrieval_metrics import calculate_retrieval_scores, hole, recall_cap
from mteb._evaluators.retrieval_metrics import mrr as mteb_mrr
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator
from sklearn.metrics import ndcg_score

from rayemb.evaluate.metrics import (
    IR_MEASURES,
    Judged,
    Judgements,
    MetricError,
    judge_lists,
    judge_run,
    judgements,
    mean_over,
)

Run = dict[str, dict[str, float]]
Qrels = dict[str, dict[str, int]]
KS = (1, 3, 5, 10, 100)


def random_case(seed: int, *, levels: int, queries: int = 25, documents: int = 40) -> tuple[Run, Qrels]:
    """Graded judgements from -2 to 3, some lists empty or missing, scores of few `levels` (many ties)."""
    rng = np.random.default_rng(seed)
    names = [f"d{i}" for i in range(documents)]
    run: Run = {}
    qrels: Qrels = {}
    for q in range(queries):
        judged = rng.choice(documents, rng.integers(1, 15), replace=False)
        qrels[f"q{q}"] = {names[d]: int(rng.integers(-2, 4)) for d in judged}
        found = rng.choice(documents, rng.integers(0, documents + 1), replace=False)
        if q % 7:  # the others have no list at all
            run[f"q{q}"] = {names[d]: float(rng.integers(0, levels) / levels) for d in found}
    return run, qrels


def by_trec(run: Run, qrels: Qrels, level: int = 1) -> dict[str, dict[str, float]]:
    cuts = ",".join(map(str, KS))
    wanted = {"map", "ndcg", "recip_rank", "Rprec"}
    wanted |= {f"{name}.{cuts}" for name in ("ndcg_cut", "recall", "P", "success", "map_cut")}
    # Grades below 0 write beyond an array in pytrec_eval 0.5 (the process dies); 0 is what they mean there.
    safe = {query: {document: max(grade, 0) for document, grade in judged.items()} for query, judged in qrels.items()}
    theirs: dict[str, dict[str, float]] = pytrec_eval.RelevanceEvaluator(safe, wanted, relevance_level=level).evaluate(
        run
    )
    return theirs


def trec_names() -> dict[str, str]:
    names = {"map": "map", "ndcg": "ndcg", "mrr": "recip_rank", "r_precision": "Rprec"}
    for ours, theirs in {
        "ndcg": "ndcg_cut",
        "recall": "recall",
        "precision": "P",
        "success": "success",
        "map": "map_cut",
    }.items():
        names |= {f"{ours}@{k}": f"{theirs}_{k}" for k in KS}
    return names


def assert_equals_trec(run: Run, qrels: Qrels, level: int = 1) -> None:
    judged = judge_run(run, qrels, ties="trec", level=level)
    theirs = by_trec(run, qrels, level)
    for ours, name in trec_names().items():
        values = judged.measure(ours)
        for q, query in enumerate(qrels):
            has = any(grade >= (1 if "ndcg" in ours else level) for grade in qrels[query].values())
            if not has:
                assert math.isnan(values[q])
            elif run.get(query):  # pytrec_eval is silent on queries without a list
                assert values[q] == pytest.approx(theirs[query][name], abs=1e-12), (ours, query)
            else:
                assert values[q] == 0


@pytest.mark.parametrize("levels", [1, 2, 5, 10**6])
@pytest.mark.parametrize("seed", range(4))
def test_every_measure_equals_trec_eval(seed: int, levels: int) -> None:
    assert_equals_trec(*random_case(seed, levels=levels))


@pytest.mark.parametrize("level", [2, 3])
def test_a_higher_level_of_relevance_equals_trec_eval(level: int) -> None:
    assert_equals_trec(*random_case(9, levels=4), level=level)


def test_ids_of_all_scripts_and_lengths_tie_as_bytes_in_trec_eval() -> None:
    names = ["1", "10", "2", "09", "a", "A", "é", "漢", "😀", "", "aa", "ア", "z z"]
    run = {"q": dict.fromkeys(names, 0.5)}
    for name in names:
        assert_equals_trec(run, {"q": {name: 1}})


def test_scores_are_float32_in_trec_eval_so_that_a_tiny_gap_is_a_tie() -> None:
    qrels = {"q": {"a": 1}}
    near, far = {"q": {"a": 0.5 + 1e-9, "b": 0.5}}, {"q": {"a": 0.5 + 1e-6, "b": 0.5}}
    assert_equals_trec(near, qrels)
    assert_equals_trec(far, qrels)
    assert judge_run(near, qrels, ties="trec").reciprocal_rank().tolist() == [0.5]
    assert judge_run(far, qrels, ties="trec").reciprocal_rank().tolist() == [1.0]


@settings(max_examples=80, deadline=None)
@given(
    lists=st.lists(
        st.dictionaries(st.text("abé😀", min_size=1, max_size=2), st.sampled_from([-1.0, 0.0, 0.5, 1e30]), max_size=8),
        min_size=1,
        max_size=4,
    ),
    grades=st.lists(
        st.dictionaries(st.text("abé😀", min_size=1, max_size=2), st.integers(-3, 4), min_size=1, max_size=8),
        min_size=4,
        max_size=4,
    ),
)
def test_whatever_the_lists_trec_eval_agrees(lists: list[dict[str, float]], grades: list[dict[str, int]]) -> None:
    run = {f"q{i}": found for i, found in enumerate(lists)}
    assert_equals_trec(run, {f"q{i}": judged for i, judged in enumerate(grades)})


@pytest.mark.parametrize("seed", range(3))
def test_equals_mteb(seed: int) -> None:
    """Means over queries with a positive, capped recall, MRR and holes, as mteb's own functions have them."""
    run, qrels = random_case(seed, levels=3)
    run = {q: run.get(q) or {"none": -1.0} for q in qrels if any(g > 0 for g in qrels[q].values())}
    # mteb drops the others when it loads a task. Grades below 0: see by_trec.
    qrels = {q: {d: max(g, 0) for d, g in qrels[q].items()} for q in run}
    judged = judge_run(run, qrels, ties="trec")
    theirs = calculate_retrieval_scores(run, qrels, list(KS))
    capped, holes, mrr = recall_cap(qrels, run, list(KS)), hole(qrels, run, list(KS)), mteb_mrr(qrels, run, list(KS))
    for k in KS:
        for ours, table, name in (
            ("ndcg", theirs.ndcg, f"NDCG@{k}"),
            ("map", theirs.map, f"MAP@{k}"),
            ("recall", theirs.recall, f"Recall@{k}"),
            ("precision", theirs.precision, f"P@{k}"),
            ("success", theirs.hit_rate, f"HitRate@{k}"),
        ):
            # mteb rounds its means to five places.
            assert mean_over(judged.measure(f"{ours}@{k}")).value == pytest.approx(table[name], abs=6e-6)
        np.testing.assert_allclose(judged.capped_recall(k), capped[f"R_cap_at_{k}"], atol=1e-12)
        np.testing.assert_allclose(judged.reciprocal_rank(k), mrr[f"MRR@{k}"], atol=1e-12)
        np.testing.assert_allclose(judged.hole(k, anywhere=True), holes[f"Hole_at_{k}"], atol=1e-12)


class Lookup:
    """As much of a SentenceTransformer as the evaluator needs: texts are row numbers of a table."""

    similarity_fn_name = "dot"
    model_card_data = None

    def __init__(self, table: np.ndarray) -> None:
        self.table = table

    def similarity(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a @ b.T


@pytest.mark.parametrize("levels", [2, 10**6])
def test_equals_sentence_transformers(levels: int) -> None:
    run, qrels = random_case(5, levels=levels)
    documents = [f"d{i}" for i in range(40)]
    rng = np.random.default_rng(1)
    relevant = {q: {d for d, g in judged.items() if g > 0} for q, judged in qrels.items()}
    relevant = {q: found for q, found in relevant.items() if found}
    queries = list(relevant)
    full = {q: dict(zip(documents, rng.integers(0, levels, 40) / levels, strict=True)) for q in queries}
    s_QM = torch.tensor([list(found.values()) for found in full.values()], dtype=torch.float64)
    evaluator = InformationRetrievalEvaluator(
        queries={q: str(i) for i, q in enumerate(queries)},
        corpus={d: str(i) for i, d in enumerate(documents)},
        relevant_docs=relevant,
        mrr_at_k=[10, 100],
        ndcg_at_k=[10, 100],
        accuracy_at_k=[1, 10],
        precision_recall_at_k=[1, 10, 100],
        map_at_k=[10, 100],
        score_functions={"table": lambda a, b: s_QM[a[:, 0].long()][:, b[:, 0].long()]},
        write_csv=False,
    )

    class Model(Lookup):
        def encode_query(self, texts: list[str], **_: Any) -> torch.Tensor:
            return torch.tensor([[float(t)] for t in texts])

        encode_document = encode = encode_query

    theirs = evaluator.compute_all_metrics(Model(np.empty(0)))["table"]
    judged = judge_run(full, {q: qrels[q] for q in queries}, ties="sbert")
    ours = {
        "recall@k": lambda k: judged.recall(k),
        "precision@k": lambda k: judged.precision(k),
        "accuracy@k": lambda k: judged.success(k),
        "mrr@k": lambda k: judged.reciprocal_rank(k),
        "ndcg@k": lambda k: judged.ndcg(k, binary=True),
        "map@k": lambda k: judged.average_precision(k, capped=True),
    }
    for name, values in ours.items():
        for k, value in theirs[name].items():
            assert mean_over(values(k)).value == pytest.approx(value, abs=1e-12), (name, k)
    assert run  # the generator is shared; its lists are not used here


def naive_worst(found: dict[str, float], judged: dict[str, int]) -> list[int]:
    """Grades in the worst order that the scores allow."""
    return [judged.get(d, 0) for d in sorted(found, key=lambda d: (-found[d], judged.get(d, 0)))]


@pytest.mark.parametrize("levels", [1, 2, 7])
def test_ties_count_against_the_model(levels: int) -> None:
    run, qrels = random_case(3, levels=levels)
    judged = judge_run(run, qrels)
    for q, query in enumerate(qrels):
        grades = naive_worst(run.get(query, {}), qrels[query])
        total = sum(g > 0 for g in qrels[query].values())
        for k in KS if total else ():
            hits = [g > 0 for g in grades[:k]]
            ideal = sorted((g for g in qrels[query].values() if g > 0), reverse=True)[:k]
            dcg, best = (sum(max(g, 0) / math.log2(i + 2) for i, g in enumerate(x)) for x in (grades[:k], ideal))
            assert judged.recall(k)[q] == pytest.approx(sum(hits) / total, abs=1e-12)
            assert judged.ndcg(k)[q] == pytest.approx(dcg / best, abs=1e-12)
            ap = sum(sum(hits[: i + 1]) / (i + 1) for i, hit in enumerate(hits) if hit) / total
            assert judged.average_precision(k)[q] == pytest.approx(ap, abs=1e-12)


@pytest.mark.parametrize("ties", ["trec", "sbert"])
def test_no_order_of_ties_is_worse_than_the_worst(ties: Any) -> None:
    run, qrels = random_case(11, levels=3)
    worst, other = judge_run(run, qrels), judge_run(run, qrels, ties=ties)
    for name in ("ndcg@5", "map", "mrr", "recall@5", "r_precision", "success@1"):
        there = ~np.isnan(worst.measure(name))
        assert (worst.measure(name)[there] <= other.measure(name)[there] + 1e-12).all()
    assert (worst.ndcg(5) != other.ndcg(5)).any()


@pytest.mark.parametrize("noise", [0.0, 1e-8])
def test_a_constant_encoder_earns_nothing_from_rounding(noise: float) -> None:
    rng = np.random.default_rng(0)
    ids = np.argsort(rng.random((50, 200)), axis=1)
    scores = 0.7 + rng.normal(scale=noise, size=ids.shape)
    table = Judgements.of(np.arange(50), rng.integers(0, 200, 50), np.ones(50, int), 50)
    assert judge_lists(ids, scores, table, complete=True).reciprocal_rank().tolist() == [1 / 200] * 50
    assert judge_lists(ids, scores, table, complete=True, tolerance=0).recall(10).max() == (1.0 if noise else 0.0)


def test_arrays_and_dictionaries_are_the_same() -> None:
    rng = np.random.default_rng(2)
    ids = np.argsort(rng.random((30, 500)), axis=1)[:, :50]
    ids[rng.random(ids.shape) < 0.2] = -1
    scores = np.where(ids < 0, np.nan, rng.integers(0, 30, ids.shape) / 30).astype(np.float32)
    qrels = {q: {int(d): int(g) for d, g in zip(ids[q, :9], range(-3, 6), strict=True) if d >= 0} for q in range(30)}
    run = {q: {int(d): float(s) for d, s in zip(ids[q], scores[q], strict=True) if d >= 0} for q in range(30)}
    table = judgements(qrels, 30, 500)
    for ties in ("worst", "trec", "sbert"):
        a = judge_lists(ids, scores, table, ties=ties, complete=True)  # type: ignore[arg-type]
        b = judge_run(run, qrels, queries=range(30), documents=range(500), ties=ties)  # type: ignore[arg-type]
        for name in ("ndcg@10", "map", "mrr@5", "recall@20", "r_precision", "precision@50", "hole@10"):
            np.testing.assert_allclose(a.measure(name), b.measure(name), rtol=1e-12)  # summed in rows of other lengths


def test_the_given_order_needs_no_scores() -> None:
    table = judgements({0: {5: 1}}, 1, 10)
    lists = np.array([[3, -1, 5, 7]])
    assert judge_lists(lists, None, table, ties="given").reciprocal_rank().tolist() == [0.5]
    with pytest.raises(MetricError, match=r"'worst' needs scores.*ties='given'"):
        judge_lists(lists, None, table)


def test_blocks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    run, qrels = random_case(4, levels=3, queries=60)
    whole = judge_run(run, qrels, ties="trec")
    monkeypatch.setattr("rayemb.evaluate.metrics.lists.ENTRIES", 1)
    monkeypatch.setattr("rayemb.evaluate.metrics.lists.blocks.__defaults__", (90,))
    cut = judge_run(run, qrels, ties="trec")
    np.testing.assert_array_equal(whole.grades, cut.grades)
    np.testing.assert_array_equal(whole.seen, cut.seen)


def test_queries_without_a_positive_are_left_out_and_counted() -> None:
    qrels = {"a": {"x": 1}, "none": {"x": 0, "y": -1}, "missing": {"y": 2}}
    judged = judge_run({"a": {"x": 1.0}, "none": {"x": 1.0}, "unjudged": {"x": 1.0}}, qrels)
    assert judged.queries == ["a", "none", "missing", "unjudged"]
    values = judged.recall(1)
    assert values.tolist()[0::2] == [1.0, 0.0]
    assert np.isnan(values[1::2]).all()
    assert mean_over(values) == (0.5, 2, 2)
    assert judged.hole(1).tolist() == [0, 0, 0, 1]
    assert judged.hole(1, anywhere=True).tolist() == [0, 0, 0, 0]


def test_no_figure_at_all_is_an_error() -> None:
    judged = judge_run({"a": {"x": 1.0}}, {"a": {"x": 0}})
    with pytest.raises(MetricError, match="none of 1 queries has a figure"):
        mean_over(judged.ndcg(10))
    assert judge_run({}, {"a": {"x": 1}}).measure("mrr").tolist() == [0.0]
    assert judge_run({}, {"a": {"x": 1}}).measure("ndcg").tolist() == [0.0]


def test_the_query_itself_is_taken_out_before_the_cut() -> None:
    qrels = {"x": {"a": 1}, "q": {"b": 1}}
    run = {"x": {"x": 9.0, "a": 8.0, "b": 7.0}, "q": {"b": 3.0}}
    assert judge_run(run, qrels).recall(1).tolist() == [0.0, 1.0]
    assert judge_run(run, qrels, ignore_identical_ids=True).recall(1).tolist() == [1.0, 1.0]
    qrels["x"]["x"] = 1  # a judgement of itself is one that nothing could answer
    assert judge_run(run, qrels, ignore_identical_ids=True).recall(1).tolist() == [1.0, 1.0]


def test_an_excluded_row_leaves_one_place_less() -> None:
    ids, scores = np.array([[0, 1, 2], [1, 0, 2]]), np.array([[3.0, 2, 1], [3, 2, 1]])
    table = judgements({0: {1: 1}, 1: {0: 1}}, 2, 4)
    judged = judge_lists(ids, scores, table, exclude=np.array([0, -1]))
    assert judged.recall(2).tolist() == [1.0, 1.0]
    with pytest.raises(MetricError, match=r"the list of query 0 was cut at 2, 3 are needed.*one more where"):
        judged.recall(3)


def test_a_cut_list_has_no_figure_beyond_its_cut() -> None:
    ids, scores = np.array([[0, 1], [2, -1]]), np.array([[2.0, 1], [1, 0]])
    table = judgements({0: {0: 1, 1: 1, 3: 1}, 1: {2: 1}}, 2, 9)
    judged = judge_lists(ids, scores, table, queries=["first", "second"])
    for measure in ("recall@3", "precision@3", "ndcg@3", "map@3", "mrr@3", "success@3", "hole@3", "r_precision"):
        with pytest.raises(MetricError, match="'first' was cut at 2, 3 are needed"):
            judged.measure(measure)
    whole = judge_lists(ids, scores, table, complete=True)
    assert whole.recall(3).tolist() == pytest.approx([2 / 3, 1])
    assert whole.precision(10).tolist() == pytest.approx([0.2, 0.1])  # k > n: by k all the same
    assert whole.r_precision().tolist() == pytest.approx([2 / 3, 1])


def test_reranking_is_the_same_with_the_candidates_as_the_list() -> None:
    """nDCG as scikit-learn has it, where there are no ties; grades that no candidate has count in the ideal."""
    rng = np.random.default_rng(6)
    grades, scores = rng.integers(0, 4, (20, 12)), rng.random((20, 12))
    qrels = {q: dict(enumerate(map(int, row))) for q, row in enumerate(grades)}
    judged = judge_run({q: dict(enumerate(row)) for q, row in enumerate(scores)}, qrels)
    np.testing.assert_allclose(
        judged.ndcg(5), [ndcg_score([g], [s], k=5) for g, s in zip(grades, scores, strict=True)], atol=1e-12
    )


def bad(run: Any = None, qrels: Any = None, **more: Any) -> Judged:
    return judge_run(run or {"q1": {"d1": 1.0}}, qrels or {"q1": {"d1": 1}}, **more)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("ties", ["worst", "trec", "sbert", "given"])
def test_a_score_that_is_not_finite_names_query_and_document(value: float, ties: Any) -> None:
    with pytest.raises(MetricError, match=r"query 'q2' gives document 'd7' the score (nan|-?inf) \(1 of 2 lists"):
        bad({"q1": {"d1": 1.0}, "q2": {"d1": 2.0, "d7": value}}, ties=ties)


def test_unknown_ids_are_named() -> None:
    with pytest.raises(MetricError, match="the judged query 'q9' is not among the queries"):
        bad(qrels={"q9": {"d1": 1}}, queries=["q1"])
    with pytest.raises(MetricError, match="query 'q1' judges document 'gone', which is not"):
        bad(qrels={"q1": {"gone": 1}}, documents=["d1"])
    with pytest.raises(MetricError, match="query 'q1' finds document 'd1', which is not"):
        bad(qrels={"q1": {"d2": 1}}, documents=["d2"])
    with pytest.raises(MetricError, match="the query 'q1' is not among the queries"):
        bad(qrels={"q2": {"d1": 1}}, queries=["q2"])
    with pytest.raises(MetricError, match="the id 'd1' stands more than once"):
        bad(documents=["d1", "d2", "d1"])
    with pytest.raises(MetricError, match="the id 'q1' stands more than once"):
        bad(queries=["q1", "q1"])


@pytest.mark.parametrize("grade", [1.0, 0.5, "1", None, 2**31])
def test_grades_are_integers(grade: Any) -> None:
    with pytest.raises(MetricError, match="query 'q1' grades document 'd1' with"):
        bad(qrels={"q1": {"d1": grade}})


def test_wrong_lists_are_named() -> None:
    table = judgements({0: {1: 1}}, 2, 5)
    scores = np.ones((2, 3))
    with pytest.raises(MetricError, match=r"query 'b' has document 'w' more than once"):
        judge_lists(np.array([[0, 1, 2], [3, 0, 3]]), scores, table, queries=["a", "b"], documents=list("xyzw"))
    with pytest.raises(MetricError, match="query 1 has the unknown document 5"):
        judge_lists(np.array([[0, 1, 2], [3, 0, 5]]), scores, table, documents=list("abcde"))
    with pytest.raises(MetricError, match="query 0 has the unknown document -2"):
        judge_lists(np.array([[0, -2, 2], [3, 0, -1]]), scores, table)
    with pytest.raises(MetricError, match=r"expected integers \(Q, K\), got float64"):
        judge_lists(scores, scores, table)
    with pytest.raises(MetricError, match=r"expected floats \(2, 3\) as the ids, got float64 \(2, 2\)"):
        judge_lists(np.array([[0, 1, 2], [3, 0, 1]]), scores[:, :2], table)
    with pytest.raises(MetricError, match="1 lists, judgements of 2 queries"):
        judge_lists(np.array([[0]]), np.ones((1, 1)), table)
    with pytest.raises(MetricError, match="judged: query 'a' judges the unknown document 1"):
        judge_lists(np.array([[0], [0]]), scores[:, :1], table, queries=["a", "b"], documents=["x"])
    with pytest.raises(MetricError, match="there is no tie order 'best'"):
        bad(ties="best")
    with pytest.raises(MetricError, match="the lowest relevant grade is 1 or more, got 0"):
        bad(level=0)
    with pytest.raises(MetricError, match="query 3 judges document 7 more than once"):
        Judgements.of(np.array([3, 0, 3]), np.array([7, 7, 7]), np.array([1, 1, 0]), 4)
    with pytest.raises(MetricError, match="judgement 1 is of the unknown query 4"):
        Judgements.of(np.array([3, 4]), np.array([7, 7]), np.array([1, 1]), 4)


def test_measures_go_by_name() -> None:
    judged = bad()
    assert all(judged.measure(f"{name}@1").shape == (1,) for name in IR_MEASURES if name != "r_precision")
    with pytest.raises(MetricError, match=r"no measure 'ndgc@10' of ranked lists.*recall@k.*r_precision"):
        judged.measure("ndgc@10")
    for wrong in ("recall@0", "recall@ten", "recall@-1", "recall@", "r_precision@5", "recall@1.5"):
        with pytest.raises(MetricError, match="no cut-off that can be read"):
            judged.measure(wrong)
    with pytest.raises(MetricError, match=r"'recall' needs a cut-off\. say recall@10"):
        judged.measure("recall")
    with pytest.raises(MetricError, match="k counts from 1"):
        judged.precision(0)


def test_large_ids_and_many_queries_need_no_table_of_queries_by_documents() -> None:
    """Ids of 2^62 and 3,000 lists of 200: a dense table would have 10^22 entries."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 2**62, (3000, 200))
    scores = rng.random(ids.shape, np.float32)
    rows = np.repeat(np.arange(3000), 5)
    judged = judge_lists(ids, scores, Judgements.of(rows, ids[:, :5].ravel(), np.ones(15000, int), 3000))
    expected = (-np.sort(-scores, axis=1)[:, 9:10] <= scores[:, :5]).sum(axis=1) / 5
    np.testing.assert_allclose(judged.recall(10), expected)
