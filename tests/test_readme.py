"""What README.md shows runs."""

import re
from pathlib import Path

import pytest
import yaml

from rayemb.config import from_mapping
from rayemb.pipeline import RunConfig
from rayemb.pipeline.plan import plan

TEXT = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("code", blocks("python"))
def test_python_runs(code: str) -> None:
    names: dict[str, object] = {}
    exec(code, names)
    assert names["queries"].grad is not None  # type: ignore[attr-defined]


@pytest.mark.parametrize("text", blocks("yaml"))
def test_configs_are_configs(text: str) -> None:
    config = from_mapping(RunConfig, yaml.safe_load(text))
    assert not config.steps or plan(config)


def test_there_is_something_to_run() -> None:
    assert blocks("python")
    assert blocks("yaml")
