"""The learning rate of each step, against closed forms."""

import math

import pytest

from rayemb.config import load
from rayemb.train import TrainConfig


def rates(*overrides: str, peak: float = 2e-3, steps: int = 100) -> list[float]:
    schedule = load(TrainConfig, None, overrides).schedule
    return [schedule.rate(peak, step, steps) for step in range(steps)]


def test_the_default_is_a_warm_up_and_half_a_cosine_to_zero() -> None:
    expected = [2e-3 * min(1.0, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / 100)) for step in range(100)]
    assert rates() == expected  # to the last bit
    assert rates("schedule.warmup_steps=0")[0] == 2e-3


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd", "constant"])
def test_warm_up_is_linear_and_no_rate_is_above_the_peak(name: str) -> None:
    found = rates(f"schedule={{name: {name}, warmup_steps: 10}}", peak=1.0)
    flat = rates(f"schedule={{name: {name}, warmup_steps: 0}}", peak=1.0)
    assert found[:10] == pytest.approx([(step + 1) / 10 * flat[step] for step in range(10)])
    assert found[10:] == flat[10:]
    assert max(found) <= 1.0


def test_each_shape_comes_down_in_its_way() -> None:
    linear = rates("schedule={name: linear, warmup_steps: 0, final_fraction: 0.1}", peak=1.0)
    assert linear == pytest.approx([1 - 0.9 * step / 100 for step in range(100)])
    wsd = rates("schedule={name: wsd, warmup_steps: 0, final_fraction: 0.1, decay_fraction: 0.25}", peak=1.0)
    assert wsd == pytest.approx([1.0] * 76 + [0.1 + 0.9 * (100 - step) / 25 for step in range(76, 100)])
    assert rates("schedule={name: constant, warmup_steps: 0}", peak=1.0) == [1.0] * 100
    cosine = rates("schedule={name: cosine, warmup_steps: 0, final_fraction: 0.1}", peak=1.0)
    assert cosine[50] == pytest.approx(0.55)
    assert 0.1 < cosine[-1] < 0.101
