"""The text tower: real tokens count, padding does not."""

import pytest
import torch

from rayemb.config import ConfigError, from_mapping
from rayemb.models import PADDING, TextTransformer, TextTransformerConfig
from rayemb.models.pooling.base import masked_mean
from rayemb.models.text import heads_dropped

CONFIG = TextTransformerConfig(width=32, depth=2, heads=4)


def tower(dropout: float = 0.0, causal: bool = False) -> TextTransformer:
    torch.manual_seed(0)
    config = CONFIG.model_copy(update={"dropout": dropout, "causal": causal})
    return TextTransformer(config, vocab_size=50, max_length=12).eval()


def pooled(network: TextTransformer, ids: torch.Tensor) -> torch.Tensor:
    (states,) = network(ids)
    return masked_mean(states, ids != PADDING)


def test_shape_and_dtype() -> None:
    ids = torch.randint(1, 50, (3, 7))
    assert tower()(ids)[0].shape == (3, 7, 32)
    assert tower()(ids)[0].dtype == torch.float32
    assert tower().double()(ids)[0].dtype == torch.float64


def test_the_states_of_every_layer_end_with_those_of_the_last() -> None:
    ids = torch.randint(1, 50, (3, 7))
    network = tower()
    first, last = network(ids, every_layer=True)
    assert torch.equal(last, network(ids)[0])
    assert not torch.equal(first, last)


@pytest.mark.parametrize("causal", [False, True])
def test_causal_attention_sees_nothing_of_what_follows(causal: bool) -> None:
    ids = torch.tensor([[1, 9, 33, 4]])
    other = torch.tensor([[1, 9, 33, 5]])
    network = tower(causal=causal)
    (one,), (two,) = network(ids), network(other)
    assert torch.equal(one[:, :3], two[:, :3]) == causal
    assert not torch.equal(one[:, 3], two[:, 3])


def test_attention_temperature_is_one_over_a_factor_of_the_queries() -> None:
    ids = torch.randint(1, 50, (3, 7))
    softened = TextTransformer(CONFIG.model_copy(update={"attention_temperature": 0.8}), 50, 12).eval()
    plain = tower()
    softened.load_state_dict(plain.state_dict())
    for block in plain.blocks:
        block.qkv.weight.data[:32] /= 0.8
        block.qkv.bias.data[:32] /= 0.8
    torch.testing.assert_close(softened(ids)[0], plain(ids)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("padding", [1, 5, 9])
def test_padding_does_not_change_a_vector(padding: int) -> None:
    ids = torch.tensor([[1, 9, 33], [1, 7, -1]])
    network = tower().double()
    padded = torch.nn.functional.pad(ids, (0, padding), value=PADDING)
    torch.testing.assert_close(pooled(network, padded), pooled(network, ids), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(pooled(network, ids)[1:], pooled(network, ids[1:, :2]), rtol=1e-12, atol=1e-12)


def test_a_vector_does_not_depend_on_its_batch() -> None:
    network = tower().double()
    ids = torch.randint(1, 50, (6, 8))
    torch.testing.assert_close(network(ids)[0][3:4], network(ids[3:4])[0], rtol=1e-12, atol=1e-12)


def test_padding_gets_no_gradient() -> None:
    network = tower()
    pooled(network, torch.tensor([[1, 9, -1, -1]])).square().sum().backward()
    assert network.tokens.weight.grad is not None
    assert network.tokens.weight.grad[0].abs().max() == 0
    assert network.tokens.weight.grad[9].abs().max() > 0
    assert network.positions.grad is not None
    assert network.positions.grad[2:].abs().max() == 0


def test_order_and_tokens_matter() -> None:
    network = tower()
    a, b, c = pooled(network, torch.tensor([[1, 9, 33], [1, 33, 9], [1, 9, 34]]))
    assert (a - b).abs().max() > 1e-4
    assert (a - c).abs().max() > 1e-4


def test_dropout_acts_in_training_only() -> None:
    network = tower(dropout=0.5)
    ids = torch.randint(1, 50, (2, 6))
    assert torch.equal(network(ids)[0], network(ids)[0])
    network.train()
    assert not torch.equal(network(ids)[0], network(ids)[0])


def test_heads_are_dropped_in_training_only() -> None:
    network = TextTransformer(CONFIG.model_copy(update={"drop_heads": 0.4}), vocab_size=50, max_length=12).eval()
    network.load_state_dict(tower().state_dict())
    ids = torch.randint(1, 50, (2, 6))
    assert torch.equal(network(ids)[0], tower()(ids)[0])
    network.train()
    assert not torch.equal(network(ids)[0], network(ids)[0])


def test_the_heads_that_are_kept_make_up_for_the_others() -> None:
    torch.manual_seed(0)
    ones = torch.ones(4000, 4, 3, 2)
    assert torch.equal(heads_dropped(ones, 0.0), ones)
    found = heads_dropped(ones, 0.3)
    assert torch.equal(found, found[..., :1, :1].expand_as(found))  # a head is dropped of a whole text
    kept = (found[..., 0, 0] > 0).sum(1)
    assert kept.min() == 1
    torch.testing.assert_close(found.sum(1), ones.sum(1))
    for number in range(1, 5):
        values = found[kept == number]
        torch.testing.assert_close(values[values > 0].unique(), torch.tensor([4 / number]))
    # All four fail with probability 0.0081; then one stays.
    assert kept.float().mean().item() == pytest.approx(4 * 0.7 + 0.3**4, abs=0.06)
    assert (heads_dropped(ones, 0.999) > 0).any(1).all()


def test_all_parameters_learn() -> None:
    network = tower()
    network(torch.randint(1, 50, (4, 12)))[0].pow(2).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ConfigError, match=r"heads \(5\) must divide width \(128\)"):
        from_mapping(TextTransformerConfig, {"heads": 5})
