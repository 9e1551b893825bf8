"""Retrieval against sentence-transformers' evaluator and by hand; and every way in which its files can be wrong."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers.evaluation import InformationRetrievalEvaluator

from rayemb.config import ConfigError, from_mapping
from rayemb.evaluate.encoders import ModelEncoder
from rayemb.evaluate.errors import EvaluateError
from rayemb.evaluate.exact import Neighbours
from rayemb.evaluate.tasks import Means, RetrievalConfig
from tests.evaluate.tasks.conftest import DOCUMENTS, QUERIES, grade, jsonl, qrels
from tests.evaluate.test_exact import table

MEANS = Means(show=False)


def config(**fields: Any) -> RetrievalConfig:
    return from_mapping(RetrievalConfig, {k: str(v) if isinstance(v, Path) else v for k, v in fields.items()})


def figures(task: RetrievalConfig, encoder: Any, means: Means = MEANS) -> dict[str, float]:
    return task.figures(task.load("task").run(encoder, means).items.columns)


def test_figures_are_those_of_sentence_transformers(beir: Path, encoder: ModelEncoder, theirs: Any) -> None:
    relevant = {q: {d[0] for d in DOCUMENTS[::3] if grade(q, d) > 0} for q, _, _ in QUERIES}
    evaluator = InformationRetrievalEvaluator(
        {q: text for q, text, _ in QUERIES},
        {d: text for d, text, _ in DOCUMENTS},
        relevant,
        accuracy_at_k=[5],
        precision_recall_at_k=[5, 10],
        mrr_at_k=[10],
        ndcg_at_k=[10],
        map_at_k=[10],
        write_csv=False,
    )
    expected = {k.split("cosine_")[1]: v for k, v in evaluator(theirs).items() if "cosine_" in k}
    names = {
        "success@5": "accuracy@5",
        "precision@5": "precision@5",
        "recall@5": "recall@5",
        "recall@10": "recall@10",
        "mrr@10": "mrr@10",
    }
    found = figures(config(data=beir, measures=tuple(names), ties="sbert"), encoder)
    for ours, other in names.items():
        assert found[ours] == pytest.approx(expected[other], abs=1e-6), ours
    assert 0 < found["recall@10"] < 1


def test_graded_ndcg_is_pytrec_evals(beir: Path, encoder: ModelEncoder) -> None:
    import pytrec_eval

    scores = encoder.texts([t for _, t, _ in QUERIES], kind="query") @ encoder.texts([t for _, t, _ in DOCUMENTS]).T
    run = {
        q: {d[0]: float(s) for d, s in zip(DOCUMENTS, row, strict=True)}
        for (q, _, _), row in zip(QUERIES, scores, strict=True)
    }
    judged = {q: {d[0]: grade(q, d) for d in DOCUMENTS[::3]} for q, _, _ in QUERIES}
    found = pytrec_eval.RelevanceEvaluator(judged, {"ndcg_cut.10", "map", "recall.5"}).evaluate(run)
    ours = figures(config(data=beir, measures=("ndcg@10", "map", "recall@5"), ties="trec"), encoder)
    for name, other in (("ndcg@10", "ndcg_cut_10"), ("map", "map"), ("recall@5", "recall_5")):
        assert ours[name] == pytest.approx(np.mean([each[other] for each in found.values()]), abs=1e-6)


def test_what_it_shows(beir: Path, encoder: ModelEncoder) -> None:
    found = config(data=beir).load("task").run(encoder, Means())
    assert found.candidates == len(DOCUMENTS)
    assert found.items.ids == [q for q, _, _ in QUERIES]
    (curve,) = found.shown.curves
    assert curve.systems["minilm"] == tuple(sorted(curve.systems["minilm"]))
    assert found.shown.similarities is not None
    assert sum(found.shown.similarities.positives) == sum(
        grade(q, d) > 0 for q, _, _ in QUERIES for d in DOCUMENTS[::3]
    )
    assert found.shown.space is not None
    assert len(found.shown.space.x) == len(DOCUMENTS)
    worst = found.shown.examples[0]
    main = found.items.columns["ndcg@10"]
    assert worst.text == QUERIES[int(main.argmin())][1]
    assert [hit.score for hit in worst.hits] == sorted((hit.score for hit in worst.hits), reverse=True)
    assert "rankme" in found.diagnostics


def test_a_query_never_finds_itself_or_what_it_excludes(tmp_path: Path, encoder: ModelEncoder) -> None:
    documents = [{"id": d, "text": text} for d, text, _ in DOCUMENTS[:8]]
    queries = [
        {"id": "d0", "text": DOCUMENTS[0][1]},
        {"id": "x", "text": DOCUMENTS[1][1], "excluded_ids": ["d1", "zz"]},
    ]
    files = {
        "corpus": jsonl(tmp_path / "c.jsonl", documents),
        "queries": jsonl(tmp_path / "q.jsonl", queries),
        "qrels": qrels(tmp_path / "r.tsv", [("d0", "d0", 1), ("d0", "d1", 1), ("x", "d1", 1), ("x", "d2", 1)]),
        "measures": ("recall@1", "recall@10"),
    }
    task = config(**files, exclude_identical_ids=True).load("task")
    assert task.judged.ids.tolist() == [1, 2]
    found = task.run(encoder, Means())
    assert found.items.columns["recall@10"].tolist() == [1, 1]
    for example in found.shown.examples:
        own = {"d0": DOCUMENTS[0][1], "x": DOCUMENTS[1][1]}
        assert example.text in own.values()
        assert example.text not in [hit.caption for hit in example.hits]
    # Without either, each finds itself first.
    files["queries"] = jsonl(tmp_path / "q2.jsonl", [{k: row[k] for k in ("id", "text")} for row in queries])
    assert figures(config(**files), encoder)["recall@1"] == 0.5


def test_the_documents_may_be_an_embeddings_table_or_an_index(
    beir: Path, tmp_path: Path, encoder: ModelEncoder
) -> None:
    vectors = encoder.texts([text for _, text, _ in DOCUMENTS])
    uri = table(tmp_path, vectors)
    rows = jsonl(tmp_path / "c2.jsonl", [{"id": str(n), "text": text} for n, (_, text, _) in enumerate(DOCUMENTS)])
    at = {d: str(n) for n, (d, _, _) in enumerate(DOCUMENTS)}
    judged = qrels(tmp_path / "r2.tsv", [(q, at[d[0]], grade(q, d)) for q, _, _ in QUERIES for d in DOCUMENTS[::3]])
    common = {"queries": beir / "queries.jsonl", "qrels": judged}
    expected = config(**common, corpus=rows).load("t").run(encoder, MEANS)
    by_table = config(**common, embeddings=uri).load("t")

    class Same:
        name, digest, texts, images = "same", "digest", encoder.texts, encoder.images

    found = by_table.run(Same, MEANS)  # type: ignore[arg-type]
    for name, column in expected.items.columns.items():
        assert column.tolist() == found.items.columns[name].tolist()
    with pytest.raises(EvaluateError, match="its vectors are of model digest, not of minilm"):
        by_table.run(encoder, MEANS)

    class Search:
        table = (uri, 1)

        def __call__(self, queries: Any, k: int) -> Neighbours:
            scores = (queries @ vectors.T).astype(np.float64)
            order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
            return Neighbours(order, np.take_along_axis(scores, order, axis=1))

    by_index = config(**common, embeddings=uri, index=str(tmp_path / "index")).load("t")
    found = by_index.run(Same, Means(show=False, open_index=lambda _: Search()))  # type: ignore[arg-type]
    for name, column in expected.items.columns.items():
        np.testing.assert_allclose(column, found.items.columns[name], atol=1e-12)
    Search.table = (uri, 7)
    with pytest.raises(EvaluateError, match="at version 7"):
        by_index.run(Same, Means(open_index=lambda _: Search()))  # type: ignore[arg-type]


def test_queries_without_a_relevant_document_are_left_out_and_told(beir: Path, encoder: ModelEncoder) -> None:
    qrels(beir / "qrels/test.tsv", [("q0", "d0", 1), ("q1", "d3", 0)])
    found = config(data=beir).load("task").run(encoder, MEANS)
    assert found.items.ids == ["q0"]
    assert "1 judged queries have no relevant document" in found.notes[0]


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (
            "qrels/test.tsv",
            "query-id\tcorpus-id\tscore\nq0\td0\t1\nq9\td0\t1\n",
            r"test.tsv, line 3: query 'q9' is not in",
        ),
        (
            "qrels/test.tsv",
            "query-id\tcorpus-id\tscore\nq0\tzz\t1\n",
            r"line 2: document 'zz' is not in .*corpus.jsonl",
        ),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq0\td0\tNaN\n", r"line 2: grade is NaN, not a finite number"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq0\td0\t1.5\n", r"line 2: grade 1.5 is no whole number"),
        (
            "qrels/test.tsv",
            "query-id\tcorpus-id\tscore\nq0\td0\t1\nq0\td0\t2\n",
            r"line 3: .* judges document 'd0' twice",
        ),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq0\td0\t0\n", r"no query has a relevant document"),
        ("qrels/test.tsv", "a\tb\nq0\td0\n", r"no column 'query' or 'query-id'"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq0\td0\n", r"line 2: has 2 columns, the first line 3"),
        ("qrels/test.tsv", "", r"holds no rows"),
        ("corpus.jsonl", '{"_id": "d0", "text": "a"}\n\n{"_id": "d0", "text": "b"}\n', r"line 3: id 'd0' stands twice"),
        ("corpus.jsonl", '{"_id": "d0", "text": " ", "title": ""}\n', r"line 1: the document is empty"),
        ("corpus.jsonl", '{"_id": "d0", "text": 5}\n', r"line 1: title or text is no text"),
        ("corpus.jsonl", '{"_id": "d0"\n', r"line 1: no JSON"),
        ("corpus.jsonl", "[1]\n", r"line 1: no JSON object"),
        ("queries.jsonl", '{"_id": "q0", "text": ""}\n', r"line 1: text is empty"),
        ("queries.jsonl", '{"_id": null, "text": "a"}\n', r"line 1: id is missing"),
    ],
)
def test_bad_files_are_named_with_their_line(beir: Path, file: str, text: str, message: str) -> None:
    (beir / file).write_text(text)
    with pytest.raises(EvaluateError, match=message):
        config(data=beir).load("task")


def test_bad_configs() -> None:
    with pytest.raises(ConfigError, match="no measure 'ndgc@10'"):
        config(data="x", measures=("ndgc@10",))
    for name in ("ndcg@", "recall@0", "r_precision@3"):
        with pytest.raises(ConfigError, match="no measure"):
            config(data="x", measures=(name,))
    with pytest.raises(ConfigError, match="give data, or corpus, queries and qrels"):
        config(corpus="x")
    with pytest.raises(ConfigError, match="there is no diagnostic 'rankmi'; possible here: rankme"):
        config(data="x", diagnostics=("rankmi",))
    with pytest.raises(ConfigError, match="needs labels, which this kind of task has not"):
        config(data="x", diagnostics=("tolerance",))
    with pytest.raises(EvaluateError, match=r"queries.jsonl: there is no such file"):
        config(data="/nowhere").load("task")


def test_an_encoder_without_a_finite_vector_is_told_which(beir: Path, encoder: ModelEncoder) -> None:
    class Broken:
        name, digest = "broken", ""

        def texts(self, texts: Any, *, kind: str = "text") -> Any:
            found = encoder.texts(texts)
            found[0 if kind == "query" else 4] = np.nan
            return found if kind == "text" else np.ones((len(texts), 384), np.float32)

    with pytest.raises(EvaluateError, match="task: broken gives a vector that is not finite for d4"):
        config(data=beir).load("task").run(Broken(), MEANS)  # type: ignore[arg-type]
