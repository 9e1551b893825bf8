"""Several texts in a row are read as each alone."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rayemb.models import PADDING, TwoTower, TwoTowerConfig
from rayemb.models.packing import pack
from rayemb.models.pretrained import PACKS

VOCABULARY, LONGEST = 60, 12
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
SHAPE = {**SIZES, **HEADS, "vocab_size": VOCABULARY, "max_position_embeddings": 32, "pad_token_id": 1}
NETWORK = {**SHAPE, "sliding_window": None}


def ragged(lengths: list[int]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (len(lengths), max(lengths, default=0)), generator=generator)
    beyond = torch.arange(ids.shape[1]) >= torch.tensor(lengths)[:, None]
    return ids.masked_fill(beyond, PADDING)


@given(st.lists(st.integers(0, 12), max_size=40))
def test_every_token_has_one_place_among_its_own(lengths: list[int]) -> None:
    ids = ragged(lengths) if lengths else torch.empty(0, 4, dtype=torch.int64)
    packed = pack(ids)
    if packed is None:
        assert sum(lengths) > 0.9 * ids.numel() or not sum(lengths)
        return
    assert packed.ids.shape[1] == max(lengths)
    # Each row but one is more than half full, else two would have been one.
    held = (packed.ids != PADDING).sum(1)
    assert int((2 * held <= packed.ids.shape[1]).sum()) <= 1
    assert int(held.sum()) == sum(lengths)
    real = ids != PADDING
    assert torch.equal(packed.unpacked(packed.ids[..., None])[..., 0][real], ids[real])
    places = torch.arange(ids.shape[1]).expand_as(ids)
    assert torch.equal(packed.unpacked(packed.positions[..., None])[..., 0][real], places[real])
    at, owner = packed.places[real], torch.arange(len(lengths))[:, None].expand_as(ids)[real]
    row, place = at // packed.ids.shape[1], at % packed.ids.shape[1]
    sees = packed.mask()[row[:, None], 0, place[:, None], place] & (row[:, None] == row)
    assert torch.equal(sees, owner[:, None] == owner)


def test_texts_of_one_length_stay_as_they_are() -> None:
    assert pack(ragged([5, 5, 5])) is None
    assert pack(torch.full((3, 4), PADDING)) is None


def towers(text: dict[str, Any]) -> tuple[TwoTower, TwoTower]:
    """A network that packs, and the same that does not; in fp64."""
    given = {"dim": 16, "image": None, "text": text, "tokenizer": {"name": "bpe", "max_length": LONGEST}}
    torch.manual_seed(0)
    packs, pads = (TwoTower(TwoTowerConfig.model_validate(given), VOCABULARY).double().eval() for _ in range(2))
    pads.load_state_dict(packs.state_dict())
    assert packs.text.packs
    pads.text.packs = False
    return packs, pads


OWN = {"name": "transformer", "width": 16, "heads": 4, "depth": 2}
NETWORKS = [
    OWN,
    {**OWN, "causal": True},
    {**OWN, "pooling": {"name": "cls"}},
    *({"name": "transformers", "architecture": {"model_type": kind, **NETWORK}} for kind in PACKS),
    {"name": "transformers", "attention": "bidirectional", "architecture": {"model_type": "llama", **NETWORK}},
]


@pytest.mark.parametrize("text", NETWORKS, ids=str)
def test_vectors_and_gradients_are_those_of_texts_alone(text: dict[str, Any]) -> None:
    ids, skips = ragged([12, 3, 7, 2, 2, 5, 9, 1]), torch.tensor([2, 1, 0, 0, 1, 0, 3, 0])
    assert pack(ids) is not None
    found = []
    for network in towers(text):
        vectors = network.encode_text(ids, skips)
        exits = network.encode_text_exits(ids, skips, [1, 2])
        goal = torch.randn(vectors.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        (vectors * goal + exits[0] * goal.roll(1, 0)).sum().backward()
        gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
        found.append((vectors.detach(), [vector.detach() for vector in exits], gradients))
    (mine, my_exits, my_gradients), (theirs, their_exits, their_gradients) = found
    torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(my_exits, their_exits, rtol=0, atol=1e-12)
    assert my_gradients.keys() == their_gradients.keys()
    for name, gradient in my_gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=0, atol=1e-11, msg=name)


def test_networks_that_look_at_neighbours_in_the_row_do_not_pack() -> None:
    windowed = {"model_type": "mistral", **SHAPE, "sliding_window": 4}
    for architecture in (windowed, {"model_type": "modernbert", **SHAPE}):
        text = {"name": "transformers", "architecture": architecture}
        tokenizer = {"name": "bpe", "max_length": LONGEST}
        config = TwoTowerConfig.model_validate({"dim": 16, "image": None, "text": text, "tokenizer": tokenizer})
        assert not TwoTower(config, VOCABULARY).text.packs


def test_heads_are_left_out_of_texts_and_not_of_rows() -> None:
    network, _ = towers({**OWN, "drop_heads": 0.9, "depth": 1})
    ids = torch.full((6, 8), PADDING)
    ids[0] = torch.arange(3, 11)
    ids[1:, :2] = torch.tensor([5, 6])
    torch.manual_seed(0)
    same = network.train().encode_text(ids)[1:]
    assert len(torch.unique(same.round(decimals=6), dim=0)) > 1
