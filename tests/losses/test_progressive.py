"""Progressive weights against card S130's checks (its formula is a stand-in)."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from rayemb.config import ConfigError, from_mapping
from rayemb.losses import Batch, Progressive, ProgressiveConfig
from rayemb.losses.base import Loss, Rows
from rayemb.parallel import Alone, Exchange
from tests.losses.common import cosines, exact, surprise, vectors

INNER: dict[str, Any] = {"temperature": 0.3, "directions": ["query_to_document"]}


class Known(Loss):
    """Losses that the test chooses."""

    def __init__(self, losses: list[float], counted: list[float] | None = None) -> None:
        super().__init__()
        self.losses = torch.tensor(losses, dtype=torch.float64)
        self.counted = torch.tensor(counted or [1.0] * len(losses), dtype=torch.float64)

    def rows(self, batch: Batch, exchange: Exchange) -> Rows:
        return Rows(self.losses, self.counted)


def weights(losses: list[float], progress: float, counted: list[float] | None = None, **fields: Any) -> Tensor:
    """What each of the losses is multiplied by."""
    config = from_mapping(ProgressiveConfig, {"loss": {}, **fields})
    batch = replace(Batch(vectors(1)), progress=progress)
    return Progressive(config, Known(losses, counted)).rows(batch, Alone()).losses / torch.tensor(
        losses, dtype=torch.float64
    )


def bells(number: int, centre: float, width: float = 0.3, cut: float = 1.0) -> list[float]:
    """Weights of `number` anchors, easiest first."""
    raw = []
    for rank in range(number):
        percentile = rank / (number - 1)
        raw.append(math.exp(-((percentile - centre) ** 2) / (2 * width**2)) if percentile <= cut else 0.0)
    return [number * w / math.fsum(raw) for w in raw]


@pytest.mark.parametrize(("progress", "centre", "cut"), [(0.0, 0.2, 0.98), (0.49, 0.494, 0.98), (1.0, 0.8, 1.0)])
def test_weights_are_a_bell_over_the_percentiles(progress: float, centre: float, cut: float) -> None:
    found = weights([0.1, 0.7, 0.4, 2.0, 1.1], progress)
    expected = bells(5, centre, cut=cut)
    assert found[[0, 2, 1, 4, 3]].tolist() == pytest.approx(expected, rel=1e-10)
    assert found.mean().item() == pytest.approx(1)


def test_at_the_start_it_falls_with_difficulty_and_at_the_end_it_rises() -> None:
    losses = [0.05 * (1 + i) for i in range(30)]
    start, end = weights(losses, 0.0, noise_above=1), weights(losses, 1.0)
    percentile = torch.arange(30) / 29
    assert (start[percentile > 0.2].diff() < 0).all()
    assert (end[percentile < 0.8].diff() > 0).all()


def test_noise_is_left_out_while_it_lasts() -> None:
    losses = [0.1 * (1 + i) for i in range(100)]
    assert weights(losses, 0.49)[-2:].tolist() == [0, 0]
    assert (weights(losses, 0.49)[:-2] > 0).all()
    assert (weights(losses, 0.5) > 0).all()
    assert (weights(losses, 0.0, noise_until=0) > 0).all()


def test_infinitely_wide_it_is_the_inner_loss() -> None:
    batch = replace(Batch(vectors(6), vectors(6, seed=1)), progress=0.2)
    config = {"name": "progressive", "width": 1e6, "noise_above": 1, "loss": INNER}
    torch.testing.assert_close(exact(config)(batch), exact(INNER)(batch), rtol=1e-10, atol=0)


def test_frozen_at_its_start_it_does_not_follow_the_training() -> None:
    batch = Batch(vectors(6), vectors(6, seed=1))
    loss = exact({"name": "progressive", "start": 0.4, "end": 0.4, "noise_until": 0, "loss": INNER})
    assert torch.equal(loss(batch), loss(replace(batch, progress=1.0)))


def test_anchors_alike_weigh_alike() -> None:
    assert weights([0.7] * 6, 0.1).tolist() == pytest.approx([1.0] * 6)
    assert weights([0.7], 0.1).tolist() == pytest.approx([1.0])
    axes = torch.eye(4, dtype=torch.float64)
    batch = Batch(axes, axes)
    assert exact({"name": "progressive", "loss": INNER})(batch).item() == pytest.approx(surprise(1 / 0.3, [0.0] * 3))
    # Of two alike and one harder, the two share a percentile: 1/4 and 1.
    raw = [math.exp(-((r - 0.8) ** 2) / 0.18) for r in (0.25, 0.25, 1.0)]
    assert weights([0.5, 0.5, 2.0], 1.0).tolist() == pytest.approx([3 * w / sum(raw) for w in raw])


def test_uncounted_anchors_have_no_percentile() -> None:
    found = weights([0.1, 9.0, 0.7, 0.4], 1.0, counted=[1, 0, 1, 1])
    assert found[[0, 3, 2]].tolist() == pytest.approx(bells(3, 0.8))
    # Not even where theirs would be much nearer to the bell's centre than any other.
    found = weights([0.1, 0.5, 0.9], 0.5, counted=[1, 0, 1], width=1e-3)
    assert found.isfinite().all()
    assert found[[0, 2]].mean().item() == pytest.approx(1)


def test_the_whole_loss_and_its_gradient() -> None:
    q, d = vectors(5).requires_grad_(), vectors(5, seed=1)
    s = torch.nn.functional.cosine_similarity(q[:, None], d[None], dim=2)
    losses = torch.nn.functional.cross_entropy(s / 0.3, torch.arange(5), reduction="none")
    order = losses.argsort().argsort().tolist()
    expected = (losses * torch.tensor(bells(5, 0.8))[order]).mean()
    assert cosines(q, d).isfinite().all()
    (gradient,) = torch.autograd.grad(expected, q)
    batch = replace(Batch(vectors(5).requires_grad_(), d), progress=1.0)
    value = exact({"name": "progressive", "loss": INNER})(batch)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    value.backward()
    torch.testing.assert_close(batch.queries.grad, gradient, rtol=1e-6, atol=1e-9)


def test_a_narrow_bell_between_two_anchors_still_has_mean_1() -> None:
    found = weights([0.1, 0.9], 0.5, width=1e-3)  # exp(-125000) is 0 in any dtype
    assert found.isfinite().all()
    assert found.mean().item() == pytest.approx(1)


def test_progressive_weights_of_progressive_weights_are_refused() -> None:
    with pytest.raises(ConfigError, match="one schedule is enough"):
        from_mapping(ProgressiveConfig, {"loss": {"name": "progressive", "loss": {}}})
