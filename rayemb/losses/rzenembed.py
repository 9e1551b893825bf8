"""RzenEmbed: hardness-weighted InfoNCE without false negatives, a temperature per task (2025; card S106)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from rayemb.losses.base import Batch, Rows, scaled, unit
from rayemb.losses.softmax import softmax_loss
from rayemb.losses.temperature import ScaledLoss, Temperature, TemperatureConfig
from rayemb.parallel import Exchange, Side, Veto, contrast


class RzenEmbedConfig(TemperatureConfig):
    """Negatives count exp(alpha * cosine) times, unless they look like the positive itself."""

    name: Literal["rzenembed"] = "rzenembed"
    temperature: float = Field(0.05, gt=0, description="softmax temperature of every task, or its start")
    min_temperature: float = Field(0.01, gt=0, description="floor of a learnable temperature")
    tasks: int = Field(1, ge=1, description="temperatures, one for each task id 0 .. tasks - 1")
    hardness: float = Field(9.0, ge=0, description="alpha: a negative's weight is exp(alpha * cosine); 0 for none")
    detach_hardness: bool = Field(
        True, description="weights are constants; if not, hardness is a sharper temperature for negatives alone"
    )
    false_negative_above: float = Field(
        0.95, gt=-1, le=1, description="candidates this close to the positive are no negatives; 1 keeps them all"
    )

    @property
    def needs(self) -> frozenset[str]:
        """See `LossConfig`."""
        return frozenset({"tasks"}) if self.tasks > 1 else frozenset()

    def build(self, dim: int) -> RzenEmbed:
        """The loss."""
        return RzenEmbed(self)


class RzenEmbed(ScaledLoss):
    """Choose it for mixtures of tasks with unequal difficulty and near-duplicate documents.

    Queries seek documents; a batch should be of one task (`Batch.tasks`, all 0 if not given). Equal keys are ignored.
    """

    def __init__(self, config: RzenEmbedConfig) -> None:
        super().__init__()
        self.config = config
        self.scale = Temperature(config, config.tasks)

    def rows(self, batch: Batch, exchange: Exchange) -> Rows:
        """B rows."""
        config = self.config
        tasks = batch.tasks if batch.tasks is not None else torch.zeros_like(batch.own)
        scale, candidates = self.scale.scale(tasks), batch.candidates()
        detached = config.detach_hardness
        anchors = unit(batch.queries)
        side, _ = contrast(
            scaled(anchors, scale if detached else scale + config.hardness),
            candidates,
            batch.pairs("ignore", self._vetoes(candidates, batch)),
            exchange=exchange,
            boost_B=1 + config.hardness / scale.detach() if detached and config.hardness else None,
        )
        return softmax_loss(side if detached else _rescaled(side, scale / (scale + config.hardness)))

    def _vetoes(self, candidates: Tensor, batch: Batch) -> tuple[Veto, ...]:
        if self.config.false_negative_above >= 1:
            return ()
        found = candidates.detach()
        positives = found[: batch.queries.shape[0]]
        above = torch.full_like(positives[:, 0], self.config.false_negative_above)
        return (Veto(above, anchors=positives, candidates=found),)

    def problem(self, batch: Batch) -> str | None:
        """See `Loss.problem`."""
        if batch.tasks is not None and batch.tasks.numel():
            low, high = int(batch.tasks.min()), int(batch.tasks.max())
            if low < 0 or high >= self.config.tasks:
                return f"tasks has {low if low < 0 else high}; RzenEmbed was built for {self.config.tasks} task(s)"
        if batch.weights is not None:
            return "RzenEmbed knows one positive per query: weights are not supported"
        return super().problem(batch)


def _rescaled(side: Side, factor: Tensor) -> Side:
    """The side with its one positive's logit times `factor` (n,): negatives had a scale of their own."""
    return Side(side.negatives, side.positives * factor, side.attraction * factor, side.weight, side.count)
