"""Suites of toy encoders: what is measured, compared, left out, kept and not repeated; no model and no cluster."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from rayemb.config import ConfigError, from_mapping, load
from rayemb.evaluate import kept
from rayemb.evaluate.errors import EvaluateError
from rayemb.evaluate.gate import Place
from rayemb.evaluate.metrics import paired_bootstrap
from rayemb.evaluate.report import Example, Hit, Space, read_report
from rayemb.evaluate.suite import SuiteConfig, SuiteResult, load_tasks, run_suite
from rayemb.evaluate.tasks.base import Found, Items, Shown
from tests.evaluate.tasks.conftest import DOCUMENTS, SUBJECTS, jsonl, labelled, pairs, qrels  # noqa: F401


class Words:
    """A bag of letters, and of subjects if it knows them; counts how often it is asked."""

    def __init__(self, name: str, *, knows: float, digest: str | None = None) -> None:
        self.name, self.knows, self.digest, self.asked, self.closed = (
            name,
            knows,
            name if digest is None else digest,
            0,
            0,
        )

    def texts(self, texts: Any, *, kind: str = "text") -> Any:
        self.asked += 1
        found = np.zeros((len(texts), 30), np.float32)
        for row, text in enumerate(texts):
            for letter in text.lower():
                found[row, ord(letter) % 26] += 0.1
            for n, (subject, words) in enumerate(SUBJECTS.items()):
                found[row, 26 + n] = self.knows * any(word in text for word in (subject, *words))
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    def images(self, images: Any) -> Any:
        raise NotImplementedError

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def config(tmp_path: Path, pairs: str, labelled: tuple[str, str]) -> SuiteConfig:  # noqa: F811
    queries = [(f"q{n}", f"about {subject}, please", subject) for n, subject in enumerate(SUBJECTS)]
    folder = tmp_path / "data"
    jsonl(folder / "corpus.jsonl", [{"_id": d, "text": text} for d, text, _ in DOCUMENTS])
    jsonl(folder / "queries.jsonl", [{"_id": q, "text": text} for q, text, _ in queries])
    qrels(folder / "qrels/test.tsv", [(q, d, 1) for q, _, subject in queries for d, _, s in DOCUMENTS if s == subject])
    data = {"file": labelled[0]}
    return from_mapping(
        SuiteConfig,
        {
            "model": "good",
            "baselines": ["bad"],
            "out": str(tmp_path / "out"),
            "samples": 100,
            "map": "pca",
            "tasks": {
                "find": {"kind": "retrieval", "data": str(folder), "measures": ["ndcg@10", "recall@20"]},
                "sts": {"kind": "sts", "data": pairs, "diagnostics": ["rankme"]},
                "group": {"kind": "clustering", "data": data},
                "probe": {"kind": "classification", "train": data, "test": {"file": labelled[1]}, "methods": ["knn"]},
            },
        },
    )


def run(config: SuiteConfig, *encoders: Any, **more: Any) -> SuiteResult:
    return run_suite(config, load_tasks(config), [lambda e=each: e for each in encoders], **more)


def test_the_model_beside_its_baseline(config: SuiteConfig) -> None:
    good, bad = Words("good", knows=2), Words("bad", knows=0)
    told: list[tuple[int, int, str]] = []
    result = run(config, good, bad, progress=lambda *p: told.append(p))
    assert list(result.figures) == ["find", "sts", "group", "probe"]
    assert result.figures["find"]["recall@20"] == 1
    report = read_report(config.out)
    assert report.model_digest == "good"
    for part in report.results:
        (way,) = part.directions
        assert [system.system for system in way.systems] == ["good", "bad"]
        assert way.difference is not None
        gain = way.difference.metrics[way.columns[0]]
        values = [system.metrics[way.columns[0]].value for system in way.systems]
        assert gain.value == pytest.approx(values[0] - values[1])
        assert set(part.diagnostics) == {"good", "bad"}
    found = report.results[0]
    assert [list(curve.systems) for curve in found.curves] == [["good", "bad"]]
    assert found.space is not None
    assert found.similarities is not None
    assert report.results[2].confusion is not None
    assert {example.split for example in report.examples} >= {"find", "sts"}
    assert told[-1][0] == told[-1][1] == 8
    assert (good.closed, bad.closed) == (1, 1)
    assert Path(config.out, "index.html").exists()
    assert load(SuiteConfig, Path(config.out, "suite.yaml")) == config
    assert "find ndcg@10" in result.summary
    assert "on bad" in result.summary
    assert Place("find", "query→document", "recall@20") in config.offered


def test_items_are_all_that_the_figures_come_from(config: SuiteConfig) -> None:
    result = run(config, Words("good", knows=2), Words("bad", knows=0))
    ours, theirs = (kept.read_items(kept.items_uri(config.out, "find", name)) for name in ("good", "bad"))
    assert ours.ids == ["q0", "q1", "q2", "q3"]
    way = result.report.results[0].directions[0]
    assert way.difference is not None
    expected = paired_bootstrap(ours.columns["ndcg@10"], theirs.columns["ndcg@10"], seed=0, samples=100)
    gain = way.difference.metrics["ndcg@10"]
    assert (gain.value, gain.low, gain.high) == expected
    table = pq.read_table(kept.items_uri(config.out, "sts", "good"))
    assert table.column_names == ["id", "similarity", "score"]


def test_finished_tasks_are_not_repeated(config: SuiteConfig, tmp_path: Path) -> None:
    good, bad = Words("good", knows=2), Words("bad", knows=0)
    first = run(config, good, bad)
    asked = good.asked, bad.asked
    again = run(config, good, bad)
    assert (good.asked, bad.asked) == asked
    assert again.report.results == first.report.results
    assert again.report.examples == first.report.examples
    # Another model, a setting of one task, its data, or a lost file: that alone is found anew.
    run(config, Words("good", knows=2, digest="other"), bad)
    assert bad.asked == asked[1]
    tasks = {**config.tasks, "find": config.tasks["find"].model_copy(update={"measures": ("ndcg@5",)})}
    run(config.model_copy(update={"tasks": tasks}), good, bad)
    assert bad.asked == asked[1] + 2
    run(config, good, bad)
    before = bad.asked
    path = Path(config.tasks["sts"].data)  # type: ignore[union-attr]
    path.write_text(path.read_text().replace("Everybody", "Nobody"))
    run(config, good, bad)
    assert bad.asked == before + 2
    kept_of = Path(kept.items_uri(config.out, "group", "bad"))
    kept_of.write_bytes(b"broken")
    run(config, good, bad)
    assert bad.asked == before + 3


def test_a_suite_that_was_stopped_goes_on(config: SuiteConfig) -> None:
    class Stopped(Words):
        def texts(self, texts: Any, *, kind: str = "text") -> Any:
            if self.asked == 4:  # in the third task
                raise KeyboardInterrupt
            return super().texts(texts, kind=kind)

    with pytest.raises(KeyboardInterrupt):
        run(config, Stopped("good", knows=2))
    good = Words("good", knows=2)
    result = run(config, good)
    assert good.asked == 1 + 2  # the clustering and the probe
    assert list(result.figures) == ["find", "sts", "group", "probe"]


def test_without_a_digest_nothing_is_taken_for_known(config: SuiteConfig) -> None:
    unknown = Words("good", knows=2, digest="")
    run(config, unknown)
    asked = unknown.asked
    run(config, unknown)
    assert unknown.asked == 2 * asked


class Constant(Words):
    def texts(self, texts: Any, *, kind: str = "text") -> Any:
        return np.tile(np.float32([1, 0]), (len(texts), 1))


def test_a_baseline_without_a_figure_is_left_out_and_told(config: SuiteConfig) -> None:
    report = run(config, Words("good", knows=2), Constant("flat", knows=0)).report
    by_task = {part.split: part.directions[0] for part in report.results}
    assert [system.system for system in by_task["sts"].systems] == ["good"]
    assert by_task["sts"].difference is None
    assert len(by_task["find"].systems) == 2
    assert any(note.startswith("sts: flat is left out, it has no spearman") for note in report.notes)
    json.loads(Path(config.out, "metrics.json").read_text(), parse_constant=lambda name: pytest.fail(name))


def test_a_model_without_a_figure_is_told(config: SuiteConfig) -> None:
    result = run(config, Constant("flat", knows=0), Words("good", knows=2))
    assert "sts" not in result.figures
    assert result.summary.endswith("without a figure: sts")
    assert any("spearman has no figure for flat" in note for note in result.report.notes)
    only = config.model_copy(update={"tasks": {"sts": config.tasks["sts"]}, "out": config.out + "2"})
    with pytest.raises(EvaluateError, match="no task has a figure for the model"):
        run(only, Constant("flat", knows=0))


def test_two_models_of_one_name_are_told_apart(config: SuiteConfig) -> None:
    report = run(config, Words("m", knows=2, digest="1"), Words("m", knows=0, digest="2")).report
    assert [system.system for system in report.results[0].directions[0].systems] == ["m", "m-2"]


def test_vectors_that_are_not_finite_name_the_item(config: SuiteConfig) -> None:
    class Broken(Words):
        def texts(self, texts: Any, *, kind: str = "text") -> Any:
            found = super().texts(texts, kind=kind)
            found[3] = np.nan
            return found

    with pytest.raises(EvaluateError, match="find: bad gives a vector that is not finite for q3"):
        run(config, Broken("bad", knows=1))
    report = run(config, Words("good", knows=2), Broken("bad", knows=1)).report
    assert any("find: not measured for bad (bad gives a vector that is not finite for q3" in n for n in report.notes)


def test_bad_suites_are_refused_by_their_key() -> None:
    with pytest.raises(ConfigError, match="tasks"):
        from_mapping(SuiteConfig, {"tasks": {}})
    with pytest.raises(ConfigError, match=r"the task 'a/b' needs a name"):
        from_mapping(SuiteConfig, {"tasks": {"a/b": {"kind": "sts", "data": "x"}}})
    with pytest.raises(ConfigError, match=r"tasks.a.*kind"):
        from_mapping(SuiteConfig, {"tasks": {"a": {"kind": "stss", "data": "x"}}})
    with pytest.raises(ConfigError, match=r"tasks.a.dta: unknown key. did you mean 'data'"):
        from_mapping(SuiteConfig, {"tasks": {"a": {"kind": "sts", "dta": "x"}}})


def test_the_shipped_suites_are_valid() -> None:
    for path in sorted((Path(__file__).parents[2] / "jobs/configs/suites").glob("*.yaml")):
        assert load(SuiteConfig, path).tasks


def test_pictures_of_what_should_have_been_found_are_kept_too(tmp_path: Path) -> None:
    hit = Hit(caption="right", image=b"hit", score=0.5, relevant=False)
    examples = (
        Example(split="s", direction="d", image=b"a", hits=(hit,), wanted=hit.model_copy(update={"image": b"wanted"})),
        Example(split="s", direction="d", hits=()),
        Example(split="s", direction="d", image=b"b", hits=(hit, hit)),
    )
    space = Space(method="pca", rows=2, x=(0.0, 1.0), y=(0.0, 1.0), images=(b"one", None))
    found = Found(Items(["q"], {"m": np.ones(1)}), 1, Shown(space=space, examples=examples))
    kept.write(str(tmp_path), "task", "system", "key", found, data="digest")
    again = kept.read(str(tmp_path), "task", "system", "key")
    assert again is not None
    assert (again.shown.examples, again.shown.space) == (examples, space)
    assert kept.data_digest(kept.items_uri(str(tmp_path), "task", "system")) == "digest"
