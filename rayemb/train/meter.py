"""How fast a training is: pairs, tokens, share of the peak, and where the time goes."""

import time
from typing import Any

import torch

from rayemb.data.stream import Batch
from rayemb.models import PADDING
from rayemb.parallel import Exchange
from rayemb.train.clock import Clock, forward_flops, peak_flops

# A backward costs two forwards. What is computed twice to save memory is not counted: it is no progress.
PASSES = 3


class Meter:
    """The speeds of all workers together; `measure` and `figures` are collective."""

    def __init__(self, clock: Clock, exchange: Exchange) -> None:
        self.clock, self._exchange = clock, exchange
        self._flops_per_row: float | None = None
        self._peak = 0.0
        self._began = self._since = time.monotonic()
        self._seen = self._rows = self._tokens = 0

    def measure(self, engine: Any, batch: dict[str, torch.Tensor], precision: str, peak: float | None) -> None:
        """Counts the operations of a forward over `batch`, once. `peak`: of a worker's device, null: found out."""
        device = torch.device(engine.device)
        peak = peak_flops(device, precision) if peak is None else peak
        engine.eval()  # no dropout: the random numbers of the training must not move
        flops = forward_flops(engine, batch)
        engine.train()
        mine = torch.tensor([[flops, batch["tokens"].shape[0], peak]], dtype=torch.float64)
        total, rows, self._peak = self._exchange.everyone(mine).sum(0).tolist()
        self._flops_per_row = total / rows if rows else None
        self._began = self._since = time.monotonic()

    @property
    def measured(self) -> bool:
        """Whether `measure` has been called."""
        return self._peak > 0

    def take(self, batch: Batch) -> None:
        """Counts a step's rows (of all workers) and tokens (of this one)."""
        self._rows += batch.rows
        self._tokens += sum(int((v != PADDING).sum()) for name, v in batch.arrays.items() if name.endswith("tokens"))

    def figures(self) -> dict[str, float | None]:
        """Speeds since the last call and overall since the start, MFU and shares of this worker's time."""
        now = time.monotonic()
        tokens = float(self._exchange.everyone(torch.tensor([self._tokens])).sum())
        elapsed, self._since = max(now - self._since, 1e-9), now
        self._seen += self._rows
        pace = self._rows / elapsed
        self._rows = self._tokens = 0
        mfu = PASSES * self._flops_per_row * pace / self._peak if self._flops_per_row else None
        return {
            "pairs_per_second": pace,
            "pairs_per_second_overall": self._seen / max(now - self._began, 1e-9),
            "tokens_per_second": tokens / elapsed,
            "mfu": mfu,
            **self.clock.shares(),
        }
