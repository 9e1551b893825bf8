"""The image and its install recipe, as far as they can be checked without building."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from rayemb.cluster import ENVIRONMENT


@pytest.fixture(scope="module")
def dockerfile(repo: Path) -> list[str]:
    return (repo / "cluster/Dockerfile").read_text().splitlines()


def _values(lines: list[str], instruction: str) -> list[str]:
    return [line.removeprefix(f"{instruction} ") for line in lines if line.startswith(f"{instruction} ")]


def test_environment_is_that_of_rayemb(dockerfile: list[str]) -> None:
    assert dict(value.split("=", 1) for value in _values(dockerfile, "ENV")) == ENVIRONMENT


def test_base_and_tags_have_the_pinned_versions(dockerfile: list[str], version: str, ray_version: str) -> None:
    text = "\n".join(dockerfile)
    assert set(re.findall(r"rayproject/ray:(\S+?)-py", text)) == {ray_version}
    assert set(re.findall(r"/rayemb:(\S+)-[cg]pu", text)) == {f"{version}-ray{ray_version}"}


def test_copied_files_exist_and_reach_the_build(dockerfile: list[str], repo: Path) -> None:
    sources = [word for value in _values(dockerfile, "COPY") for word in value.split()[1:-1]]
    let_through = (repo / "cluster/Dockerfile.dockerignore").read_text().splitlines()
    assert [source for source in sources if not (repo / source).exists()] == []
    assert [source for source in sources if f"!{source}" not in let_through] == []


@pytest.fixture
def recipe(repo: Path, tmp_path: Path) -> list[str]:
    """The recipe in a small checkout, with a `python` that shows what pip would get."""
    (tmp_path / "tree/rayemb").mkdir(parents=True)
    (tmp_path / "tree/cluster").mkdir()
    for name in ("pyproject.toml", "LICENSE", "constraints.txt", "cluster/install.sh"):
        shutil.copy(repo / name, tmp_path / "tree" / name)
    (tmp_path / "tree/README.md").touch()
    fake = tmp_path / "bin/python"
    fake.parent.mkdir()
    fake.write_text('#!/bin/sh\necho "$@"\nwhile [ "$1" != --constraint ]; do shift; done\ncat "$2"\n')
    fake.chmod(0o755)
    return ["env", f"PATH={fake.parent}:/usr/bin:/bin", "bash", str(tmp_path / "tree/cluster/install.sh")]


def _pins(output: str) -> list[str]:
    return [line for line in output.splitlines()[1:] if "==" in line]


def test_cpu_recipe_uses_the_pins_as_they_are(recipe: list[str], repo: Path) -> None:
    output = subprocess.run([*recipe, "cpu", "boto3"], check=True, capture_output=True, text=True).stdout
    command = output.splitlines()[0]
    assert command.startswith("-m pip install ")
    assert " boto3 " in command
    assert command.endswith("[cpu]")
    assert "/whl/cpu" in command
    assert _pins(output) == [line for line in (repo / "constraints.txt").read_text().splitlines() if "==" in line]


def test_gpu_recipe_takes_the_ordinary_torch(recipe: list[str]) -> None:
    output = subprocess.run([*recipe, "gpu"], check=True, capture_output=True, text=True).stdout
    command, pins = output.splitlines()[0], _pins(output)
    assert command.endswith("[gpu]")
    assert "/whl/cpu" not in command
    assert not any("+" in pin for pin in pins)
    assert any(pin.startswith("torch==") for pin in pins)
    assert any(pin.startswith("faiss-gpu-cu12==") for pin in pins)


@pytest.mark.parametrize("arguments", [[], ["tpu"]])
def test_recipe_refuses_another_flavour(recipe: list[str], arguments: list[str]) -> None:
    done = subprocess.run([*recipe, *arguments], capture_output=True, text=True)
    assert done.returncode == 2
    assert "usage: install.sh cpu|gpu" in done.stderr
