"""Where a worker's time goes, how fast it is, and how much of its device's peak that is."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

# exchange: the loss, and the vectors that ranks show each other for it; what they exchange in backward counts there.
PHASES = ("data", "forward", "exchange", "backward", "step", "evaluate", "checkpoint")
# Dense peaks of the makers' data sheets, by name of the device: 16 bit, 32 bit (without TF32), FLOP/s.
PEAKS = {
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100": (989e12, 67e12),
    "A100": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "L4": (121e12, 30.3e12),
    "A10G": (70e12, 35e12),
    "A10": (125e12, 31.2e12),
    "V100": (125e12, 15.7e12),
    "T4": (65e12, 8.1e12),
}
SIDE, REPEATS = 768, 8  # of the product that measures a peak


class Clock:
    """Wall time of a worker by phase, since the last look at it.

    A GPU works on after a call has returned: what it does within a step is waited for only in steps that are
    `exact`, and theirs is the share that stands for all steps of an interval. Others cost no synchronisation.
    """

    WITHIN_STEP = ("forward", "exchange", "backward", "step")

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._cuda, self._exact = device.type == "cuda", True
        self._phase: str | None = None
        self._since = self._began = now()
        self._spent: dict[str, float] = {}
        self._steps = self._exact_steps = 0

    def begin_step(self, exact: bool) -> None:
        """Begins a step: a GPU is waited for in it where it is `exact`."""
        self._exact = exact or not self._cuda
        self._steps += 1
        self._exact_steps += self._exact

    def at(self, phase: str | None) -> None:
        """From now on it is this phase; None and unknown ones are none."""
        if self._cuda and self._exact and (phase in self.WITHIN_STEP or self._phase in self.WITHIN_STEP):
            torch.cuda.synchronize()
        now = self._now()
        if self._phase is not None and (self._exact or self._phase not in self.WITHIN_STEP):
            self._spent[self._phase] = self._spent.get(self._phase, 0.0) + now - self._since
        self._phase, self._since = phase if phase in PHASES else None, now

    def shares(self) -> dict[str, float]:
        """`time/<phase>` → its share of the time since the last call, in [0, 1]; then begins anew."""
        self.at(self._phase)
        elapsed = max(self._since - self._began, 1e-9)
        scale = self._steps / self._exact_steps if self._exact_steps else 1.0
        found = {}
        for phase in PHASES:
            spent = self._spent.get(phase, 0.0) * (scale if phase in self.WITHIN_STEP else 1.0)
            found[f"time/{phase}"] = min(1.0, spent / elapsed)
        self._spent, self._began = {}, self._since
        self._steps = self._exact_steps = 0
        return found


@torch.no_grad()
def forward_flops(engine: Any, batch: dict[str, torch.Tensor]) -> int:
    """Floating-point operations of this rank's forward over a batch; collective, as the forward is."""
    with FlopCounterMode(display=False) as counter:
        engine(batch)
    return int(counter.get_total_flops())


def peak_flops(device: torch.device, precision: str) -> float:
    """What the device can do at most, in FLOP/s: of its data sheet, or measured where it has none that is known."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for known, (half, full) in PEAKS.items():
            if known in name:
                return full if precision == "fp32" else half
    dtype = torch.float32 if precision == "fp32" or device.type != "cuda" else torch.bfloat16
    a = torch.ones(SIDE, SIDE, dtype=dtype, device=device)
    best = float("inf")
    for _ in range(REPEATS):
        began = time.perf_counter()
        float((a @ a)[0, 0])  # reading a value waits for the device
        best = min(best, time.perf_counter() - began)
    return 2 * SIDE**3 / best
