"""The temperature: where it starts, its floor and the way back from it, one per task."""

import math

import pytest
import torch
from torch import Tensor

from rayemb.config import ConfigError, from_mapping
from rayemb.losses import Batch, InfoNCEConfig
from rayemb.losses.temperature import Temperature, TemperatureConfig
from tests.losses.common import built, exact, vectors


def test_it_starts_where_the_config_says() -> None:
    assert built({"temperature": 0.05}).temperature == pytest.approx(0.05)
    assert built({"name": "focal", "loss": {"temperature": 0.05}}).temperature == pytest.approx(0.05)


def test_its_gradient_equals_finite_differences() -> None:
    batch = Batch(vectors(4, seed=3), vectors(4, seed=4))

    def at(temperature: float) -> float:
        return exact({"temperature": temperature})(batch).item()

    loss = exact({"temperature": 0.2})
    loss(batch).backward()
    step = 1e-5
    slope = (at(0.2 * math.exp(-step)) - at(0.2 * math.exp(step))) / (2 * step)
    assert loss.scale.log_scale.grad.item() == pytest.approx(slope, rel=1e-6)


def test_it_never_goes_below_its_floor() -> None:
    loss = exact({"min_temperature": 0.02})
    with torch.no_grad():
        loss.scale.log_scale.fill_(100.0)
    assert loss.temperature == pytest.approx(0.02)
    batch = Batch(vectors(3), vectors(3, seed=1))
    torch.testing.assert_close(loss(batch), exact({"temperature": 0.02})(batch))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_beyond_its_floor_it_can_come_back_and_cannot_go_further(sign: float) -> None:
    loss = exact({"min_temperature": 0.02})
    with torch.no_grad():
        loss.scale.log_scale.fill_(10.0)
    anchors = vectors(6, seed=1)
    # Perfect pairs want a sharper softmax, wrong pairs a softer one.
    loss(Batch(anchors, sign * anchors)).backward()
    gradient = loss.scale.log_scale.grad.item()
    assert gradient > 0 if sign < 0 else gradient == 0


def test_training_moves_it_to_its_floor_and_back() -> None:
    loss = exact({"temperature": 0.05, "min_temperature": 0.02})
    optimizer = torch.optim.Adam(loss.parameters(), lr=0.1)
    anchors = vectors(6, seed=1)
    for sign, steps in ((1.0, 60), (-1.0, 60)):
        for _ in range(steps):
            optimizer.zero_grad()
            loss(Batch(anchors, sign * anchors)).backward()
            optimizer.step()
        if sign > 0:
            assert loss.temperature == pytest.approx(0.02)
    assert loss.temperature is not None
    assert loss.temperature > 0.1


def test_a_fixed_one_is_not_trained_and_has_no_floor() -> None:
    loss = built({"temperature": 0.001, "learnable_temperature": False})
    assert loss.temperature == pytest.approx(0.001, rel=1e-5)
    assert not any(p.requires_grad for p in loss.parameters())


def test_a_start_below_the_floor_is_refused() -> None:
    with pytest.raises(ConfigError, match="below min_temperature"):
        from_mapping(InfoNCEConfig, {"temperature": 0.005})


def test_each_task_has_its_own_and_its_own_gradient() -> None:
    temperature = Temperature(TemperatureConfig(temperature=0.5), tasks=3).double()
    scale = temperature.scale(torch.tensor([2, 0, 2]))
    torch.testing.assert_close(scale, torch.full((3,), 2.0, dtype=torch.float64), rtol=1e-7, atol=0)
    (scale * torch.tensor([1.0, 10.0, 100.0])).sum().backward()
    gradient: Tensor | None = temperature.log_scale.grad
    assert gradient is not None
    assert gradient.tolist() == pytest.approx([20, 0, 202])


def test_a_16_bit_parameter_still_gives_an_fp32_scale() -> None:
    assert Temperature(TemperatureConfig()).bfloat16().scale().dtype == torch.float32
