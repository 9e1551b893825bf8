"""Comparisons: real differences are found, luck is not, and what is not comparable is refused by name."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from typer.testing import CliRunner

from rayemb import storage
from rayemb.cli import app
from rayemb.config import dump, from_mapping
from rayemb.evaluate import kept
from rayemb.evaluate.compare import Compared, by_draws, compare_reports, write_comparison
from rayemb.evaluate.errors import EvaluateError
from rayemb.evaluate.metrics import compare as compare_values
from rayemb.evaluate.metrics import holm
from rayemb.evaluate.report import write_report
from rayemb.evaluate.suite import SuiteConfig
from rayemb.evaluate.tasks import Found, Items
from tests.evaluate.test_report import EVIL, Page

N = 300
SUITE: dict[str, Any] = {
    "model": "m",
    "tasks": {
        "find": {"kind": "retrieval", "data": "somewhere", "measures": ["ndcg@10", "recall@10"]},
        "alike": {"kind": "sts", "data": "pairs.jsonl"},
    },
}


def columns(quality: float, seed: int = 0, luck: int = 0) -> dict[str, dict[str, NDArray[np.float64]]]:
    """What a model of some quality finds; the same queries are hard for all (`seed`), the rest is `luck`."""
    rng, own = np.random.default_rng(seed), np.random.default_rng(luck + 1000)
    hard, score = rng.random(N), rng.random(N) * 5
    good = (quality - 0.5 * hard + own.normal(0, 0.1, N)).clip(0, 1)
    return {
        "find": {"ndcg@10": good, "recall@10": (good > 0.3).astype(float)},
        "alike": {"similarity": score * quality**3 + own.normal(0, 1, N), "score": score},
    }


def make(folder: Path, found: dict[str, dict[str, NDArray[np.float64]]], system: str = "m", **changes: Any) -> str:
    """The report of a suite as `run_suite` leaves it."""
    suite = {**SUITE, **changes.pop("suite", {})}
    ids, clusters, data = changes.pop("ids", None), changes.pop("clusters", None), changes.pop("data", "d" * 64)
    config, uri = from_mapping(SuiteConfig, suite), str(folder)
    results = []
    for name, task in config.tasks.items():
        if name not in found:
            continue
        items = Items(ids or [f"q{n}" for n in range(N)], found[name], clusters)
        kept.write(uri, name, system, "key", Found(items, 1000), data=data)
        figures = {metric: {"value": value} for metric, value in task.figures(found[name]).items()}
        part = {
            "direction": task.direction,
            "queries": N,
            "candidates": 1000,
            "systems": [{"system": system, "metrics": figures}],
        }
        results.append({"split": name, "directions": [part]})
    report = {"title": "t", "created": "2026-01-01T00:00:00Z", "model_digest": "", "corpus": {"name": "c", "uri": "u"}}
    write_report(uri, {**report, "results": results})
    storage.write_bytes(storage.join(uri, "suite.yaml"), dump(config).encode())
    return uri


def by_metric(figures: tuple[Compared, ...]) -> dict[str, Compared]:
    return {each.metric: each for each in figures}


def test_a_better_model_is_shown_to_be_and_an_equal_one_is_not(tmp_path: Path) -> None:
    good = make(tmp_path / "good", columns(0.9, luck=1), "good")
    poor = make(tmp_path / "poor", columns(0.6, luck=2), "poor")
    again = make(tmp_path / "again", columns(0.9, luck=3), "again")
    made = compare_reports([(good, poor)])
    assert [(each.path, each.verdict) for each in made.figures] == [
        ("find/query→document/ndcg@10", "better"),
        ("find/query→document/recall@10", "better"),
        ("alike/text↔text/spearman", "better"),
        ("alike/text↔text/pearson", "better"),
    ]
    assert made.summary == "A is better in 4 and worse in 0 of 4 figures; no difference shown in 0"
    assert made.names == ("good", "poor")
    back = compare_reports([(poor, good)])
    assert {each.verdict for each in back.figures} == {"worse"}
    for one, other in zip(made.figures, back.figures, strict=True):
        assert one.difference == pytest.approx(-other.difference)
        assert (one.low, one.high) == (pytest.approx(-other.high), pytest.approx(-other.low))
    same = compare_reports([(good, again)])
    assert {each.verdict for each in same.figures} == {"no difference shown"}
    assert "would have been" in same.figures[0].said


def test_means_are_compared_as_the_pure_metrics_compare_them_and_corrected_together(tmp_path: Path) -> None:
    a, b = columns(0.7, luck=1), columns(0.66, luck=2)
    clusters = np.arange(N) // 3
    left, right = (make(tmp_path / name, found, clusters=clusters) for name, found in (("a", a), ("b", b)))
    made = compare_reports([(left, right)], seed=4)
    expected = {
        metric: compare_values(a["find"][metric], b["find"][metric], clusters, seed=4)
        for metric in ("ndcg@10", "recall@10")
    }
    found = by_metric(made.figures)
    for metric, one in expected.items():
        each = found[metric]
        assert (each.difference, each.low, each.high, each.p_alone) == (one.difference, one.low, one.high, one.p)
        assert (each.items, each.clusters, each.test) == (N, 100, "sign flips")
        assert each.a - each.b == pytest.approx(each.difference)
    corrected = holm(np.array([each.p_alone for each in made.figures]))
    np.testing.assert_allclose([each.p for each in made.figures], corrected)
    alone = compare_reports([(left, right)], metrics=["find/ndcg@10"], seed=4)
    assert [each.metric for each in alone.figures] == ["ndcg@10"]
    assert alone.figures[0].p == alone.figures[0].p_alone


def test_correlations_have_the_error_that_theory_gives(tmp_path: Path) -> None:
    """Independent similarities: the variances of two correlations add up (Fisher's transformation)."""
    a, b = columns(0.9, luck=1), columns(0.5, luck=2)
    found = by_metric(compare_reports([(make(tmp_path / "a", a), make(tmp_path / "b", b))]).figures)
    each = found["pearson"]
    r = [float(np.corrcoef(side["alike"]["similarity"], side["alike"]["score"])[0, 1]) for side in (a, b)]
    assert each.difference == pytest.approx(r[0] - r[1])
    assert each.test == "bootstrap"
    theory = sum(((1 - value**2) ** 2) / N for value in r) ** 0.5
    assert (each.high - each.low) / (2 * 1.96) == pytest.approx(theory, rel=0.25)
    ranks = [stats.spearmanr(side["alike"]["similarity"], side["alike"]["score"]).statistic for side in (a, b)]
    assert found["spearman"].difference == pytest.approx(ranks[0] - ranks[1])


def test_draws_of_a_mean_give_what_the_test_of_means_gives() -> None:
    rng = np.random.default_rng(0)
    a_SQ = rng.normal(0.5, 0.3, (4, 200)) + rng.normal(0.03, 0.02, (4, 1))
    b_SQ = rng.normal(0.5, 0.3, (4, 200))
    d_SQ = a_SQ - b_SQ
    d_SB = np.stack([d_SQ[:, rng.integers(0, 200, 200)].mean(axis=1) for _ in range(4000)], axis=1)
    ours = by_draws(d_SQ.mean(axis=1), d_SB, 200, 200, 0.95, True)
    theirs = compare_values(a_SQ, b_SQ, seed=0)
    assert ours.difference == pytest.approx(theirs.difference)
    assert (ours.high - ours.low) == pytest.approx(theirs.high - theirs.low, rel=0.1)
    assert ours.detectable == pytest.approx(theirs.detectable, rel=0.1)
    # Draws that lie beside the value, as those of clusterings do, move nothing.
    aside = by_draws(d_SQ.mean(axis=1)[:1], d_SB[:1] + 0.3, 200, 200, 0.95, True)
    assert (aside.low + aside.high) / 2 == pytest.approx(aside.difference)
    one = compare_values(a_SQ[0], b_SQ[0], seed=0)
    assert aside.high - aside.low == pytest.approx(one.high - one.low, rel=0.1)
    nothing = by_draws(np.zeros(2), np.zeros((2, 9)), 5, 5, 0.95, True)
    assert (nothing.p, nothing.low, nothing.high) == (1, 0, 0)


def test_seeds_that_disagree_show_less_than_one_pair_of_them(tmp_path: Path) -> None:
    quality = [(0.9, 0.6), (0.55, 0.75), (0.8, 0.62)]
    pairs = [
        (make(tmp_path / f"a{n}", columns(a, luck=n)), make(tmp_path / f"b{n}", columns(b, luck=n + 10)))
        for n, (a, b) in enumerate(quality)
    ]
    one, all_of_them = compare_reports(pairs[:1]), compare_reports(pairs)
    assert {each.verdict for each in one.figures} == {"better"}
    assert {each.verdict for each in all_of_them.figures} == {"no difference shown"}
    assert {each.test for each in all_of_them.figures} == {"seeds and items"}
    for each in all_of_them.figures:
        assert each.high - each.low > 0.3
    agreed = compare_reports(
        [
            (make(tmp_path / f"c{n}", columns(0.9, luck=n)), make(tmp_path / f"d{n}", columns(0.6, luck=n + 10)))
            for n in range(3)
        ]
    )
    assert {each.verdict for each in agreed.figures} == {"better"}


def test_items_in_another_order_are_the_same_items(tmp_path: Path) -> None:
    a, b = columns(0.8, luck=1), columns(0.7, luck=2)
    left, right = make(tmp_path / "a", a), make(tmp_path / "b", b)
    order = np.random.default_rng(0).permutation(N)
    turned = {task: {name: column[order] for name, column in found.items()} for task, found in b.items()}
    other = make(tmp_path / "c", turned, ids=[f"q{n}" for n in order])
    assert compare_reports([(left, right)]).figures == compare_reports([(left, other)]).figures


def test_what_does_not_compare_is_refused_by_name(tmp_path: Path) -> None:
    found = columns(0.8)
    left = make(tmp_path / "a", found)

    def refused(name: str, match: str, **changes: Any) -> None:
        right = make(tmp_path / name, found, **changes)
        for pair in ((left, right), (right, left)):
            with pytest.raises(EvaluateError, match=match):
                compare_reports([pair])

    ids = [f"q{n}" for n in range(N)]
    refused("ids", r"task 'find'.*different items: only .*/(a|ids) has '(q7|new)'", ids=[*ids[:7], "new", *ids[8:]])
    refused("data", "data differ.*dddddddddddd", data="e" * 64)
    retrieval, sts = SUITE["tasks"]["find"], SUITE["tasks"]["alike"]
    refused(
        "tasks", "has the task 'alike'|has the task 'likeness'", suite={"tasks": {"find": retrieval, "likeness": sts}}
    )
    refused(
        "k", r"tasks\.find\.measures", suite={"tasks": {"find": {**retrieval, "measures": ["ndcg@10"]}, "alike": sts}}
    )
    refused("seed", "different seeds", suite={"seed": 1})
    moved = {"find": {**retrieval, "data": "elsewhere", "description": "x"}, "alike": {**sts, "data": "other.jsonl"}}
    assert compare_reports([(left, make(tmp_path / "moved", found, suite={"tasks": moved}))]).figures


def test_what_is_no_report_of_a_suite_is_said(tmp_path: Path) -> None:
    left = make(tmp_path / "a", columns(0.8))
    with pytest.raises(EvaluateError, match="there is no report"):
        compare_reports([(left, str(tmp_path))])
    with pytest.raises(EvaluateError, match=r"no figure is called 'ndcg@100'.*ndcg@10, recall@10"):
        compare_reports([(left, left)], metrics=["ndcg@100"])
    items = Path(kept.items_uri(left, "find", "m"))
    data = items.read_bytes()
    for wrong in (b"PAR1", data[:200]):
        items.write_bytes(wrong)
        with pytest.raises(EvaluateError, match="the items of the task are not there"):
            compare_reports([(left, left)])
    (tmp_path / "a" / "suite.yaml").write_text("tasks: {x: {kind: nothing}}")
    with pytest.raises(EvaluateError, match="no suite of this version"):
        compare_reports([(left, left)])
    (tmp_path / "a" / "suite.yaml").unlink()
    with pytest.raises(EvaluateError, match="no report of a suite"):
        compare_reports([(left, left)])


def test_a_task_without_a_figure_is_left_out_and_said(tmp_path: Path) -> None:
    found = columns(0.8, luck=1)
    left = make(tmp_path / "a", found)
    right = make(tmp_path / "b", {"find": columns(0.8, luck=2)["find"]})
    made = compare_reports([(left, right)])
    assert {each.task for each in made.figures} == {"find"}
    assert made.notes == (f"alike is left out: no figure of it in {right}.",)


def test_the_command_writes_a_page_that_says_it_all(tmp_path: Path) -> None:
    left = make(tmp_path / "a", columns(0.9, luck=1), "new")
    right = make(tmp_path / "b", columns(0.6, luck=2), EVIL)
    out = str(tmp_path / "out")
    answer = CliRunner().invoke(app, ["compare", left, right, "--out", out, "--json"])
    assert answer.exit_code == 0, answer.output
    told = json.loads(answer.stdout)
    assert told == json.loads((tmp_path / "out" / "comparison.json").read_text())
    html = (tmp_path / "out" / "index.html").read_text()
    page = Page(html)
    assert "A is better in 4 and worse in 0 of 4 figures" in page.text
    assert not page.all("script")
    assert "alert(1)</script>" not in html
    plots = page.all("svg")
    assert len(plots) == 2
    assert "ndcg@10 +" in plots[0]["aria-label"]
    for figure in told["figures"]:
        assert f"{figure['a']:.3f}" in page.text
        assert f"{figure['detectable']:.3f}" in page.text
    assert page.text.count("▲ better") == 4
    again = write_comparison(str(tmp_path / "again"), compare_reports([(left, right)]))
    assert Path(again).name == "index.html"
    odd = CliRunner().invoke(app, ["compare", left])
    assert isinstance(odd.exception, EvaluateError)
    assert "1 reports are no pairs" in str(odd.exception)
