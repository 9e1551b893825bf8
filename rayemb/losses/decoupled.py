"""DCL, the decoupled contrastive loss (Yeh et al., 2022, arXiv 2110.06848)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from rayemb.losses.base import Batch, Rows, scaled, unit
from rayemb.losses.softmax import concatenated
from rayemb.losses.temperature import ScaledLoss, Temperature, TemperatureConfig
from rayemb.parallel import Duplicates, Exchange, Side, contrast


class DecoupledConfig(TemperatureConfig):
    """InfoNCE without the positive in the denominator."""

    name: Literal["decoupled"] = "decoupled"
    temperature: float = Field(0.1, gt=0, description="softmax temperature, or its start if it is learnable")
    learnable_temperature: bool = Field(False, description="whether the temperature is trained with the encoder")
    symmetric: bool = Field(True, description="documents seek queries too, averaged with queries seeking documents")
    duplicates: Duplicates = Field(
        "ignore", description="what a candidate with the anchor's key is: positive, ignore or negative"
    )

    def build(self, dim: int) -> Decoupled:
        """The loss."""
        return Decoupled(self)


class Decoupled(ScaledLoss):
    """Choose it for small batches: an easy positive does not switch the gradient of its negatives off.

    It has no lower bound. An anchor without negatives has loss 0.
    """

    def __init__(self, config: DecoupledConfig) -> None:
        super().__init__()
        self.config = config
        self.scale = Temperature(config)

    def rows(self, batch: Batch, exchange: Exchange) -> Rows:
        """B rows, or 2 B if symmetric."""
        sides = contrast(
            scaled(unit(batch.queries), self.scale.scale()),
            batch.candidates(),
            batch.pairs(self.config.duplicates),
            exchange=exchange,
            columns=batch.queries.shape[0] if self.config.symmetric else 0,
        )
        return concatenated(*(_decoupled(side) for side in sides if side is not None))


def _decoupled(side: Side) -> Rows:
    counted = side.weight > 0
    complete = counted & (side.count > 0)
    pull = side.attraction / torch.where(counted, side.weight, 1.0)
    losses = torch.where(complete, torch.where(complete, side.negatives, 0.0) - pull, 0.0)
    return Rows(losses, counted.to(losses.dtype))
