import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from typer.testing import CliRunner

from rayemb.cli import app
from rayemb.config import load
from rayemb.data.embeddings import EmbeddingsTable
from rayemb.index import IndexArtefactError, IndexConfig, Plan, PlanConfig, build_index, plan_index
from rayemb.index.faiss_index import make_index, serialise
from rayemb.index.plan import factories, lists_for
from rayemb.pipeline import RunConfig
from rayemb.pipeline.index_plan import settings, show_plan

from .tables import random_vectors, write_table

ROWS, DIM = 3000, 16
SMALL = PlanConfig(sample_rows=1500, recall=0.9)
AUTO = IndexConfig(factory="auto", plan=SMALL)


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    centres = random_vectors(100, DIM, seed=1)
    vectors = np.repeat(centres, ROWS // 100, axis=0) + 0.5 * random_vectors(ROWS, DIM)
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    return write_table(tmp_path_factory.mktemp("plan") / "embeddings.lance", vectors)


@pytest.fixture(scope="module")
def plan(uri: str) -> Plan:
    return plan_index(EmbeddingsTable.open(uri), AUTO)


def test_the_choice_reaches_what_is_asked_and_says_why(plan: Plan) -> None:
    able = [each for each in plan.candidates if not each.lacks]
    assert plan.chosen in able
    assert plan.chosen.recall >= 0.9
    assert plan.chosen.ms <= 1.25 * min(each.ms for each in able)
    assert plan.reason.endswith("recall@10 0.9")
    for each in plan.candidates:
        assert ("recall" in each.lacks) == (each.recall < 0.9)


def test_predicted_bytes_are_those_of_the_file(uri: str, plan: Plan) -> None:
    vectors = EmbeddingsTable.open(uri).vectors(0, ROWS)
    two = AUTO.shards
    for each in plan.candidates:
        index = make_index(DIM, each.factory)
        index.train(vectors)
        empty = len(serialise(index))
        index.add(vectors)
        # Each shard has the quantiser. Levels of a graph are drawn by lot; fast scan fills lists up to 32 rows.
        size = len(serialise(index)) + (two - 1) * empty
        assert each.total_mb * 1e6 == pytest.approx(size, rel=0.05), each.factory


def test_exact_types_are_measured_as_exact(plan: Plan) -> None:
    by_name = {each.factory: each for each in plan.candidates}
    assert by_name["Flat"].recall == 1.0
    assert by_name["Flat"].bytes_per_vector == 4 * DIM
    assert by_name["SQ8"].bytes_per_vector == DIM
    assert by_name["SQfp16"].recall > 0.98
    assert (plan.rows, plan.dim, plan.measured_rows) == (ROWS, DIM, 1500)


def test_limits_exclude_and_say_by_what(uri: str) -> None:
    table = EmbeddingsTable.open(uri)
    tight = AUTO.model_copy(update={"plan": SMALL.model_copy(update={"memory_mb": 0.13, "recall": 0.5})})
    found = plan_index(table, tight)
    assert found.chosen.memory_mb <= 0.13
    assert found.reason.endswith("recall@10 0.5 within 0.13 MB")
    lacks = {each.factory: each.lacks for each in found.candidates}
    assert lacks["Flat"].startswith("0.192")
    assert lacks["Flat"].endswith("of 0.13 MB")
    assert lacks["SQ8"] == ""
    refined = next(each for each in found.candidates if each.factory.startswith("PQ8x4fs,Refine"))
    assert refined.total_mb - refined.memory_mb == pytest.approx(ROWS * 2 * DIM / 1e6)
    impossible = AUTO.model_copy(update={"plan": SMALL.model_copy(update={"memory_mb": 0.001})})
    with pytest.raises(IndexArtefactError, match=r"no type reaches recall@10 0\.9 within .* MB"):
        plan_index(table, impossible)


def test_by_cell_only_types_with_lists_are_considered() -> None:
    assert all(name.startswith("IVF") for name in factories(64, by_cell=True))
    assert "Flat" in factories(64, by_cell=False)
    for dim in (16, 17, 384, 768):
        for name in factories(dim, by_cell=False):
            make_index(dim, name.replace("{lists}", "4"))


@pytest.mark.parametrize("rows", [1, 50, 1000, 10_000, 1_000_000, 100_000_000])
def test_lists_are_a_power_of_two_that_the_rows_can_train(rows: int) -> None:
    lists = lists_for(rows)
    assert math.log2(lists).is_integer()
    assert lists <= max(1, min(4 * math.sqrt(rows), rows / 39)) < 2 * lists


def test_a_small_table_is_not_planned_for(tmp_path: Path) -> None:
    table = EmbeddingsTable.open(write_table(tmp_path / "e", random_vectors(500)))
    with pytest.raises(IndexArtefactError, match="500 rows are too few"):
        plan_index(table, AUTO)


def test_the_chosen_settings_are_config(plan: Plan) -> None:
    chosen = replace(plan.chosen, factory="IVF512,SQ8")
    built = replace(plan, chosen=chosen).settings(AUTO)
    assert (built.factory, built.nprobe) == ("IVF512,SQ8", chosen.effort.nprobe)
    assert built.train_rows == 50_000
    assert replace(plan, chosen=replace(chosen, factory="IVF4096,SQ8")).settings(AUTO).train_rows == 39 * 4096
    assert load(IndexConfig, overrides=[f"{key}={value!r}" for key, value in settings(chosen).items()])


def test_the_command_prints_candidates_choice_and_settings(uri: str) -> None:
    console = Console(record=True, width=200)
    overrides = [f"artefacts.embeddings={uri}", "index.plan.sample_rows=1000", "index.plan.recall=0.8"]
    found = show_plan(load(RunConfig, None, overrides), console)
    text = console.export_text()
    assert f"{ROWS:,} rows of {DIM} dimensions, measured on 1,000" in text
    assert all(each.factory in text for each in found.candidates)
    assert found.reason in text
    assert f"index:\n  factory: {found.chosen.factory}\n" in text


def test_auto_is_resolved_when_the_index_is_built(ray_cluster: str, uri: str, tmp_path: Path) -> None:
    lines: list[str] = []
    manifest = build_index(uri, str(tmp_path / "i"), AUTO, progress=lines.append)
    assert f"planned: {manifest.factory}" in lines
    assert manifest.recall is not None
    assert manifest.recall.recall >= 0.9
    # The effort is the cheapest of the real index, not of the sample.
    assert manifest.effort == manifest.chosen_effort(None, 0.9)


def test_the_command_gives_json(uri: str) -> None:
    overrides = [f"artefacts.embeddings={uri}", "index.plan.sample_rows=1000", "index.by=cell"]
    answer = CliRunner().invoke(app, ["index", "plan", "--json", *overrides])
    assert answer.exit_code == 0
    document = json.loads(answer.stdout)
    assert document["rows"] == ROWS
    assert document["chosen"] in document["candidates"]
    assert {each["factory"][:3] for each in document["candidates"]} == {"IVF"}
