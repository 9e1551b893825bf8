"""What labelled queries must show: the measures of retrieval on the versions' own answers, before a switch."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from rayemb.cli import app
from rayemb.config import ConfigError, from_mapping
from rayemb.evaluate.errors import EvaluateError
from rayemb.models import Model
from rayemb.serve.config import ServeConfig
from rayemb.serve.versions import CatalogError, CatalogStore, changes
from rayemb.serve.versions.catalog import GateConfig
from rayemb.serve.versions.gate import read_labels
from rayemb.serve.versions.opening import Opener
from rayemb.serve.versions.requirements import requirements, values_of
from tests.serve.versions.conftest import TEXTS, Versioned

QUERIES = [f"{text} {i}" for i, text in enumerate(TEXTS)]


def found_by(versioned: Versioned, name: str, of: str) -> list[list[str]]:
    """The ids of version `of` in the order in which the model of version `name` finds them, by brute force."""
    model, table_model = Model.load(versioned.models[name]), Model.load(versioned.models[of])
    table = table_model.embed_texts([f"{TEXTS[i % len(TEXTS)]} {i}" for i in range(60)])
    order = np.argsort(-(model.embed_texts(QUERIES, kind="query") @ table.T), axis=1, kind="stable")
    return [[f"{of}-{i}" for i in row] for row in order]


@pytest.fixture
def labelled(store: CatalogStore, versioned: Versioned, tmp_path: Path) -> CatalogStore:
    """`a` is live; `c` is of the same model, `b` of another. Right are, of each, its first and its fourth answer."""
    ranked = {name: found_by(versioned, name, name) for name in "abc"}
    right = [[ranked[name][q][at] for name in "ac" for at in (0, 3)] for q in range(len(QUERIES))]
    lines = [json.dumps({"text": text, "relevant": ids}) for text, ids in zip(QUERIES, right, strict=True)]
    (tmp_path / "labels.jsonl").write_text("\n".join(lines))
    for name in "abc":
        labels = str(tmp_path / "labels.jsonl") if name != "a" else None
        changes.add(store, "default", versioned.models[name], versioned.indexes[name], name=name, labels=labels)
    changes.promote(store, "default", "a")
    return store


def test_measures_are_those_of_the_ranked_lists(labelled: CatalogStore, tmp_path: Path) -> None:
    engine = Opener(ServeConfig()).open(labelled.read().collections["default"].versions["a"])
    queries = read_labels(str(tmp_path / "labels.jsonl"))
    names = ["recall@1", "recall@5", "success@5", "precision@5", "mrr@5", "map@5", "ndcg@5"]
    found = values_of(engine, queries, names)
    engine.close()
    # Of four right ones two are in the index, at ranks 1 and 4.
    ideal = sum(1 / np.log2(place + 1) for place in range(1, 5))
    expected = [1 / 4, 2 / 4, 1, 2 / 5, 1, (1 + 2 / 4) / 4, (1 + 1 / np.log2(5)) / ideal]
    for name, value in zip(names, expected, strict=True):
        assert found[name].shape == (len(QUERIES),)
        np.testing.assert_allclose(found[name], value, atol=1e-9, err_msg=name)


def test_a_version_goes_live_by_what_it_shows(labelled: CatalogStore) -> None:
    gate = GateConfig(require=("recall@5>=0.5", "ndcg@5>0.9", "low(gain(mrr@5))>=0"))
    with pytest.raises(CatalogError, match=r"ndcg@5>0\.9: ndcg@5 is 0\.559, 0\.341 off") as error:
        changes.promote(labelled, "default", "c", gate)
    assert "recall@5" not in str(error.value)
    changes.promote(labelled, "default", "c", GateConfig(require=gate.require[::2]))
    collection = labelled.read().collections["default"]
    assert collection.live == "c"
    figures = collection.history[-1].figures
    assert figures["labelled recall@5"] == figures["live labelled recall@5"] == 0.5
    assert figures["gain of mrr@5"] == figures["gain of mrr@5 low"] == 0
    assert figures["labelled recall@5 low"] == figures["labelled recall@5 high"] == 0.5
    # What the gate says of any hit, as before.
    assert figures["labelled@10"] == figures["live labelled@10"] == 1


def test_a_worse_version_does_not_and_is_forced_with_the_reason(labelled: CatalogStore) -> None:
    gate = GateConfig(margin=1, require=("gain(ndcg@10)>=0",))
    with pytest.raises(CatalogError, match=r"gain\(ndcg@10\)>=0: gain of ndcg@10 is -0\."):
        changes.promote(labelled, "default", "b", gate)
    assert labelled.read().collections["default"].live == "a"
    changes.promote(labelled, "default", "b", gate, force=True)
    event = labelled.read().collections["default"].history[-1]
    assert "gain(ndcg@10)>=0" in str(event.forced)
    assert event.figures["labelled ndcg@10"] == 0


def test_the_first_version_has_nothing_to_gain_on_but_figures_to_show(
    store: CatalogStore, versioned: Versioned, tmp_path: Path
) -> None:
    labels = tmp_path / "one.jsonl"
    labels.write_text(json.dumps({"text": QUERIES[0], "relevant": [found_by(versioned, "a", "a")[0][0]]}))
    changes.add(store, "default", versioned.models["a"], versioned.indexes["a"], name="a", labels=str(labels))
    with pytest.raises(CatalogError, match=r"low\(mrr@1\)>=0: mrr@1 has no interval"):
        changes.promote(store, "default", "a", GateConfig(require=("low(mrr@1)>=0",)))
    changes.promote(store, "default", "a", GateConfig(require=("gain(mrr@1)>0", "mrr@1>=1")))
    figures = store.read().collections["default"].history[-1].figures
    assert figures["labelled mrr@1"] == 1
    assert not [name for name in figures if "gain" in name]


def test_a_version_without_labelled_queries_shows_nothing(store: CatalogStore, versioned: Versioned) -> None:
    versioned.fill(store, "default", "a")
    with pytest.raises(CatalogError, match=r"no labelled queries to show mrr@10>0 on"):
        changes.promote(store, "default", "a", GateConfig(require=("mrr@10>0",)))
    changes.promote(store, "default", "a")


@pytest.mark.parametrize(
    "text", ["recall>=0.5", "recall@0>0", "recall@1001>0", "hole@10<1", "a/recall@10>0", "x", "mrr@²>0"]
)
def test_what_cannot_be_required_is_refused_with_the_config(
    text: str, versioned: Versioned, store: CatalogStore, tmp_path: Path
) -> None:
    with pytest.raises(EvaluateError):
        requirements([text])
    with pytest.raises(ConfigError) as error:
        from_mapping(ServeConfig, {"gate": {"require": ["mrr@10>0", text]}})
    assert error.value.problems[0][0] == "gate.require"
    assert text in error.value.problems[0][1]
    versioned.fill(store, "default", "a")
    words = ["collection", "promote", "default", "a", "--catalog", store.uri]
    answer = CliRunner().invoke(app, [*words, "--require", text])
    assert isinstance(answer.exception, ConfigError)
    assert store.read().collections["default"].live is None
    assert CliRunner().invoke(app, words).exit_code == 0
