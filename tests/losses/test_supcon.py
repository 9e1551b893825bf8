"""SupCon (L_out) against loops over labels; the released one is in test_peers.py."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rayemb.losses import Batch
from rayemb.parallel import NO_KEY, ExchangeError
from tests.losses.common import cosines, exact, gradients, surprise, vectors


def by_loops(views: torch.Tensor, labels: list[int], temperature: float) -> float:
    logits = (cosines(views, views) / temperature).tolist()
    losses = []
    for i, label in enumerate(labels):
        positives = [j for j, other in enumerate(labels) if other == label and j != i]
        if positives:
            total = math.log(math.fsum(math.exp(logits[i][j]) for j in range(len(labels)) if j != i))
            losses.append(math.fsum(total - logits[i][j] for j in positives) / len(positives))
    return math.fsum(losses) / max(len(losses), 1)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.booleans(), st.integers(0, 1000))
def test_it_is_its_definition(labels: list[int], two_views: bool, seed: int) -> None:
    q, d = vectors(len(labels), seed=seed), vectors(len(labels), seed=seed + 1)
    batch = Batch(q, d if two_views else None, keys=torch.tensor(labels))
    expected = by_loops(torch.cat([q, d]) if two_views else q, labels * (1 + two_views), 0.2)
    loss = exact({"name": "supcon", "temperature": 0.2})
    assert loss(batch).item() == pytest.approx(expected, rel=1e-10, abs=1e-12)


def test_closed_form_of_two_classes() -> None:
    axes = torch.eye(2, dtype=torch.float64).repeat(3, 1)
    loss = exact({"name": "supcon", "temperature": 0.5})
    value = loss(Batch(axes, keys=torch.tensor([0, 1] * 3))).item()
    assert value == pytest.approx(surprise(2.0, [2.0] + [0.0] * 3))


def test_anchors_without_a_positive_do_not_count() -> None:
    rows = vectors(5)
    loss = exact({"name": "supcon"})
    value = loss(Batch(rows, keys=torch.tensor([0, 0, 1, 1, 7]))).item()
    assert value == pytest.approx(by_loops(rows, [0, 0, 1, 1, 7], 0.1))
    # Nobody has one: nothing to learn, and NO_KEY is not even equal to itself.
    for keys in (torch.arange(5), torch.full((5,), NO_KEY)):
        found = gradients(loss, Batch(rows, keys=keys))
        assert loss(Batch(rows, keys=keys)).item() == 0
        assert not found["queries"].any()


def test_labels_are_needed_and_documents_are_not() -> None:
    with pytest.raises(ExchangeError, match="SupCon needs keys: the labels"):
        exact({"name": "supcon"})(Batch(vectors(3)))
