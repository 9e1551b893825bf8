"""Runs side by side, from their folders and from models; a page that stands alone; the command."""

import json
import re
from pathlib import Path

import pytest

from rayemb import cli
from rayemb.train.report import ReportError, compare, write_page
from rayemb.train.sinks import JSONLines, Run

HOSTILE = "<script>alert(1)</script>"


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for number, (name, rate) in enumerate((("train-a", 0.1), ("train-b", 0.2), (HOSTILE, 0.2))):
        sink = JSONLines()
        config = {"steps": 40, "optimizer": {"learning_rate": rate}, **({"note": "x"} if number == 2 else {})}
        sink.begin(Run(str(tmp_path / f"runs/{number}"), name, config), None)
        rows = []
        for step in range(10, 50, 10):
            row = {"step": step, "time": 1e9 + step, "loss": abs(30 - step) + number, "collapsed": False}
            if step % 20 == 0:
                row["val/recall@1"] = [0.2, 0.1][step // 40] + number / 100
            rows.append(row)
        sink.write([*rows, {"step": 50, "loss": None}])
    model = tmp_path / "model"
    model.mkdir()
    manifest = {"config": {"steps": 20}, "training": [{"step": 20, "loss": 5.0, "temperature": 0.1}]}
    (model / "rayemb.json").write_text(json.dumps(manifest))
    return tmp_path


def test_last_and_best_values_and_the_settings_that_differ(runs: Path) -> None:
    found = compare([str(runs / "runs/0"), str(runs / "runs/1"), str(runs / "model"), f"file://{runs}/runs/0"])
    names = [run.name for run in found.runs]
    assert names[:2] == ["train-a", "train-b"]
    assert names[2].endswith("/model")
    assert names[3] == "train-a (2)"
    assert found.metrics == ["loss", "val/recall@1", "collapsed", "temperature"]
    document = found.document
    assert document["runs"][1]["metrics"]["loss"] == {"last": 11.0, "step": 40, "best": 1.0, "best_step": 30}
    assert document["runs"][0]["metrics"]["val/recall@1"] == {"last": 0.1, "step": 40, "best": 0.2, "best_step": 20}
    assert document["runs"][0]["metrics"]["collapsed"] == {"last": 0.0, "step": 40, "best": None, "best_step": None}
    assert "val/recall@1" not in document["runs"][2]["metrics"]
    assert document["differences"] == {
        "steps": ["40", "40", "20", "40"],
        "optimizer.learning_rate": ["0.1", "0.2", "", "0.1"],
    }
    assert compare([str(runs / "runs/0")]).differences == {}


def test_a_folder_of_runs_is_all_of_them_and_an_empty_one_is_refused(runs: Path) -> None:
    assert len(compare([str(runs / "runs")]).runs) == 3
    for where in ("runs/0/metrics", "nowhere"):
        with pytest.raises(ReportError, match="no run has reported anything"):
            compare([str(runs / where)])


def test_the_page_stands_alone_and_runs_nothing(runs: Path) -> None:
    uri = write_page(str(runs / "page/report.html"), compare([str(runs / "runs"), str(runs / "model")]))
    page = Path(uri).read_text()
    assert page.count("<svg ") == 4
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert not re.search(r"""(?:src|href)=["'](?!#|data:)""", page)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert "Line chart of loss: train-a from 20.000 at step 10 to 10.000 at step 40" in page
    assert "optimizer.learning_rate" in page


def test_the_command_prints_a_table_or_json(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def rayemb(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["rayemb", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code in (0, None)
        return capsys.readouterr().out

    folder, page = str(runs / "runs"), runs / "page.html"
    shown = rayemb("report", folder, "--out", str(page))
    assert "train-b" in shown
    assert "best 0.200 at 20" in shown
    assert "learning_rate" in shown
    assert "<svg" in page.read_text()
    assert len(json.loads(rayemb("report", folder, "--json"))["runs"]) == 3
