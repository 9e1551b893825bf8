"""`rayemb evaluate --require`: refused before the work or judged after it, by the exit code and a line each."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import pytest
from rich.console import Console

from rayemb import cli, storage
from rayemb.config import load
from rayemb.data import Corpus
from rayemb.pipeline import RunConfig, run_stage
from tests.serve.conftest import tiny_model

SETTINGS = ["corpus.source.limit=400", "evaluate.max_rows=40", "evaluate.splits=[zero_shot]", "evaluate.samples=100"]


class Answer(NamedTuple):
    code: object
    out: str
    errors: list[str]


Run = Callable[..., Answer]


@pytest.fixture(scope="module")
def workspace(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A corpus of the demo's drawings, and a model that was never trained."""
    folder = str(tmp_path_factory.mktemp("evaluation"))
    config = load(RunConfig, None, [f"workspace={folder}", *SETTINGS])
    run_stage("corpus", config)
    assert "zero_shot" in Corpus.open(config.uri("corpus")).splits
    tiny_model(["red heart", "a dog", "a cat"]).save(config.uri("model"))
    return folder


@pytest.fixture
def evaluate(workspace: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    def run(*arguments: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["rayemb", "evaluate", f"workspace={workspace}", *SETTINGS, *arguments])
        monkeypatch.setattr(cli, "errors", Console(stderr=True, highlight=False, soft_wrap=True, width=200))
        capfd.readouterr()
        code: object = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
        out, errors = capfd.readouterr()
        return Answer(code, out, errors.splitlines())

    return run


def test_what_fails_is_a_line_each_an_exit_code_and_a_file_for_ci(evaluate: Run, tmp_path: Path) -> None:
    junit = tmp_path / "ci" / "junit.xml"
    failing = ["text->image/recall@1>=1.5", "low(gain(zero_shot/image->text/mrr))>0.9"]
    asked = [word for text in (*failing, "recall@10>=0") for word in ("--require", text)]
    answer = evaluate(*asked, "--junit", str(junit))
    assert answer.code == 1
    told = [line for line in answer.errors if line.startswith("failed  ")]
    assert [line.split(": ")[0] for line in told] == [f"failed  {text}" for text in failing]
    assert "zero_shot/text→image/recall@1 is 0." in told[0]
    assert answer.out.count("passed  recall@10>=0: zero_shot/") == 2
    suite = ElementTree.fromstring(junit.read_bytes()).find("testsuite")
    assert suite is not None
    assert (suite.get("tests"), suite.get("failures")) == ("4", "2")
    passed = evaluate("--require", "recall@10>=0")
    assert (passed.code, [line for line in passed.errors if "failed" in line]) == (0, [])


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--require", "recall@10"], "'recall@10' is no requirement"),
        (["--require", "ndcg@10>0"], "no evaluation here yields 'ndcg@10'"),
        (["--require", "style_held_out/mrr>0"], "no evaluation here yields 'style_held_out/mrr'"),
        (["--junit", "x.xml"], "nothing is required"),
    ],
)
def test_what_cannot_be_judged_is_refused_before_anything_is_done(
    evaluate: Run, workspace: str, words: list[str], told: str
) -> None:
    report = storage.join(workspace, "report", "metrics.json")
    before = Path(report).stat().st_mtime_ns if storage.exists(report) else None
    answer = evaluate(*words)
    assert answer.code == 2
    assert told in " ".join(answer.errors)
    assert "Evaluate on" not in answer.out
    assert (Path(report).stat().st_mtime_ns if storage.exists(report) else None) == before
