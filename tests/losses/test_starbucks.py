"""Starbucks against card S069's checks."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from rayemb.config import ConfigError, from_mapping
from rayemb.losses import Batch, StarbucksConfig
from rayemb.parallel import ExchangeError
from tests.losses.common import EVERY, built, everything, exact, gradients, vectors

INNER: dict[str, Any] = {"temperature": 0.2, "learnable_temperature": False}
INSIDE = [name for name in EVERY if name not in ("class_proxies", "cross_batch_memory", "matryoshka", "starbucks")]


def of(*sizes: tuple[int, int], loss: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    return {"name": "starbucks", "sizes": sizes, "loss": INNER if loss is None else loss, **fields}


def pairs(**exits: Batch) -> Batch:
    return Batch(
        vectors(5), vectors(5, seed=1), negatives=vectors(3, seed=2), exits={2: small(3), 3: small(13)}, **exits
    )


def small(seed: int) -> Batch:
    return Batch(vectors(5, seed=seed), vectors(5, seed=seed + 1), negatives=vectors(3, seed=seed + 2))


@pytest.mark.parametrize("name", INSIDE)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_of_the_full_size_alone_it_is_the_inner_loss_bit_for_bit(name: str, dtype: torch.dtype) -> None:
    batch = everything(5, dtype=dtype)
    loss, plain = built(of((4, 6), loss=EVERY[name])), built(EVERY[name])
    assert torch.equal(loss(batch), plain(batch))
    found = gradients(plain, batch)
    for key, gradient in gradients(loss, batch).items():
        assert torch.equal(gradient, found[key.removeprefix("loss.")])


def by_hand(batch: Batch, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean cross-entropy in both directions, and the logits of all candidates."""
    rows = (batch.queries, batch.documents, batch.negatives)
    q, d, n = (F.normalize(x[:, :dim], dim=1) for x in rows if x is not None)
    logits = q @ torch.cat([d, n]).T / 0.2
    own = torch.arange(5)
    return (F.cross_entropy(logits, own) + F.cross_entropy(d @ q.T / 0.2, own)) / 2, logits


@pytest.mark.parametrize("weight", [0.0, 1.0, 0.3])
def test_it_is_the_sum_over_sizes_and_of_their_divergences_from_the_full_one(weight: float) -> None:
    batch = pairs()
    total, full = by_hand(batch, 6)
    for layers, dim in ((2, 2), (3, 4)):
        value, logits = by_hand(batch.exits[layers], dim)
        apart = F.kl_div(F.log_softmax(logits, 1), F.log_softmax(full, 1), reduction="batchmean", log_target=True)
        total = total + value + weight * apart
    loss = exact(of((2, 2), (3, 4), (4, 6), divergence=weight))
    torch.testing.assert_close(loss(batch), total, rtol=1e-12, atol=0)
    parts = [exact(of((2, 2), (4, 6), divergence=weight)), exact(of((3, 4), (4, 6), divergence=weight))]
    torch.testing.assert_close(sum(p(batch) for p in parts) - exact(INNER)(batch), total, rtol=1e-12, atol=0)


def test_a_size_with_the_scores_of_the_full_one_is_not_apart_from_it() -> None:
    full = Batch(vectors(5), vectors(5, seed=1))
    padded = Batch(*(torch.cat([x, torch.zeros(5, 2, dtype=x.dtype)], 1) for x in (full.queries, full.documents)))
    batch = replace(padded, exits={2: full})
    with_it, without = (exact(of((2, 6), (4, 8), divergence=w), 8)(batch) for w in (1.0, 0.0))
    torch.testing.assert_close(with_it, without, rtol=1e-14, atol=0)


def test_what_a_size_does_not_have_gets_no_gradient_from_it() -> None:
    loss, leaves = exact(of((2, 2), (4, 6))), {}
    for name in ("queries", "documents", "negatives"):
        leaves[name] = getattr(pairs().exits[2], name).clone().requires_grad_()
    full = vectors(5).requires_grad_()
    batch = replace(pairs(), queries=full, exits={2: replace(pairs().exits[2], **leaves)})
    loss(batch).backward()
    assert all(leaf.grad is not None and leaf.grad[:, :2].any() for leaf in leaves.values())
    assert not any(leaf.grad[:, 2:].any() for leaf in leaves.values())
    # The full size's vectors have the gradient of its own loss alone, never of a divergence.
    alone = vectors(5).requires_grad_()
    exact(INNER)(replace(pairs(), queries=alone, exits={})).backward()
    assert torch.equal(full.grad, alone.grad)


@pytest.mark.parametrize("name", ["infonce", "nt_xent", "siglip", "rzenembed"])
def test_divergences_are_a_mean_over_queries_whatever_rows_the_inner_loss_has(name: str) -> None:
    batch = everything(5)
    apart = [exact(of((2, 3), (4, 6), loss=EVERY[name], divergence=w))(batch) for w in (0.0, 1.0)]
    warm = exact(EVERY[name]).temperature
    q, d, n = (F.normalize(x, dim=1) for x in (batch.queries, batch.documents, batch.negatives))
    full = F.log_softmax(q @ torch.cat([d, n]).T / warm, 1)
    exit = batch.exits[2]
    q, d, n = (F.normalize(x[:, :3], dim=1) for x in (exit.queries, exit.documents, exit.negatives))
    expected = F.kl_div(F.log_softmax(q @ torch.cat([d, n]).T / warm, 1), full, reduction="batchmean", log_target=True)
    torch.testing.assert_close(apart[1] - apart[0], expected, rtol=1e-9, atol=0)


def test_vectors_that_are_missing_or_unusable_are_named() -> None:
    loss = exact(of((2, 2), (4, 6)))
    with pytest.raises(ExchangeError, match="the vectors after 2 layers"):
        loss(replace(pairs(), exits={}))
    broken = replace(pairs().exits[2], documents=torch.zeros(5, 6, dtype=torch.float64))
    with pytest.raises(
        ExchangeError, match="after 2 layers, the first 2 coordinates: documents row 0 is a zero vector"
    ):
        loss(replace(pairs(), exits={2: broken}))
    assert StarbucksConfig(**of((2, 2), (4, 4))).misfit(6) == (
        "starbucks.sizes: the last has 4 coordinates, the vectors have 6 dimensions"
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"sizes": [[0, 2]]}, "sizes must be positive"),
        ({"sizes": [[4, 2], [2, 4]]}, r"sizes must grow: \[4, 2\] stands before \[2, 4\]"),
        ({"sizes": [[2, 4], [4, 2]]}, "sizes must grow"),
        (
            {"sizes": [[2, 4]], "loss": {"name": "matryoshka", "dims": [2], "loss": {}}},
            "matryoshka cannot be inside starbucks",
        ),
    ],
)
def test_a_config_that_makes_no_sense(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_mapping(StarbucksConfig, {"loss": {}, **config})
