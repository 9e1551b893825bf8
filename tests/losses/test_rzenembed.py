"""RzenEmbed against card S106's numbers, loops and finite differences."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from rayemb.losses import Batch
from rayemb.parallel import ExchangeError
from tests.losses.common import cosines, exact, gradients, surprise, vectors, with_cosines

PLAIN: dict[str, Any] = {"name": "rzenembed", "hardness": 0, "false_negative_above": 1}


def blocks(rows: int = 5, more: int = 3) -> Batch:
    return Batch(vectors(rows), vectors(rows, seed=1), negatives=vectors(more, seed=2))


@pytest.mark.parametrize("detach", [True, False])
def test_the_cards_numbers(detach: bool) -> None:
    query, rows = with_cosines(0.7, 0.6, 0.1)
    batch = Batch(query, rows[:1], negatives=rows[1:])
    config = {"name": "rzenembed", "temperature": 0.02, "detach_hardness": detach}
    assert exact({**config, "hardness": 0})(batch).item() == pytest.approx(0.0067, abs=5e-5)
    assert exact({**config, "hardness": 9})(batch).item() == pytest.approx(0.9130, abs=5e-5)


@pytest.mark.parametrize("detach", [True, False])
@pytest.mark.parametrize("above", [0.3, 0.95, 1.0])
def test_it_is_its_definition(detach: bool, above: float) -> None:
    batch = replace(blocks(), keys=torch.tensor([0, 1, 1, 2, 3]))
    assert batch.documents is not None
    assert batch.negatives is not None
    candidates = torch.cat([batch.documents, batch.negatives])
    s, alike = cosines(batch.queries, candidates), cosines(batch.documents, candidates)
    losses, dropped = [], 0
    for i in range(5):
        negatives = []
        for j in range(8):
            vetoed = bool(alike[i, j] > above) and above < 1
            duplicate = {i, j} == {1, 2}
            dropped += vetoed and i != j
            if i != j and not vetoed and not duplicate:
                negatives.append(float(s[i, j]) / 0.2 + 9 * float(s[i, j]))
        losses.append(surprise(float(s[i, i]) / 0.2, negatives))
    assert (dropped > 0) == (above == 0.3)
    config = {"name": "rzenembed", "temperature": 0.2, "false_negative_above": above, "detach_hardness": detach}
    assert exact(config)(batch).item() == pytest.approx(math.fsum(losses) / 5, rel=1e-10)


@pytest.mark.parametrize("detach", [True, False])
def test_neutral_values_give_infonce(detach: bool) -> None:
    batch, config = blocks(), {"temperature": 0.05, "learnable_temperature": True}
    plain = exact({**config, "directions": ["query_to_document"]})
    loss = exact({**PLAIN, **config, "detach_hardness": detach})
    torch.testing.assert_close(loss(batch), plain(batch), rtol=1e-14, atol=0)
    for name, gradient in gradients(plain, batch).items():
        torch.testing.assert_close(gradients(loss, batch)[name].squeeze(), gradient.squeeze(), rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("detach", [True, False])
def test_gradients_are_those_of_the_formula(detach: bool) -> None:
    batch = blocks()
    assert batch.documents is not None
    assert batch.negatives is not None
    q, d, n, theta = (
        x.clone().requires_grad_()
        for x in (batch.queries, batch.documents, batch.negatives, torch.tensor(math.log(0.2), dtype=torch.float64))
    )
    s = torch.nn.functional.cosine_similarity(q[:, None], torch.cat([d, n])[None], dim=2)
    weights = (9 * (s.detach() if detach else s)) * (1 - torch.eye(5, 8))
    expected = torch.nn.functional.cross_entropy(s * torch.exp(-theta) + weights, torch.arange(5))
    expected.backward()
    loss = exact({"name": "rzenembed", "temperature": 0.2, "detach_hardness": detach, "false_negative_above": 1})
    found = gradients(loss, batch)
    for name, leaf in (("queries", q), ("documents", d), ("negatives", n)):
        torch.testing.assert_close(found[name], leaf.grad, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(-found["scale.log_scale"][0], theta.grad, rtol=1e-10, atol=0)


@pytest.mark.parametrize("detach", [True, False])
def test_the_gradient_of_each_tasks_temperature_equals_finite_differences(detach: bool) -> None:
    loss = exact({"name": "rzenembed", "tasks": 3, "temperature": 0.2, "detach_hardness": detach})
    batch = replace(blocks(), tasks=torch.tensor([0, 2, 2, 0, 2]))
    found = gradients(loss, batch)["scale.log_scale"]
    assert found[1] == 0

    def at(task: int, theta: float) -> float:
        with torch.no_grad():
            loss.scale.log_scale.fill_(-math.log(0.2))[task] -= theta  # log tau, not log scale
        return loss(batch).item()

    for task in (0, 2):
        slope = (at(task, 1e-5) - at(task, -1e-5)) / 2e-5
        assert -found[task].item() == pytest.approx(slope, rel=1e-6)
    assert loss.temperature == pytest.approx((2 * 0.2 + 0.2 * math.exp(-1e-5)) / 3)


def test_each_task_has_its_own_temperature() -> None:
    batch = replace(blocks(4), tasks=torch.tensor([0, 1, 1, 0]))
    loss = exact({**PLAIN, "tasks": 2})
    with torch.no_grad():
        loss.scale.log_scale.copy_(-torch.tensor([0.1, 0.4], dtype=torch.float64).log())
    each = [exact({"temperature": t, "directions": ["query_to_document"]}) for t in (0.1, 0.4)]
    whole = replace(batch, tasks=None)
    assert whole.documents is not None
    parts = []
    for i, task in enumerate([0, 1, 1, 0]):
        others = torch.cat([whole.documents[torch.arange(4) != i], vectors(3, seed=2)])
        parts.append(each[task](Batch(whole.queries[[i]], whole.documents[[i]], negatives=others)).item())
    assert loss(batch).item() == pytest.approx(math.fsum(parts) / 4, rel=1e-10)


def test_near_duplicates_of_the_positive_are_no_negatives() -> None:
    documents = vectors(3, seed=1)
    batch = Batch(vectors(3), documents, negatives=documents + 1e-3 * vectors(3, seed=2))
    loss = exact({"name": "rzenembed", "hardness": 0})
    expected = []
    s, n = cosines(batch.queries, documents), cosines(batch.queries, batch.negatives)
    for i in range(3):
        kept = [float(x[i, j]) / 0.05 for x in (s, n) for j in range(3) if j != i]
        expected.append(surprise(float(s[i, i]) / 0.05, kept))
    assert loss(batch).item() == pytest.approx(math.fsum(expected) / 3, rel=1e-10)


def test_candidates_just_as_close_as_the_threshold_stay() -> None:
    axes = torch.eye(4, 6, dtype=torch.float64)
    batch = Batch(vectors(4), axes)  # documents at a cosine of 0, without rounding
    kept = exact({"name": "rzenembed", "false_negative_above": 0})
    assert kept(batch).item() == exact({"name": "rzenembed", "false_negative_above": 1})(batch).item()


def test_without_any_negative_left_the_loss_is_0() -> None:
    same = vectors(1, seed=1).expand(4, 6)
    batch = Batch(vectors(4), same * torch.tensor([[1.0], [2], [3], [4]]))
    for detach in (True, False):
        loss = exact({"name": "rzenembed", "detach_hardness": detach})
        assert loss(batch).item() == 0
        assert not any(gradient.any() for gradient in gradients(loss, batch).values())


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (replace(blocks(2, 0), tasks=torch.tensor([0, 7])), r"tasks has 7; RzenEmbed was built for 2 task\(s\)"),
        (replace(blocks(2, 0), tasks=torch.tensor([-1, 0])), "tasks has -1"),
        (replace(blocks(2, 1), weights=torch.ones(2, 3)), "weights are not supported"),
    ],
)
def test_a_batch_it_cannot_use(batch: Batch, message: str) -> None:
    with pytest.raises(ExchangeError, match=message):
        exact({"name": "rzenembed", "tasks": 2})(batch)
