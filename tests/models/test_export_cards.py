"""Model cards: hubs can read their front matter, and their snippets run where they stand."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from rayemb.models import Model
from rayemb.models.interchange import export
from tests.models.test_export import made

INFO = {
    "seed": 3,
    "loss": {"loss": {"name": "infonce", "temperature": 0.07, "margin": 0.0}},
    "papers": {"loss": "Oord et al., 2018"},
    "corpora": [
        {"name": "icons", "uri": "s3://bucket/icons", "digest": "d1g357", "split": "train"},
        {"name": "emoji", "uri": "s3://bucket/emoji", "digest": "7357", "split": "train"},
    ],
    "config": {
        "steps": 7,
        "corpora": {"icons": {"weight": 2.0}, "emoji": {"weight": 1.0}},
        "mix": {"order": "random"},
    },
    "temperature": 0.05,
    "training": [{"step": 7, "loss": 1.25, "val/recall@1": 0.5, "learning_rate": 0.1}],
}


def saved(folder: Path, **towers: Any) -> Model:
    model = made(**towers)
    model.info = dict(INFO)
    model.save(str(folder / "model"))
    return model


def read(folder: Path) -> tuple[dict[str, Any], str, str]:
    """Front matter, the rest, and its Python."""
    text = (folder / "README.md").read_text()
    _, head, body = text.split("---\n", 2)
    (code,) = re.findall(r"```python\n(.*?)```", body, re.S)
    return yaml.safe_load(head), body, code


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, str], dict[str, Any]]:
    def execute(folder: Path, code: str) -> dict[str, Any]:
        monkeypatch.chdir(folder)
        names: dict[str, Any] = {}
        exec(code, names)
        return names

    return execute


Run = Callable[[Path, str], dict[str, Any]]
PAIR = ["a red heart", "a blue star"]


def test_the_card_of_a_model_says_what_was_recorded_and_its_snippet_runs(tmp_path: Path, run: Run) -> None:
    model = saved(tmp_path, prompts={"query": "find: "})
    head, body, code = read(tmp_path / "model")
    assert (head["library_name"], head["pipeline_tag"]) == ("rayemb", "zero-shot-image-classification")
    assert "license" not in head
    for said in (str(model.digest), "8 dimensions", "d1g357", "| emoji | train | 1 | `7357` |", '"find: "'):
        assert said in body
    for said in ("**infonce** (Oord et al., 2018): temperature 0.07", "| steps | 7 |", "| val/recall@1 | 0.5 |"):
        assert said in body
    found = run(tmp_path / "model", code)
    np.testing.assert_allclose(found["texts"], model.embed_texts(PAIR), atol=1e-6)
    np.testing.assert_allclose(found["queries"], model.embed_texts(["heart"], kind="query"), atol=1e-6)
    assert found["images"].shape == (1, 8)


def test_the_card_of_an_export_to_sentence_transformers(tmp_path: Path, run: Run) -> None:
    model = saved(tmp_path)
    export(model, str(tmp_path / "out"))
    head, body, code = read(tmp_path / "out")
    assert (head["library_name"], head["pipeline_tag"]) == ("sentence-transformers", "sentence-similarity")
    assert "the image tower is in the rayemb model" in body
    np.testing.assert_allclose(run(tmp_path / "out", code)["texts"], model.embed_texts(PAIR), atol=1e-5)


def test_the_card_of_the_weights_alone(tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    export(saved(tmp_path), str(tmp_path / "out"), "safetensors")
    head, _, code = read(tmp_path / "out")
    assert head["library_name"] == "safetensors"
    run(tmp_path / "out", code)
    assert "text_projection.weight [8, 16]" in capsys.readouterr().out


def test_the_card_of_onnx_files(tmp_path: Path, run: Run) -> None:
    model = saved(tmp_path, prompts={"text": "text: ", "pooled": False})
    export(model, str(tmp_path / "out"), "onnx")
    head, _, code = read(tmp_path / "out")
    assert head["library_name"] == "onnx"
    found = run(tmp_path / "out", code)
    np.testing.assert_allclose(found["texts"], model.embed_texts(PAIR), atol=1e-5)
    np.testing.assert_allclose(found["images"], model.embed_pixels(found["pixels"]), atol=1e-5)
