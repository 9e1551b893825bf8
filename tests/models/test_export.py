"""What is exported, opened by the libraries it is exported for: the same vectors, without a line of rayemb."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from rayemb.config import from_mapping
from rayemb.models import Model, ModelError, TextTokenizer, TwoTowerConfig
from rayemb.models.interchange import export
from tests.models.test_pretrained import LLAMA, minilm  # noqa: F401

LONG = "a text that is longer than the ten or sixteen tokens that the model can ever hold, by far " * 3
TEXTS = [
    "a red heart",
    "",
    "Two CATS sit on a very long sofa",
    "日本語 звезда Ünïcode",
    "[PAD] and [CLS] are text",
    LONG,
    "  a ",
]


def made(seed: int = 0, **towers: Any) -> Model:
    """A model of rayemb's own towers, its weights large enough to tell two of them apart."""
    towers = {"image": {"image_size": 16, "widths": [8, 12], "depths": [1, 1]}, "dim": 8, **towers}
    towers = {"text": {"width": 16, "depth": 2, "heads": 2}, "tokenizer": {"max_length": 10}, **towers}
    config = from_mapping(TwoTowerConfig, towers)
    tokenizer = TextTokenizer.train(["a red heart", "blue star", "green circle"] * 3, config.tokenizer)
    model = Model.create(config, tokenizer, seed)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.network.parameters():
        parameter.data += torch.randn(parameter.shape, generator=generator) * 0.2
    return model


def theirs(folder: Path, texts: list[str] = TEXTS, **how: Any) -> np.ndarray:
    model = SentenceTransformer(str(folder), device="cpu")
    return model.encode(texts, batch_size=4, **how)


CASES = {
    "mean": {},
    "cls": {"text": {"pooling": {"name": "cls"}}},
    "last": {"text": {"pooling": {"name": "last"}}},
    "causal": {"text": {"causal": True, "pooling": {"name": "last"}}},
    "sharp": {"text": {"attention_temperature": 0.5}},
    "texts alone, no projection": {"image": None, "projection": "none", "dim": 16},
}


@pytest.mark.parametrize("case", CASES)
def test_sentence_transformers_gives_the_same_vectors(case: str, tmp_path: Path) -> None:
    towers: dict[str, Any] = dict(CASES[case])
    model = made(**{**towers, "text": {"width": 16, "depth": 2, "heads": 2, **towers.get("text", {})}})
    export(model, str(tmp_path / "out"))
    vectors = model.embed_texts(TEXTS)
    np.testing.assert_allclose(theirs(tmp_path / "out"), vectors, atol=1e-5)
    one_by_one = np.concatenate([theirs(tmp_path / "out", [text]) for text in TEXTS[:3]])
    np.testing.assert_allclose(one_by_one, vectors[:3], atol=1e-5)
    others = vectors @ vectors.T - 2 * np.eye(len(vectors))
    assert others.max() < 1 - 1e-4


def test_a_pretrained_network_keeps_its_architecture(minilm: str, tmp_path: Path) -> None:  # noqa: F811
    prompts = {"query": "query: ", "text": "passage:\n", "pooled": False}
    towers = from_mapping(
        TwoTowerConfig,
        {
            "image": None,
            "text": {"name": "transformers", "source": minilm, "attention_temperature": 0.8},
            "dim": 32,
            "tokenizer": {"max_length": 12},
            "prompts": prompts,
        },
    )
    model = Model.create(towers, TextTokenizer.from_source(minilm, 12), 0)
    export(model, str(tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["BertModel"]
    texts = [text for text in TEXTS if text]
    loaded = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    assert loaded.max_seq_length == 12
    np.testing.assert_allclose(loaded.encode_query(texts), model.embed_texts(texts, kind="query"), atol=1e-5)
    np.testing.assert_allclose(loaded.encode_document(texts), model.embed_texts(texts), atol=1e-5)
    np.testing.assert_allclose(loaded.encode(texts), model.embed_texts(texts), atol=1e-5)
    assert np.abs(loaded.encode_query(texts) - loaded.encode(texts)).max() > 1e-3


def decoder(**text: Any) -> Model:
    tokenizer = TextTokenizer.train(["a red heart"], from_mapping(TwoTowerConfig, {}).tokenizer)
    text = {"name": "transformers", "architecture": {**LLAMA, "vocab_size": 600}, "pooling": {"name": "last"}, **text}
    towers = {"image": None, "dim": 8, "text": text, "tokenizer": {"name": "bpe", "max_length": 10}}
    return Model.create(from_mapping(TwoTowerConfig, towers), tokenizer, 0)


@pytest.mark.parametrize("text", [{"attention_temperature": 0.7}, {"attention": "bidirectional"}], ids=str)
def test_a_decoder_is_exported_as_it_is(text: dict[str, Any], tmp_path: Path) -> None:
    model = decoder(**text)
    export(model, str(tmp_path / "out"))
    np.testing.assert_allclose(theirs(tmp_path / "out"), model.embed_texts(TEXTS), atol=1e-5)


def test_what_sentence_transformers_cannot_express_is_refused(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    for pooling in ("attention", "latent_attention", "multi_layer"):
        text = {"width": 16, "depth": 1, "heads": 2, "pooling": {"name": pooling, "heads": 2}}
        with pytest.raises(ModelError, match=f"no pooling '{pooling}' .*export it as onnx"):
            export(made(text=text), out)
    changed = decoder()
    changed.network.text.model.layers[0].self_attn.scaling *= 3  # type: ignore[union-attr,operator,index]
    with pytest.raises(ModelError, match="computes other states from the exported llama"):
        export(changed, out)
    with pytest.raises(ModelError, match=r"the prompt 'query: ' is \d+ tokens before a text and \d+ alone"):
        export(made(prompts={"query": "query: ", "pooled": False}), out)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old.txt").write_text("")
    with pytest.raises(ModelError, match=r"1 files here already, the first is old\.txt"):
        export(made(), out)
