"""Which steps of a recipe are done again: those whose settings, inputs or artefact are no longer what they were."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rayemb.config import from_mapping
from rayemb.errors import RayembError
from rayemb.models import Model, ModelError
from rayemb.pipeline import RunConfig, run_recipe
from tests.models.tiny import tiny_model


def recipe(place: Path, weights: list[float] | None = None) -> RunConfig:
    """Two soups, the second of the first and another model: steps that take no time."""
    models = {name: str(place / name) for name in "abc"}
    steps: list[dict[str, Any]] = [
        {"name": "one", "run": "soup", "soup": {"models": [models["a"], models["b"]], "weights": weights}},
        {"name": "two", "run": "soup", "soup": {"models": [str(place / "run/one/soup"), models["c"]]}},
    ]
    return from_mapping(RunConfig, {"workspace": str(place / "run"), "steps": steps})


@pytest.fixture
def place(ray_cluster: str, tmp_path: Path) -> Path:
    for seed, name in enumerate("abc"):
        tiny_model(seed).save(str(tmp_path / name))
    return tmp_path


def done(config: RunConfig) -> list[str]:
    return [result.record.name for result in run_recipe(config) if not result.there]


def files(place: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in (place / "run").rglob("*") if path.is_file()}


def test_a_step_is_done_again_when_something_of_it_has_changed(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert done(recipe(place)) == ["one", "two"]
    manifest = json.loads((place / "run/recipe.json").read_text())
    one, two = manifest["steps"]
    assert one["digest"] == Model.load(one["uri"]).digest
    assert two["inputs"]["models[0]"] == {"uri": one["uri"], "digest": one["digest"]}
    assert from_mapping(RunConfig, manifest["config"]).steps == recipe(place).steps
    there, said = files(place), capfd.readouterr().out
    assert "rayemb recipe: 2 of 2 steps done now" in said

    assert done(recipe(place)) == []
    assert files(place) == there
    said = capfd.readouterr().out
    assert "1/2 one: Average the models" in said
    assert said.count("already there: uniform mean of 2 of 2 models") == 2
    # It is gone: made again, and the same, so what was made of it still holds.
    shutil.rmtree(place / "run/one")
    assert done(recipe(place)) == ["one"]
    # Somebody else wrote there.
    tiny_model(7).save(str(place / "run/two/soup"))
    assert done(recipe(place)) == ["two"]
    # Other settings, and all that comes of them.
    assert done(recipe(place, weights=[1, 2])) == ["one", "two"]
    # An input that lies outside.
    tiny_model(8).save(str(place / "c"))
    assert done(recipe(place, weights=[1, 2])) == ["two"]
    assert done(recipe(place, weights=[1, 2])) == []


def test_what_was_done_before_a_failure_stays_done(place: Path) -> None:
    config = recipe(place)
    (place / "c/model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors is missing"):
        run_recipe(config)
    assert [row["name"] for row in json.loads((place / "run/recipe.json").read_text())["steps"]] == ["one"]
    tiny_model(2).save(str(place / "c"))
    assert done(config) == ["two"]


def test_what_is_no_manifest_of_a_recipe_is_left_alone(tmp_path: Path) -> None:
    config = recipe(tmp_path)
    (tmp_path / "run").mkdir()
    file = tmp_path / "run/recipe.json"
    for text in ("[]", '{"format": 2, "steps": []}', '{"format": 1, "steps": [{"name": "a"}]}'):
        file.write_text(text)
        with pytest.raises(RayembError, match=r"recipe\.json: not a recipe's manifest of format 1"):
            run_recipe(config)
        assert file.read_text() == text
