"""Recipes as they are planned: what each step reads and is set by, and every mistake with its key."""

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayemb.config import ConfigError, from_mapping, load
from rayemb.losses import InfoNCEConfig, SigLIPConfig
from rayemb.pipeline import RunConfig
from rayemb.pipeline.plan import merged, plan, problems_of
from tests.test_cli import Run, rayemb  # noqa: F401

ROOT = Path(__file__).parents[2]
RECIPE: dict[str, Any] = {
    "workspace": "/runs/r",
    "train": {"batch_size": 32, "model": {"dim": 64}, "loss": {"name": "infonce", "temperature": 0.1}},
    "steps": [
        {"name": "corpus", "run": "corpus"},
        {"name": "pre", "run": "train"},
        {"name": "embed", "run": "embed"},
        {"name": "index", "run": "index"},
        {"name": "mine", "run": "mine"},
        {"name": "a", "run": "train", "init": "pre", "train": {"seed": 1, "loss": {"temperature": 0.2}}},
        {"name": "b", "run": "train", "init": "pre", "train": {"seed": 2, "loss": {"name": "siglip"}}},
        {"name": "soup", "run": "soup", "models": ["a", "b"]},
        {"name": "old", "run": "evaluate", "reads": {"model": "pre", "corpus": "corpus"}},
        {"name": "new", "run": "evaluate"},
    ],
}


def recipe(*changes: tuple[int, dict[str, Any]], **more: Any) -> RunConfig:
    """The recipe with keys of some steps changed."""
    data = {**copy.deepcopy(RECIPE), **more}
    for number, change in changes:
        data["steps"][number].update(change)
    return from_mapping(RunConfig, data)


def problems(config: RunConfig) -> dict[str, str]:
    with pytest.raises(ConfigError) as caught:
        plan(config)
    assert all(key in str(caught.value) for key, _ in caught.value.problems)
    return dict(caught.value.problems)


def test_each_step_reads_the_last_artefact_of_its_kind_or_the_one_that_is_named() -> None:
    inputs = {step.name: {label: uri for label, (_, uri) in step.inputs.items()} for step in plan(recipe())}
    assert inputs == {
        "corpus": {},
        "pre": {"corpus": "/runs/r/corpus/corpus"},
        "embed": {"corpus": "/runs/r/corpus/corpus", "model": "/runs/r/pre/model"},
        "index": {"embeddings": "/runs/r/embed/embeddings.lance", "model": "/runs/r/pre/model"},
        "mine": {
            "corpus": "/runs/r/corpus/corpus",
            "model": "/runs/r/pre/model",
            "index": "/runs/r/index/index",
        },
        "a": {"corpus": "/runs/r/mine/mined", "init": "/runs/r/pre/model"},
        "b": {"corpus": "/runs/r/mine/mined", "init": "/runs/r/pre/model"},
        "soup": {"models[0]": "/runs/r/a/model", "models[1]": "/runs/r/b/model"},
        "old": {"corpus": "/runs/r/corpus/corpus", "model": "/runs/r/pre/model"},
        "new": {"corpus": "/runs/r/mine/mined", "model": "/runs/r/soup/soup"},
    }


def test_each_step_has_the_settings_of_all_and_its_own() -> None:
    steps = {step.name: step.config for step in plan(recipe())}
    assert steps["pre"].train.model.dim == 64
    assert {step.train.batch_size for step in steps.values()} == {32}
    assert [steps[name].train.seed for name in ("pre", "a", "b")] == [0, 1, 2]
    # A start brings its own towers.
    assert steps["a"].train.model.dim == 128
    assert steps["a"].train.init == "/runs/r/pre/model"
    assert isinstance(steps["a"].train.loss, InfoNCEConfig)
    assert steps["a"].train.loss.temperature == 0.2
    assert isinstance(steps["b"].train.loss, SigLIPConfig)
    assert steps["b"].uri("runs") == "/runs/r/b/runs"
    assert steps["mine"].uri("mined") == "/runs/r/mine/mined"


def test_what_lies_outside_of_the_recipe_can_be_read() -> None:
    own = [{"name": "tune", "run": "train"}, {"name": "check", "run": "verify", "reads": {}}]
    config = recipe(steps=own, artefacts={"corpus": "s3://b/corpus", "index": "s3://b/index"})
    tune, check = plan(config)
    assert tune.inputs == {"corpus": ("corpus", "s3://b/corpus")}
    assert check.inputs == {"index": ("index", "s3://b/index")}
    assert check.config.uri("index") == "s3://b/index"
    outside = {"init": "s3://b/minilm", "corpora": {"main": {"uri": "s3://b/pairs"}}}
    (step,) = plan(recipe(steps=[{"name": "tune", "run": "train", "train": outside}]))
    assert step.inputs == {"corpora.main": ("corpus", "s3://b/pairs"), "init": ("model", "s3://b/minilm")}


