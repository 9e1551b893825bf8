"""Training that starts from a model: an imported MiniLM, fine-tuned, loaded, exported, and its card."""

from pathlib import Path

import numpy as np
import pytest
from sentence_transformers import SentenceTransformer

from rayemb.config import ConfigError, load
from rayemb.models import ModelError
from rayemb.models.interchange import export, import_model
from rayemb.train import TrainConfig, TrainError, train
from tests.data.corpora import write_corpus
from tests.models.test_pretrained import minilm  # noqa: F401

QUICK = [
    "steps=5",
    "batch_size=16",
    "logging.every=1",
    "max_failures=0",
    "zero_stage=2",
    "optimizer.learning_rate=1e-4",
    "schedule={name: constant, warmup_steps: 1}",
]


@pytest.mark.slow
def test_an_imported_model_is_tuned_and_goes_out_again(
    ray_cluster: str,
    minilm: str,  # noqa: F811
    tmp_path: Path,
) -> None:
    corpus = write_corpus(tmp_path / "pairs", {"train": [64], "val": [16]}, pairs=True)
    start = import_model(minilm, str(tmp_path / "start"), max_length=16)
    config = load(TrainConfig, None, [*QUICK, f"init={tmp_path / 'start'}"])
    model = train(config, corpus.uri, str(tmp_path / "model"), str(tmp_path / "runs"))
    losses = [row["loss"] for row in model.info["training"]]
    assert len(losses) == 5
    assert np.mean(losses[-2:]) < np.mean(losses[:2])
    assert model.info["init"] == {"uri": str(tmp_path / "start"), "digest": start.digest}
    before, after = start.network.state_dict(), model.network.state_dict()
    assert list(before) == list(after)
    moved = [float((after[name] - value).abs().max()) for name, value in before.items() if value.is_floating_point()]
    assert 0 < max(moved) < 0.01
    texts = ["text 3", "query 3", "a red heart"]
    assert model.tokenizer.to_json() == start.tokenizer.to_json()
    export(model, str(tmp_path / "out"))
    theirs = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    np.testing.assert_allclose(theirs.encode(texts), model.embed_texts(texts), atol=1e-5)
    # The card says where it began, what it saw and what was measured on what.
    card = (tmp_path / "out" / "README.md").read_text()
    for said in (str(start.digest), corpus.digest, "**infonce** (", "| val/recall@1 |", "`val` is split `val`"):
        assert said in card, said
    # Nothing to do the second time; another start is another run.
    again = train(config, corpus.uri, str(tmp_path / "model"), str(tmp_path / "runs"))
    assert again.digest == model.digest


def test_a_start_that_does_not_fit_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model: train\.init brings its own towers"):
        load(TrainConfig, None, ["init=somewhere", "model.dim=7"])
    corpus = write_corpus(tmp_path / "pairs", {"train": [20]}, pairs=True)
    where = (corpus.uri, str(tmp_path / "model"), str(tmp_path / "runs"))
    with pytest.raises(ModelError, match="there is no model here"):
        train(load(TrainConfig, None, [f"init={tmp_path / 'none'}"]), *where)
    from tests.models.tiny import tiny_model

    tiny_model().save(str(tmp_path / "tiny"))
    wide = "loss={name: matryoshka, dims: [4, 64], loss: {name: infonce}}"
    with pytest.raises(TrainError, match=r"train\.loss: .*the dimension of train\.init"):
        train(load(TrainConfig, None, [f"init={tmp_path / 'tiny'}", wide]), *where)
