"""Every step is a verb: its settings are listed, its own keys go to the step and the others to the run."""

from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from rayemb.cli import app, read_config
from rayemb.config import ConfigError
from rayemb.curate import Leakage, Length
from rayemb.pipeline.curation import step_help, step_overrides, steps
from rayemb.pipeline.methods import methods


@pytest.mark.parametrize("name", sorted(steps()))
def test_help_lists_every_setting_with_its_description(name: str) -> None:
    answer = CliRunner().invoke(app, ["curate", name, "--help"], terminal_width=100, env={"COLUMNS": "100"})
    assert answer.exit_code == 0, answer.output
    words = " ".join(answer.output.split())
    for key, field in steps()[name].model_fields.items():
        assert key == "name" or f"{key} (" in words, key
        assert key == "name" or field.description, key
    assert step_help(steps()[name]).split()[0] in words


def test_the_group_names_every_step_and_the_config_runs_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = CliRunner().invoke(app, ["curate", "--help"]).output
    assert all(name in listed for name in steps())
    ran: list[tuple[str, list[str] | None]] = []
    monkeypatch.setattr("rayemb.cli._stage", lambda stage, args: ran.append((stage, args)))
    CliRunner().invoke(app, ["curate", "run.yaml", "workspace=here"], catch_exceptions=False)
    CliRunner().invoke(app, ["curate", "workspace=here"], catch_exceptions=False)
    CliRunner().invoke(app, ["curate", "length", "min_words=2"], catch_exceptions=False)
    assert ran == [
        ("curate", ["run.yaml", "workspace=here"]),
        ("curate", ["workspace=here"]),
        ("curate", ['curate.steps=[{"name": "length", "min_words": 2}]']),
    ]


def config(step: Any, *args: str) -> Any:
    return read_config(step_overrides(step, args))


def test_settings_find_their_place() -> None:
    made = config(Length, "min_words=2", "max_words=null", "splits=[train, val]", "curate.seed=7", "workspace=/w")
    assert made.curate.steps == [Length(min_words=2, max_words=None, splits=["train", "val"])]
    assert (made.curate.seed, made.uri("curated")) == (7, "/w/curated")
    made = config(Leakage, "against=[{split: val}]", "near_images.radius=3", "near_images.method=phash")
    (step,) = made.curate.steps
    assert (step.against[0].split, step.near_images.radius, step.near_images.method) == ("val", 3, "phash")


@pytest.mark.parametrize(
    ("step", "args", "said"),
    [
        (Length, ["min_words=lots"], "curate.steps.0.min_words"),
        (Length, ["min_words={"], "min_words: the value is not valid YAML"),
        (Length, ["min_word=3"], "min_word"),
        (Leakage, [], "curate.steps.0.against: Field required"),
        (Leakage, ["near_images=3", "near_images.radius=3"], "near_images has a value already"),
    ],
)
def test_a_mistake_is_named_by_its_key(step: Any, args: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config(step, *args)


def test_methods_lists_every_step() -> None:
    found = {method.name: method for method in methods() if method.family == "curation"}
    assert set(found) == set(steps())
    assert found["leakage"].card == found["length"].card == "S101"
    assert found["near_duplicate_texts"].test == "tests/curate/test_near_duplicate_texts.py"
    assert yaml.safe_load(step_overrides(Length, [])[0].partition("=")[2]) == [{"name": "length"}]