def test_credentials_reach_the_steps_and_no_dump() -> None:
    config = recipe(storage={"access_key": "me", "secret_key": "mine"}, cluster={"num_cpus": 3})
    for step in plan(config):
        assert step.config.storage.environment()["AWS_SECRET_ACCESS_KEY"] == "mine"
        assert step.config.cluster.num_cpus == 3


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            [(5, {"train": {"loss": {"temprature": 1}}})],
            {"steps[5].train.loss.temprature": "did you mean 'temperature'"},
        ),
        ([(5, {"train": {"steps": 0}})], {"steps[5].train.steps": "greater than or equal to 1"}),
        ([(5, {"train": {"model": {"dim": 3}}})], {"steps[5].train": "train.init brings its own towers"}),
        ([(1, {"run": "trian"})], {"steps[1].run": "unknown stage 'trian'; did you mean 'train'?"}),
        ([(8, {"name": "new"})], {"steps[9].name": "'new' is the name of steps[8] already"}),
        ([(5, {"init": "per"})], {"steps[5].init": "unknown step 'per'; did you mean 'pre'?"}),
        ([(5, {"init": "b"})], {"steps[5].init": "step 'b' comes later"}),
        ([(5, {"init": "mine"})], {"steps[5].init": "step 'mine' makes no model"}),
        (
            [(5, {"init": None, "train": {"init": "x", "model": {"dim": 3}}})],
            {"steps[5].train": "brings its own towers"},
        ),
        ([(2, {"init": "pre"})], {"steps[2].init": "only the stage train has it, and this is embed"}),
        ([(5, {"train": {"init": "x"}})], {"steps[5].init": "give this or train.init, not both"}),
        ([(7, {"models": ["a"]})], {"steps[7].models": "two models or more"}),
        ([(7, {"models": ["a", "c"]})], {"steps[7].models[1]": "unknown step 'c'"}),
        ([(7, {"models": ["a", "a"]})], {"steps[7].soup": "/runs/r/a/model is there twice"}),
        ([(7, {"models": None})], {"steps[7].models": "name the steps"}),
        ([(7, {"soup": {"weights": [1, 2, 3]}})], {"steps[7].soup": "there are 3 of them and 2 models"}),
        (
            [(7, {"soup": {"method": "greedy", "metric": "test/recall@1"}})],
            {"steps[7]": "soup.metric: 'test/recall@1' is not measured"},
        ),
        ([(3, {"train": {"steps": 3}})], {"steps[3].train": "the stage index is set by index"}),
        ([(9, {"reads": {"index": "index"}})], {"steps[9].reads.index": "evaluate reads corpus and model"}),
        ([(9, {"reads": {"model": "embed"}})], {"steps[9].reads.model": "step 'embed' makes no model"}),
        (
            [(1, {"run": "evaluate"})],
            {
                "steps[1]": "no step before it made what it reads: model (or give artefacts.model)",
                "steps[2]": "no step before it made what it reads: model",
                "steps[3]": "no step before it made what it reads: model",
                "steps[4]": "no step before it made what it reads: model",
                "steps[5].init": "step 'pre' makes no model",
                "steps[6].init": "step 'pre' makes no model",
                "steps[8].reads.model": "step 'pre' makes no model",
            },
        ),
    ],
)
def test_a_mistake_is_said_with_its_key(changes: list[Any], expected: dict[str, str]) -> None:
    found = problems(recipe(*changes))
    assert found.keys() == expected.keys()
    for key, text in expected.items():
        assert text in found[key]


def test_all_mistakes_are_said_at_once_and_one_causes_no_others() -> None:
    found = problems(recipe((1, {"run": "trian"}), (6, {"train": {"sed": 3}}), artefacts={"mined": "/x"}))
    # What reads the model of the step that is wrong is not wrong for it.
    assert found.keys() == {"artefacts.mined", "steps[1].run", "steps[6].train.sed"}


def test_keys_of_the_steps_themselves_are_written_alike() -> None:
    for change, key in (({"nam": 1}, "steps[3].nam"), ({"name": "a/b"}, "steps[3].name")):
        with pytest.raises(ConfigError) as caught:
            recipe((3, change))
        assert [found for found, _ in problems_of(caught.value).problems] == [key]


def test_there_must_be_steps() -> None:
    with pytest.raises(ConfigError, match="steps: there are no steps"):
        plan(recipe(steps=[]))


def test_the_command_says_it_before_a_cluster_starts(rayemb: Run, tmp_path: Path) -> None:  # noqa: F811
    file = tmp_path / "recipe.yaml"
    typo = {"name": "a", "run": "train", "train": {"loss": {"temprature": 1}}}
    for steps, said in (
        ([{"name": "corpus", "run": "corpus"}, typo], "recipe: steps[1].train.loss.temprature: unknown key"),
        ([{"name": "corpus", "stage": "corpus"}], "steps[0].stage: unknown key"),
        ([], "steps: there are no steps"),
    ):
        file.write_text(yaml.safe_dump({"workspace": str(tmp_path / "run"), "steps": steps}))
        answer = rayemb("recipe", str(file))
        assert (answer.returncode, answer.stdout) == (2, "")
        assert said in answer.stderr
    assert not (tmp_path / "run").exists()


def test_merging_leaves_the_settings_of_all_steps_alone() -> None:
    base = {"loss": {"name": "infonce", "temperature": 0.1}, "steps": 3, "corpora": {"main": {"weight": 1}}}
    before = copy.deepcopy(base)
    found = merged(base, {"loss": {"name": "infonce", "margin": 0.1}, "corpora": {"main": {"split": "x"}, "b": {}}})
    assert found == {
        "loss": {"name": "infonce", "temperature": 0.1, "margin": 0.1},
        "steps": 3,
        "corpora": {"main": {"weight": 1, "split": "x"}, "b": {}},
    }
    assert merged(base, {"loss": {"name": "siglip"}})["loss"] == {"name": "siglip"}
    assert merged(base, {"corpora": None})["corpora"] is None
    assert base == before


def test_the_shipped_recipe_can_be_planned() -> None:
    config = load(RunConfig, ROOT / "jobs/configs/recipe.yaml")
    stages = [step.run for step in plan(config)]
    assert stages[:5] == ["corpus", "train", "embed", "index", "mine"]
    assert {"soup", "evaluate"} <= set(stages)
    # What is dumped is the same recipe again.
    again = from_mapping(RunConfig, yaml.safe_load(yaml.safe_dump(config.model_dump(mode="json"))))
    assert again.steps == config.steps
