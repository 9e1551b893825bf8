"""Focal reweighting against card S003's checks."""

import math
from typing import Any

import pytest
import torch

from rayemb.losses import Batch
from tests.losses.common import cosines, exact, gradients, surprise, vectors, with_cosines

INNER: dict[str, Any] = {"temperature": 0.3, "directions": ["query_to_document"]}


@pytest.mark.parametrize("gamma", [0.5, 2.0])
@pytest.mark.parametrize("detach", [True, False])
def test_it_is_its_formula_and_not_divided_by_the_weights(gamma: float, detach: bool) -> None:
    batch = Batch(vectors(5), vectors(5, seed=1), negatives=vectors(3, seed=2))
    q, d, n = (x.clone().requires_grad_() for x in (vectors(5), vectors(5, seed=1), vectors(3, seed=2)))
    s = torch.nn.functional.cosine_similarity(q[:, None], torch.cat([d, n])[None], dim=2)
    p = (s / 0.3).softmax(1).diagonal()
    weights = (1 - p) ** gamma
    expected = ((weights.detach() if detach else weights) * -p.log()).mean()
    expected.backward()
    loss = exact({"name": "focal", "gamma": gamma, "detach": detach, "loss": INNER})
    torch.testing.assert_close(loss(batch), expected, rtol=1e-12, atol=0)
    found = gradients(loss, batch)
    for name, leaf in (("queries", q), ("documents", d), ("negatives", n)):
        torch.testing.assert_close(found[name], leaf.grad, rtol=1e-9, atol=1e-14)


def test_gamma_0_is_the_loss_itself() -> None:
    batch = Batch(vectors(5), vectors(5, seed=1))
    loss, plain = exact({"name": "focal", "gamma": 0, "loss": INNER}), exact(INNER)
    assert torch.equal(loss(batch), plain(batch))
    assert torch.equal(gradients(loss, batch)["queries"], gradients(plain, batch)["queries"])


def test_a_worked_number() -> None:
    query, rows = with_cosines(0.7, 0.6, 0.1)
    batch = Batch(query, rows[:1], negatives=rows[1:])
    plain = surprise(0.7 / 0.3, [0.6 / 0.3, 0.1 / 0.3])
    assert exact({"name": "focal", "loss": INNER})(batch).item() == pytest.approx(
        math.sqrt(1 - math.exp(-plain)) * plain, rel=1e-12
    )


def test_where_everything_is_separated_it_vanishes_faster_than_infonce() -> None:
    axes = torch.eye(4, dtype=torch.float64)
    ratios = []
    for temperature in (0.5, 0.2, 0.1, 0.05):
        inner = {"temperature": temperature, "directions": ["query_to_document"]}
        plain = exact(inner)(Batch(axes, axes)).item()
        assert plain == pytest.approx(surprise(1 / temperature, [0.0] * 3))
        ratios.append(exact({"name": "focal", "loss": inner})(Batch(axes, axes)).item() / plain)
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-1] < 1e-4


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0])
def test_sure_and_hopeless_anchors_have_finite_gradients(gamma: float) -> None:
    rows = vectors(6, dtype=torch.float32)
    config = {"name": "focal", "gamma": gamma, "loss": {"temperature": 1e-3, "learnable_temperature": False}}
    loss = exact(config).float()
    for sign in (1, -1):
        found = gradients(loss, Batch(rows, sign * rows))
        assert all(gradient.isfinite().all() for gradient in found.values())
    assert loss(Batch(rows, -rows)).item() > 500
    assert loss(Batch(rows[:1], -rows[:1])).item() == 0
    assert not any(gradient.any() for gradient in gradients(loss, Batch(rows[:1], -rows[:1])).values())


def test_hard_anchors_keep_their_share() -> None:
    q, d = vectors(5), vectors(5, seed=1)
    s = (cosines(q, d) / 0.3).tolist()
    losses = [surprise(s[i][i], [s[i][j] for j in range(5) if j != i]) for i in range(5)]
    found = [
        exact({"name": "focal", "loss": INNER})(Batch(q[[i]], d[[i]], negatives=d[torch.arange(5) != i])).item()
        / losses[i]
        for i in range(5)
    ]
    order = sorted(range(5), key=lambda i: losses[i])
    assert sorted(range(5), key=lambda i: found[i]) == order
