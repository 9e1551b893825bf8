"""What README.md shows runs."""

import re
from pathlib import Path

import pytest
import yaml

from rayemb.config import from_mapping
from rayemb.train import TrainConfig

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
    from_mapping(TrainConfig, yaml.safe_load(text)["train"])


def test_there_is_something_to_run() -> None:
    assert blocks("python")
    assert blocks("yaml")
