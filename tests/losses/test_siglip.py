"""SigLIP against loops over yes-or-no questions; the released one is in test_peers.py."""

import math

import pytest
import torch

from rayemb.losses import Batch
from tests.losses.common import built, cosines, exact, gradients, vectors


def answer(logit: float, yes: bool) -> float:
    return math.log1p(math.exp(-logit if yes else logit))


@pytest.mark.parametrize("duplicates", ["positive", "ignore", "negative"])
@pytest.mark.parametrize("more", [0, 3])
def test_it_is_its_definition(duplicates: str, more: int) -> None:
    q, d, n = vectors(4), vectors(4, seed=1), vectors(more, seed=2)
    keys = [0, 0, 1, 2]
    logits = (cosines(q, torch.cat([d, n])) * 10 - 2.5).tolist()
    total = 0.0
    for i in range(4):
        for j in range(4 + more):
            same = j < 4 and keys[i] == keys[j] and i != j
            if not (same and duplicates == "ignore"):
                total += answer(logits[i][j], i == j or (same and duplicates == "positive"))
    loss = exact({"name": "siglip", "bias": -2.5, "duplicates": duplicates})
    batch = Batch(q, d, negatives=n if more else None, keys=torch.tensor(keys))
    assert loss(batch).item() == pytest.approx(total / 4, rel=1e-12)  # over the batch, not over the pairs


def test_soft_labels_count_as_much_as_they_weigh() -> None:
    q, d = vectors(2), vectors(2, seed=1)
    logits = (cosines(q, d) * 10 - 2).tolist()
    weights = torch.tensor([[1.0, 0.0], [0.25, 0.5]])
    total = answer(logits[0][0], True) + answer(logits[0][1], False)
    total += 0.25 * answer(logits[1][0], True) + 0.5 * answer(logits[1][1], True)
    loss = exact({"name": "siglip", "bias": -2.0})
    assert loss(Batch(q, d, weights=weights)).item() == pytest.approx(total / 2, rel=1e-12)


def test_closed_form_of_vectors_all_alike() -> None:
    same = torch.ones(5, 3, dtype=torch.float64)
    value = exact({"name": "siglip", "temperature": 1.0, "bias": -1.0})(Batch(same, same)).item()
    assert value == pytest.approx(5 * math.log(2))


def test_the_gradient_of_the_bias_is_the_surplus_of_yes() -> None:
    batch = Batch(vectors(5), vectors(5, seed=1))
    logits = cosines(batch.queries, batch.documents) * 10 - 2
    expected = (torch.sigmoid(logits).sum() - 5) / 5
    found = gradients(exact({"name": "siglip", "bias": -2.0}), batch)
    torch.testing.assert_close(found["bias"][0], expected)


def test_the_bias_can_be_held() -> None:
    assert [n for n, p in built({"name": "siglip"}).named_parameters() if p.requires_grad] == [
        "bias",
        "scale.log_scale",
    ]
    held = built({"name": "siglip", "learnable_bias": False, "learnable_temperature": False})
    assert not any(p.requires_grad for p in held.parameters())


def test_extreme_logits_stay_finite() -> None:
    rows = vectors(8, dtype=torch.float32)
    loss = built({"name": "siglip", "temperature": 1e-3, "learnable_temperature": False, "bias": 500.0})
    assert 1000 < loss(Batch(rows, -rows)).item() < 1e4
    assert all(gradient.isfinite().all() for gradient in gradients(loss, Batch(rows, -rows)).values())
