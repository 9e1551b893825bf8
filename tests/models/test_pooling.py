"""Poolings: what the papers' formulas say, and that what is not to be pooled is not."""

import pytest
import torch

from rayemb.config import Config, from_mapping
from rayemb.models import ModelError, TwoTower, TwoTowerConfig
from rayemb.models.pooling import AnyPooling, Pooling

B, L, E, N = 3, 5, 8, 4
MASK = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 1, 1, 0]], dtype=torch.bool)
NAMES = ["mean", "cls", "last", "attention", "latent_attention", "multi_layer"]


class Some(Config):
    pooling: AnyPooling


def pooling(name: str, *, causal: bool = False) -> Pooling:
    torch.manual_seed(1)
    config = from_mapping(Some, {"pooling": {"name": name}}).pooling
    return config.build(E, N, causal=causal).double()


def states() -> list[torch.Tensor]:
    torch.manual_seed(2)
    return [torch.randn(B, L, E, dtype=torch.float64) for _ in range(N)]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_outside_of_the_mask_changes_nothing(name: str) -> None:
    layers = states()
    # The first token is the [CLS] of `cls`, and stands for the text even where the instruction is not pooled.
    out = ~MASK & (torch.arange(L) > 0)
    changed = [layer.masked_fill(out[..., None], 1e30) for layer in layers]
    pool = pooling(name)
    assert pool(layers, MASK).shape == (B, E)
    assert torch.equal(pool(layers, MASK), pool(changed, MASK))


@pytest.mark.parametrize("name", ["mean", "attention", "latent_attention", "multi_layer"])
def test_the_order_of_tokens_is_the_towers_affair(name: str) -> None:
    order = torch.tensor([3, 0, 4, 2, 1])
    pool = pooling(name)
    shuffled = pool([layer[:, order] for layer in states()], MASK[:, order])
    torch.testing.assert_close(shuffled, pool(states(), MASK), rtol=1e-12, atol=1e-12)


def test_the_plain_ones() -> None:
    layers = states()
    mean = torch.stack([row[mask].mean(0) for row, mask in zip(layers[-1], MASK, strict=True)])
    torch.testing.assert_close(pooling("mean")(layers, MASK), mean, rtol=1e-12, atol=1e-12)
    assert torch.equal(pooling("cls")(layers, MASK), layers[-1][:, 0])
    assert torch.equal(pooling("last", causal=True)(layers, MASK), layers[-1][torch.arange(B), torch.tensor([4, 2, 3])])


@pytest.mark.parametrize("name", NAMES)
def test_a_text_without_a_token_that_counts_has_a_finite_vector(name: str) -> None:
    assert pooling(name)(states(), torch.zeros(B, L, dtype=torch.bool)).isfinite().all()


@pytest.mark.parametrize("name", ["attention", "latent_attention", "multi_layer"])
def test_every_parameter_learns(name: str) -> None:
    pool = pooling(name)
    pool(states(), MASK).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in pool.parameters())


def silent(pool: Pooling) -> Pooling:
    """With output projections of zero, so that only the residual is left."""
    for name, parameter in pool.named_parameters():
        if "attention.out" in name or "feed_forward.down" in name:
            torch.nn.init.zeros_(parameter)
    return pool


def test_latent_attention_without_its_outputs_is_the_mean() -> None:
    pool = silent(pooling("latent_attention"))
    assert torch.equal(pool(states(), MASK), pooling("mean")(states(), MASK))


def test_one_latent_adds_the_same_to_every_token() -> None:
    torch.manual_seed(1)
    config = from_mapping(Some, {"pooling": {"name": "latent_attention", "latents": 1}}).pooling
    pool = config.build(E, N, causal=False).double()
    torch.nn.init.zeros_(pool.feed_forward.down.weight)
    torch.nn.init.zeros_(pool.feed_forward.down.bias)
    added = pool(states(), MASK) - pooling("mean")(states(), MASK)
    torch.testing.assert_close(added, added[:1].expand_as(added), rtol=1e-10, atol=1e-12)
    assert added.abs().max() > 1e-3


def test_multi_layer_without_its_outputs_is_the_mean_of_the_latents() -> None:
    pool = silent(pooling("multi_layer"))
    expected = pool.latents.mean(0).expand(B, E)
    torch.testing.assert_close(pool(states(), MASK), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("causal", "index"), [(True, 4), (False, None)])
def test_multi_layer_reads_the_last_token_under_causal_attention_else_the_mean(causal: bool, index: int | None) -> None:
    full = torch.ones(B, L, dtype=torch.bool)
    layers = states()
    if index is None:
        same = [layer.mean(1, keepdim=True).expand_as(layer) for layer in layers]
    else:
        same = [layer[:, index : index + 1].expand_as(layer) for layer in layers]
    pool = pooling("multi_layer", causal=causal)
    torch.testing.assert_close(pool(layers, full), pool(same, full), rtol=1e-12, atol=1e-12)
    for number in range(N):  # every layer counts
        other = [layer * (2 if at == number else 1) for at, layer in enumerate(layers)]
        assert not torch.allclose(pool(layers, full), pool(other, full))


def network(**text: object) -> TwoTower:
    torch.manual_seed(0)
    given = {"dim": 8, "image": None, "text": {"width": 16, "depth": 2, "heads": 2, **text}}
    return TwoTower(from_mapping(TwoTowerConfig, given), 50).double().eval()


@pytest.mark.parametrize("name", ["mean", "last", "attention", "latent_attention", "multi_layer"])
@pytest.mark.parametrize("causal", [False, True])
def test_an_instruction_is_read_and_not_pooled(name: str, causal: bool) -> None:
    model = network(pooling={"name": name}, causal=causal)
    ids = torch.tensor([[1, 7, 9, 11, 13], [1, 8, 12, 14, -1]])
    skip = torch.tensor([3, 2])
    vectors = model.encode_text(ids, skip)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(2, dtype=torch.float64))
    # Read: another instruction makes another vector. Not pooled: what the tower says at its tokens counts for nothing.
    assert not torch.allclose(vectors[0], model.encode_text(torch.tensor([[1, 7, 10, 11, 13]]), skip[:1])[0])
    real = model.text.forward

    def changed(ids: torch.Tensor, *, every_layer: bool = False) -> list[torch.Tensor]:
        return [layer.index_fill(1, torch.tensor([0, 1]), 5.0) for layer in real(ids, every_layer=every_layer)]

    model.text.forward = changed  # type: ignore[method-assign]
    torch.testing.assert_close(model.encode_text(ids, skip), vectors, rtol=1e-12, atol=1e-12)


def test_tokens_have_vectors_of_their_own() -> None:
    model = network()
    vectors, mask = model.encode_tokens(torch.tensor([[1, 7, 9], [1, 8, -1]]))
    assert vectors.shape == (2, 3, 8)
    assert mask.tolist() == [[True, True, True], [True, True, False]]
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(2, 3, dtype=torch.float64))


def test_what_does_not_fit_is_said() -> None:
    with pytest.raises(ModelError, match="causal attention the first token has seen nothing"):
        network(pooling={"name": "cls"}, causal=True)
    with pytest.raises(ModelError, match=r"heads \(3\) must divide"):
        network(pooling={"name": "attention", "heads": 3})
    with pytest.raises(ModelError, match="no image tower"):
        network().encode_image(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
