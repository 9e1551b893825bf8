"""`rayemb evaluate --suite` on a real cluster: a directory, a service and an index; spread or not, the same figures."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml

from rayemb import cli
from rayemb.config import load
from rayemb.evaluate.encoders import ModelEncoder, SpreadEncoder, model_directory
from rayemb.evaluate.errors import EvaluateError
from rayemb.evaluate.report import read_report
from rayemb.index import IndexConfig, build_index
from rayemb.models import Model
from rayemb.pipeline import RunConfig, run_stage
from rayemb.pipeline.evaluation import open_index, read_suite
from rayemb.serve import ServeConfig, ServeError
from rayemb.serve.asgi import create_app
from rayemb.serve.client import EndpointEncoder
from rayemb.serve.local import LocalEngine
from tests.evaluate.tasks.conftest import minilm  # noqa: F401
from tests.evaluate.test_exact import table, unit
from tests.serve.conftest import World, make_world, tiny_model
from tests.serve.live import listening

SUITE = Path(__file__).parents[2] / "jobs/configs/suites/demo.yaml"


@pytest.fixture(scope="module")
def workspace(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A corpus of the demo's drawings, and a model that was never trained."""
    folder = str(tmp_path_factory.mktemp("suite"))
    config = load(
        RunConfig, None, [f"workspace={folder}", "corpus.source.limit=1500", "corpus.source.rows_per_unit=256"]
    )
    run_stage("corpus", config)
    tiny_model(["red heart", "a dog", "a cat"], 0).save(config.uri("model"))
    return folder


@pytest.fixture(scope="module")
def suite(workspace: str) -> str:
    """The shipped suite over that workspace."""
    text = SUITE.read_text().replace("rayemb-demo", workspace)
    document = yaml.safe_load(text) | {"map": "pca", "samples": 100}
    path = Path(workspace, "suite.yaml")
    path.write_text(yaml.safe_dump(document))
    return str(path)


