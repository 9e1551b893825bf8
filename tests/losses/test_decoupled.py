"""DCL against loops and closed forms."""

import math

import pytest
import torch

from rayemb.losses import Batch
from tests.losses.common import cosines, exact, gradients, vectors


def side(logits: list[list[float]], keys: list[int]) -> list[float]:
    """The log-sum-exp of the negatives, without the positive, minus the positive."""
    losses = []
    for i, row in enumerate(logits):
        negatives = [x for j, x in enumerate(row) if j >= len(keys) or keys[j] != keys[i]]
        losses.append(math.log(math.fsum(map(math.exp, negatives))) - row[i] if negatives else 0.0)
    return losses


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("more", [0, 2])
def test_it_is_its_definition(symmetric: bool, more: int) -> None:
    q, d, n = vectors(4), vectors(4, seed=1), vectors(more, seed=2)
    keys = [0, 0, 1, 2]
    losses = side((cosines(q, torch.cat([d, n])) / 0.2).tolist(), keys)
    losses += side((cosines(d, q) / 0.2).tolist(), keys) if symmetric else []
    loss = exact({"name": "decoupled", "temperature": 0.2, "symmetric": symmetric})
    batch = Batch(q, d, negatives=n if more else None, keys=torch.tensor(keys))
    assert loss(batch).item() == pytest.approx(math.fsum(losses) / len(losses), rel=1e-12)


def test_it_has_no_lower_bound() -> None:
    axes = torch.eye(5, dtype=torch.float64)
    value = exact({"name": "decoupled", "temperature": 0.05})(Batch(axes, axes)).item()
    assert value == pytest.approx(math.log(4) - 20)


def test_an_easy_positive_does_not_switch_its_negatives_off() -> None:
    axes = torch.eye(4, dtype=torch.float64)
    batch = Batch(axes, axes)
    weak = gradients(exact({"temperature": 0.05}), batch)["documents"]
    strong = gradients(exact({"name": "decoupled", "temperature": 0.05}), batch)["documents"]
    assert weak.abs().max() < 1e-6
    assert strong.abs().max() > 1


def test_an_anchor_without_negatives_has_loss_0() -> None:
    for batch in (
        Batch(vectors(1), vectors(1, seed=1)),
        Batch(vectors(3), vectors(3, seed=1), keys=torch.zeros(3, dtype=torch.int64)),
    ):
        loss = exact({"name": "decoupled"})
        assert loss(batch).item() == 0
        assert not any(gradient.any() for gradient in gradients(loss, batch).values())
