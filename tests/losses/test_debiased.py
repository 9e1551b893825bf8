"""The debiased loss against its formula, number by number."""

import math

import pytest
import torch

from rayemb.losses import Batch
from tests.losses.common import cosines, exact, gradients, vectors, with_cosines


def one_row(positive: float, negatives: list[float], rate: float, temperature: float) -> float:
    """The paper's formula (and its released code), on exponentials."""
    p, number = math.exp(positive / temperature), len(negatives)
    mass = math.fsum(math.exp(s / temperature) for s in negatives)
    estimate = max((mass - rate * number * p) / (1 - rate), number * math.exp(-1 / temperature))
    return -math.log(p / (p + estimate))


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("symmetric", [False, True])
def test_it_is_its_formula(rate: float, symmetric: bool) -> None:
    q, d, n = vectors(5), vectors(5, seed=1), vectors(2, seed=2)
    losses = []
    for s in [cosines(q, torch.cat([d, n])), *([cosines(d, q)] if symmetric else [])]:
        for i, row in enumerate(s.tolist()):
            losses.append(one_row(row[i], row[:i] + row[i + 1 :], rate, 0.5))
    loss = exact({"name": "debiased", "positive_rate": rate, "symmetric": symmetric})
    assert loss(Batch(q, d, negatives=n)).item() == pytest.approx(math.fsum(losses) / len(losses), rel=1e-10)


@pytest.mark.parametrize(
    ("positive", "negatives", "rate", "expected"),
    [
        # tau 1: mass e^.2 + e^-.1; (2.126240 - .1 * 2 * e^.5) / .9 = 1.996107 > 2 / e; log(1 + 1.996107 / e^.5)
        (0.5, [0.2, -0.1], 0.1, 0.793309),
        # The correction would be negative: the floor 2 / e is left; log(1 + .735759 / e^.9)
        (0.9, [-0.9, -0.8], 0.5, 0.261700),
    ],
)
def test_worked_numbers(positive: float, negatives: list[float], rate: float, expected: float) -> None:
    query, rows = with_cosines(positive, *negatives)
    config = {"name": "debiased", "positive_rate": rate, "temperature": 1.0, "symmetric": False}
    batch = Batch(query, rows[:1], negatives=rows[1:])
    assert exact(config)(batch).item() == pytest.approx(one_row(positive, negatives, rate, 1.0), rel=1e-12)
    assert exact(config)(batch).item() == pytest.approx(expected, abs=1e-6)


def test_without_positives_in_disguise_it_is_infonce() -> None:
    batch = Batch(vectors(5), vectors(5, seed=1), negatives=vectors(3, seed=2), keys=torch.tensor([0, 0, 1, 2, 3]))
    loss, plain = exact({"name": "debiased", "positive_rate": 0}), exact({"temperature": 0.5, "duplicates": "ignore"})
    torch.testing.assert_close(loss(batch), plain(batch), rtol=1e-12, atol=0)
    # And its negatives' gradients: the floor is further away than any cosine.
    for name, gradient in gradients(plain, batch).items():
        if name in ("queries", "documents", "negatives"):
            torch.testing.assert_close(gradients(loss, batch)[name], gradient, rtol=1e-10, atol=1e-14)


def test_at_the_floor_the_negatives_get_no_gradient() -> None:
    query, rows = with_cosines(0.9, -0.9, -0.8)
    loss = exact({"name": "debiased", "positive_rate": 0.5, "temperature": 1.0, "symmetric": False})
    found = gradients(loss, Batch(query, rows[:1], negatives=rows[1:]))
    assert not found["negatives"].any()
    assert found["documents"].any()


def test_sharp_temperatures_do_not_overflow() -> None:
    rows = vectors(8, dtype=torch.float32)
    loss = exact({"name": "debiased", "temperature": 1e-3}).float()
    assert loss(Batch(rows, -rows)).item() == pytest.approx(2000, rel=0.4)
    assert all(gradient.isfinite().all() for gradient in gradients(loss, Batch(rows, -rows)).values())


def test_an_anchor_without_negatives_has_loss_0() -> None:
    batch = Batch(vectors(1), vectors(1, seed=1))
    loss = exact({"name": "debiased"})
    assert loss(batch).item() == 0
    assert not any(gradient.any() for gradient in gradients(loss, batch).values())
