"""The command line: help that answers, errors in three parts and exit code 2, configs resolved before Ray starts."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jsonschema
import pytest
import yaml
from rich.console import Console

from rayemb import cli
from rayemb.config import load
from rayemb.pipeline.config import RunConfig
from tests.imports import loaded

ROOT = Path(__file__).parents[1]


class Answer(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def rayemb(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """The entry point of the console script, in this process: a new one would import for seconds each time."""

    def run(*arguments: str) -> Answer:
        monkeypatch.setattr(sys, "argv", ["rayemb", *arguments])
        monkeypatch.setattr(cli, "errors", Console(stderr=True, highlight=False, soft_wrap=True, width=200))
        try:
            cli.main()
            code: object = 0
        except SystemExit as ended:
            code = ended.code
        assert isinstance(code, int | None)
        return Answer(code or 0, *capfd.readouterr())

    return run


Run = Callable[..., Answer]


def test_the_installed_command_runs() -> None:
    command = [Path(sys.executable).with_name("rayemb"), "version"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(answer.stdout)["rayemb"]


@pytest.mark.parametrize("words", [[], ["data"], ["index"], ["train"], ["search"], ["config"]], ids=" ".join)
def test_help_answers(rayemb: Run, words: list[str]) -> None:
    answer = rayemb(*words, "--help")
    assert answer.returncode == 0
    assert "Usage" in answer.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", "train.stepz=3"], ["train.stepz", "did you mean 'steps'"]),
        (["train", "train.batch_size=1"], ["batch_size (1) is less than a row for each of 2 workers"]),
        (["train", "missing.yaml"], ["missing.yaml", "cannot read the config"]),
        (["index", "build", "index.factory=IFV16,Flat"], ["index.factory"]),
        (["embed", "embed.batch_size=lots"], ["embed.batch_size", "'lots'"]),
        (["tune", "tune.search={loss.margin: 'gauss(0,1)'}"], ["tune.search", "gauss"]),
        (["search"], ["nothing to look for"]),
        (["search", "x", "--url", "http://127.0.0.1:9"], ["127.0.0.1:9"]),
        (["search", "x", "--image", "nowhere.png"], ["nowhere.png"]),
        (["data", "inspect", "workspace=/nowhere"], ["corpus.json", "rayemb data build"]),
        (["train", "workspace=ftp://host/x"], ["workspace", "ftp"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_named_before_any_cluster_starts(rayemb: Run, arguments: list[str], words: list[str]) -> None:
    answer = rayemb(*arguments)
    assert answer.returncode == 2, answer
    assert "Traceback" not in answer.stderr
    for word in words:
        assert word in answer.stderr.replace("\n", " ")


def test_show_prints_a_config_that_loads_again(rayemb: Run, tmp_path: Path) -> None:
    answer = rayemb("config", "show", str(ROOT / "jobs/configs/demo.yaml"), "train.steps=7", f"workspace={tmp_path}")
    shown = yaml.safe_load(answer.stdout)
    assert shown["train"]["steps"] == 7
    again = tmp_path / "again.yaml"
    again.write_text(answer.stdout)
    assert load(RunConfig, again).train.steps == 7


def test_the_schema_accepts_the_shipped_configs(rayemb: Run) -> None:
    schema = json.loads(rayemb("config", "schema").stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    for path in sorted((ROOT / "jobs/configs").glob("*.yaml")):
        jsonschema.validate(yaml.safe_load(path.read_text()), schema)


def test_every_method_has_its_source_and_its_test(rayemb: Run) -> None:
    found = json.loads(rayemb("methods", "--json").stdout)
    assert {"infonce", "siglip", "gist_embed", "matryoshka"} <= {method["name"] for method in found}
    for method in found:
        assert method["summary"]
        assert re.search(r"\d{4}", method["source"]), method
        assert (ROOT / method["test"]).exists(), method
    assert {method["card"] for method in found if method["card"]} >= {"S188", "S106", "S003", "S130", "S095"}
    assert "gist_embed" in rayemb("methods").stdout


def test_a_command_loads_what_it_needs_and_no_more() -> None:
    # Each of them takes from a quarter of a second to several, before the first word of help.
    heavy = [
        "hpbandster",
        "statsmodels",
        "scipy.stats",
        "sklearn",
        "transformers",
        "deepspeed",
        "mlflow",
        "matplotlib",
        "umap",
        "mteb",
    ]
    assert loaded("import rayemb.cli", heavy) == []
