"""Phases of a worker's time; operations of a forward by hand; a peak that a real product does not pass."""

import pytest
import torch
from torch import nn

from rayemb.train.clock import PHASES, Clock, forward_flops, peak_flops

CPU = torch.device("cpu")


def test_the_shares_are_those_of_the_phases_since_the_last_look() -> None:
    times = iter([0.0, 1.0, 3.0, 6.0, 7.0, 9.0, 10.0, 11.0, 15.0])
    clock = Clock(CPU, lambda: next(times))
    for phase in ("data", "forward", "report", "forward", "step"):
        clock.begin_step(exact=False)
        clock.at(phase)
    shares = clock.shares()  # at 10
    assert list(shares) == [f"time/{phase}" for phase in PHASES]
    # Nothing in 0-1, data 1-3, forward 3-6, something else 6-7, forward 7-9, the step 9-10.
    expected = {"data": 0.2, "forward": 0.5, "step": 0.1}
    assert shares == pytest.approx({f"time/{phase}": expected.get(phase, 0.0) for phase in PHASES})
    clock.at("data")  # at 11: the step went on
    assert clock.shares() == pytest.approx(
        {f"time/{phase}": {"step": 0.2, "data": 0.8}.get(phase, 0.0) for phase in PHASES}
    )


def test_the_operations_of_a_forward_are_counted() -> None:
    module = nn.Sequential(nn.Linear(10, 20), nn.GELU(), nn.Linear(20, 3))
    assert forward_flops(module, torch.zeros(7, 10)) == 2 * 7 * (10 * 20 + 20 * 3)


def test_a_peak_is_measured_where_none_is_known() -> None:
    for precision in ("fp32", "bf16"):
        assert 1e8 < peak_flops(CPU, precision) < 1e15
