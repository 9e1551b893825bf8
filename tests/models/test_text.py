"""The text tower: real tokens count, padding does not."""

import pytest
import torch

from rayemb.config import ConfigError, from_mapping
from rayemb.models import TextTransformer, TextTransformerConfig

CONFIG = TextTransformerConfig(width=32, depth=2, heads=4)


def tower(dropout: float = 0.0) -> TextTransformer:
    torch.manual_seed(0)
    config = CONFIG.model_copy(update={"dropout": dropout})
    return TextTransformer(config, vocab_size=50, max_length=12).eval()


def test_shape_and_dtype() -> None:
    ids = torch.randint(1, 50, (3, 7))
    assert tower()(ids).shape == (3, 32)
    assert tower()(ids).dtype == torch.float32
    assert tower().double()(ids).dtype == torch.float64


@pytest.mark.parametrize("padding", [1, 5, 9])
def test_padding_does_not_change_a_vector(padding: int) -> None:
    ids = torch.tensor([[1, 9, 33], [1, 7, 0]])
    network = tower().double()
    padded = torch.nn.functional.pad(ids, (0, padding))
    torch.testing.assert_close(network(padded), network(ids), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(network(ids)[1:], network(ids[1:, :2]), rtol=1e-12, atol=1e-12)


def test_a_vector_does_not_depend_on_its_batch() -> None:
    network = tower().double()
    ids = torch.randint(1, 50, (6, 8))
    torch.testing.assert_close(network(ids)[3:4], network(ids[3:4]), rtol=1e-12, atol=1e-12)


def test_padding_gets_no_gradient() -> None:
    network = tower()
    network(torch.tensor([[1, 9, 0, 0]])).square().sum().backward()
    assert network.tokens.weight.grad is not None
    assert network.tokens.weight.grad[0].abs().max() == 0
    assert network.tokens.weight.grad[9].abs().max() > 0
    assert network.positions.grad is not None
    assert network.positions.grad[2:].abs().max() == 0


def test_order_and_tokens_matter() -> None:
    network = tower()
    a, b, c = network(torch.tensor([[1, 9, 33], [1, 33, 9], [1, 9, 34]]))
    assert (a - b).abs().max() > 1e-4
    assert (a - c).abs().max() > 1e-4


def test_dropout_acts_in_training_only() -> None:
    network = tower(dropout=0.5)
    ids = torch.randint(1, 50, (2, 6))
    assert torch.equal(network(ids), network(ids))
    network.train()
    assert not torch.equal(network(ids), network(ids))


def test_all_parameters_learn() -> None:
    network = tower()
    network(torch.randint(1, 50, (4, 12))).pow(2).sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ConfigError, match=r"heads \(5\) must divide width \(128\)"):
        from_mapping(TextTransformerConfig, {"heads": 5})