def evaluate(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["rayemb", "evaluate", *arguments])
    try:
        cli.main()
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_the_shipped_suite_end_to_end(
    suite: str, workspace: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    junit = Path(workspace, "junit.xml")
    asked = ["--require", "find_images/recall@10>=0", "--require", "find_images/mrr>2", "--junit", str(junit)]
    asked += ["--require", "find_images/rankme>1"]
    assert evaluate(monkeypatch, "--suite", suite, "workers=2", *asked) == 1
    told = capfd.readouterr()
    assert "find_images/mrr>2" in told.err
    assert "passed  find_images/rankme>1: " in told.out
    assert 'failures="1"' in junit.read_text()
    report = read_report(f"{workspace}/suite")
    kinds = {
        "find_images",
        "find_captions",
        "name_the_concept",
        "group_by_concept",
        "tell_the_style",
        "style_from_five",
    }
    assert {part.split for part in report.results} == kinds
    for part in report.results:
        (way,) = part.directions
        # The model was never trained: what its training would have begun with is the model itself.
        assert [system.system for system in way.systems] == ["model", "untrained"]
        assert way.difference is not None
        assert all(each.value == 0 for each in way.difference.metrics.values()), part.split
    assert not Path(workspace, "suite/.untrained").exists()
    page = Path(workspace, "suite/index.html").read_text()
    assert "data:image/webp" in page

    # In one process: the same figures. Written elsewhere, so that nothing is taken from before.
    assert evaluate(monkeypatch, "--suite", suite, "--out", f"{workspace}/again", "workers=0") == 0
    again = read_report(f"{workspace}/again")
    for one, other in zip(report.results, again.results, strict=True):
        for metric, estimate in one.directions[0].systems[0].metrics.items():
            assert other.directions[0].systems[0].metrics[metric].value == pytest.approx(estimate.value, abs=1e-9)


def test_what_is_wrong_is_told_before_the_work(
    suite: str, workspace: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(monkeypatch, "--suite", suite, "--model", "/nowhere", "--require", "recal@10>=0.5") == 2
    told = capfd.readouterr().err
    assert "no evaluation here yields 'recal@10'" in told
    assert "find_images/recall@10" in told or "recall@10" in told
    assert evaluate(monkeypatch, "--suite", suite, "--model", "/nowhere", "--require", "low(rankme)>1") == 2
    assert "'rankme' has neither an interval nor a gain" in capfd.readouterr().err
    assert evaluate(monkeypatch, "--suite", suite, "tasks.find_images.split=nope") == 2
    assert "there is no split 'nope'" in capfd.readouterr().err
    assert evaluate(monkeypatch, "--model", "x") == 2
    assert "--model, --baseline and --out are of a suite" in capfd.readouterr().err
    with pytest.raises(EvaluateError, match=r"'demo\.yaml' is no override"):
        read_suite(suite, ["demo.yaml"])


def test_spread_over_actors_it_is_the_same_encoder(workspace: str) -> None:
    uri = f"{workspace}/model"
    here = ModelEncoder.open(uri, batch_size=3)
    there = SpreadEncoder(uri, "model", here.digest, workers=2, batch_size=3)
    texts = [" ".join(["a dog and a cat"] * (n % 5 + 1)) + str(n) for n in range(31)]
    np.testing.assert_allclose(there.texts(texts, kind="query"), here.texts(texts, kind="query"), atol=1e-6)
    there.close()


@pytest.fixture(scope="module")
def world(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> World:
    return make_world(str(tmp_path_factory.mktemp("world")))


@pytest.fixture(scope="module")
def url(world: World) -> Iterator[str]:
    config = ServeConfig(max_batch=8)
    with listening(create_app(LocalEngine(world.model_uri, world.index_uri, config), config)) as url:
        yield url


def test_a_service_is_an_encoder(url: str, world: World) -> None:
    encoder = EndpointEncoder(url)
    assert encoder.digest == world.model.digest
    texts = [f"red circle number {n}" for n in range(30)]
    for kind in ("query", "text"):
        expected = world.model.embed_texts(texts, kind=kind)
        np.testing.assert_allclose(encoder.texts(texts, kind=kind), expected, atol=1e-6)
    assert encoder.texts([]).shape == (0, world.model.dim)
    with pytest.raises(ServeError, match="embeds texts alone"):
        encoder.images([b""])
    encoder.close()


def test_a_suite_over_a_service_is_that_over_its_model(
    url: str, world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"sentence1": f"a red {a}", "sentence2": f"a blue {b}", "score": n} for n, (a, b) in enumerate(
        [("circle", "star"), ("square", "square"), ("star", "star"), ("circle", "square"), ("star", "triangle")]
    )]  # fmt: skip
    path = tmp_path / "suite.yaml"
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path.write_text(yaml.safe_dump({
        "tasks": {"sts": {"kind": "sts", "data": str(tmp_path / "pairs.jsonl")}}, "map": "pca", "samples": 100,
    }))  # fmt: skip
    out = str(tmp_path / "out")
    command = ["--suite", str(path), "--model", url, "--baseline", world.model_uri, "--out", out]
    assert evaluate(monkeypatch, *command) == 0
    (part,) = read_report(out).results
    ours, theirs = part.directions[0].systems
    assert ours.metrics["spearman"].value == pytest.approx(theirs.metrics["spearman"].value, abs=1e-6)


def test_the_index_is_a_search(ray_cluster: str, tmp_path: Path) -> None:
    corpus = unit(np.random.default_rng(0), 300, 16)
    uri = table(tmp_path, corpus)
    build_index(uri, str(tmp_path / "index"), IndexConfig(factory="Flat", shards=3), model_digest="digest")
    search = open_index(str(tmp_path / "index"))
    assert search.table == (uri, 1)
    found = search(corpus[:9], 5)
    expected = np.argsort(-(corpus[:9] @ corpus.T), axis=1)[:, :5]
    assert np.array_equal(found.rows, expected)
    assert found.scores.dtype == np.float64


def test_a_sentence_transformers_directory_is_imported_for_as_long(minilm: str, tmp_path: Path) -> None:  # noqa: F811
    with model_directory(minilm) as uri:
        assert Model.load(uri).dim == 384
    assert not Path(uri).exists()
    with model_directory(str(tmp_path)) as uri, pytest.raises(Exception, match=str(tmp_path)):
        Model.load(uri)
