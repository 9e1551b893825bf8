"""ONNX files and bare weights: what onnxruntime and safetensors make of them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import safetensors.numpy

from rayemb.config import from_mapping
from rayemb.models import Model, TextTokenizer, TwoTowerConfig
from rayemb.models.interchange import export, onnx_graphs
from tests.models.test_export import TEXTS, made

BERT = {"model_type": "bert", "vocab_size": 600, "hidden_size": 32, "intermediate_size": 48}
BERT |= {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}


def pretrained() -> Model:
    text = {"name": "transformers", "architecture": BERT}
    towers = {"image": None, "dim": 8, "text": text, "tokenizer": {"name": "bpe", "max_length": 10}}
    config = from_mapping(TwoTowerConfig, towers)
    return Model.create(config, TextTokenizer.train(TEXTS, config.tokenizer), 0)


def own() -> Model:
    pooling = {"name": "multi_layer", "latents": 4, "heads": 2}
    image = {"name": "vit", "image_size": 16, "patch": 8, "width": 16, "depth": 1, "heads": 2}
    return made(image=image, text={"width": 16, "depth": 2, "heads": 2, "pooling": pooling})


@pytest.mark.parametrize("make", [own, pretrained])
def test_onnxruntime_gives_the_same_vectors_at_any_size(make: Any, tmp_path: Path) -> None:
    model = make()
    files = export(model, str(tmp_path / "out"), "onnx")
    assert ("image.onnx" in files) == (model.network.image is not None)
    text = onnxruntime.InferenceSession(tmp_path / "out" / "text.onnx")
    for texts in (TEXTS, TEXTS[:1], TEXTS[1:2], TEXTS[5:6] * 9):
        ids = model.tokenizer(texts)
        # What stands at padding does not matter.
        inputs = {"input_ids": np.where(ids < 0, 7, ids), "attention_mask": (ids >= 0).astype(np.int64)}
        np.testing.assert_allclose(text.run(["sentence_embedding"], inputs)[0], model.embed_texts(texts), atol=1e-5)
    if model.network.image is None:
        return
    image = onnxruntime.InferenceSession(tmp_path / "out" / "image.onnx")
    pixels = np.random.default_rng(0).integers(0, 256, (7, 3, 16, 16), dtype=np.uint8)
    for rows in (1, 7):
        found = image.run(["image_embedding"], {"pixel_values": pixels[:rows]})[0]
        np.testing.assert_allclose(found, model.embed_pixels(pixels[:rows]), atol=1e-5)


def test_many_weights_lie_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_graphs, "INLINE_PARAMETERS", 100)
    model = made(image=None)
    assert "text.onnx.data" in export(model, str(tmp_path / "out"), "onnx")
    text = onnxruntime.InferenceSession(tmp_path / "out" / "text.onnx")
    ids = model.tokenizer(["a red heart"])
    found = text.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[0]
    np.testing.assert_allclose(found, model.embed_texts(["a red heart"]), atol=1e-5)


def test_the_weights_alone_and_what_each_is(tmp_path: Path) -> None:
    model = own()
    export(model, str(tmp_path / "out"), "safetensors")
    tensors = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    for name, value in model.network.state_dict().items():
        np.testing.assert_array_equal(tensors[name], value.numpy())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert set(config["tensors"]) == set(tensors)
    about = config["tensors"]["text.blocks.0.qkv.weight"]
    assert about == {"shape": [48, 16], "dtype": "float32", "module": "Linear"}
    assert {name.split(".")[0] for name in tensors} == set(config["parts"])
