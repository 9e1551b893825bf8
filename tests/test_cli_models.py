"""`rayemb export` and `rayemb import`: files written, lines that say what, errors in three parts."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from rayemb.models import Model
from tests.models.test_export import made
from tests.test_cli import rayemb  # noqa: F401

Run = Callable[..., Any]


def test_a_model_goes_out_and_comes_back(rayemb: Run, tmp_path: Path) -> None:  # noqa: F811
    model, (here, out, back) = made(), (str(tmp_path / name) for name in ("model", "out", "back"))
    model.save(here)
    answer = rayemb("export", here, out)
    assert answer.returncode == 0
    assert "modules.json" in answer.stdout
    assert "the image tower is not part of it" in answer.stdout
    answer = rayemb("import", out, back, "--max-length", "8")
    assert answer.returncode == 0
    loaded = Model.load(back)
    assert f"model {str(loaded.digest)[:12]}" in answer.stdout
    texts = ["a red heart", "blue star"]
    np.testing.assert_allclose(loaded.embed_texts(texts), model.embed_texts(texts), atol=1e-5)
    assert rayemb("export", back, str(tmp_path / "bare"), "--format", "safetensors").returncode == 0
    theirs = SentenceTransformer(out, device="cpu").encode(texts)
    np.testing.assert_allclose(loaded.embed_texts(texts), theirs, atol=1e-5)


def test_errors_say_what_where_and_what_to_do(rayemb: Run, tmp_path: Path) -> None:  # noqa: F811
    nowhere, out = str(tmp_path / "nowhere"), str(tmp_path / "out")
    answer = rayemb("export", nowhere, out)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert f"{nowhere}: no rayemb.json" in answer.stderr
    answer = rayemb("import", nowhere, out)
    assert answer.returncode == 2
    assert "give the folder of a model" in answer.stderr
    made(text={"width": 16, "depth": 1, "heads": 2, "pooling": {"name": "attention", "heads": 2}}).save(nowhere)
    answer = rayemb("export", nowhere, out)
    assert answer.returncode == 2
    assert "model.text.pooling: sentence-transformers has no pooling 'attention'" in answer.stderr
    answer = rayemb("export", nowhere, out, "--format", "pickle")
    assert answer.returncode == 2
    assert "'onnx'" in answer.stderr


@pytest.mark.parametrize("verb", ["export", "import"])
def test_help_answers(rayemb: Run, verb: str) -> None:  # noqa: F811
    answer = rayemb(verb, "--help")
    assert answer.returncode == 0
    for said in {
        "export": ("--format", "without rayemb"),
        "import": ("--pooling", "--allow-pickle", "mean if left out"),
    }[verb]:
        assert said in " ".join(answer.stdout.replace("│", " ").split())
