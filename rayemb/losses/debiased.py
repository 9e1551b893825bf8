"""The debiased contrastive loss (Chuang et al., 2020, arXiv 2007.00224)."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from rayemb.losses.base import Batch, Rows, scaled, unit
from rayemb.losses.softmax import concatenated
from rayemb.losses.temperature import ScaledLoss, Temperature, TemperatureConfig
from rayemb.parallel import Duplicates, Exchange, Side, contrast


class DebiasedConfig(TemperatureConfig):
    """InfoNCE whose negatives are corrected for the share of them that are positives in disguise."""

    name: Literal["debiased"] = "debiased"
    temperature: float = Field(0.5, gt=0, description="softmax temperature, or its start if it is learnable")
    learnable_temperature: bool = Field(False, description="whether the temperature is trained with the encoder")
    positive_rate: float = Field(
        0.1, ge=0, lt=1, description="tau+: how likely a random candidate is a positive; 0 gives InfoNCE"
    )
    symmetric: bool = Field(True, description="documents seek queries too, averaged with queries seeking documents")
    duplicates: Duplicates = Field(
        "ignore", description="what a candidate with the anchor's key is: positive, ignore or negative"
    )

    def build(self, dim: int) -> Debiased:
        """The loss."""
        return Debiased(self)


class Debiased(ScaledLoss):
    """Choose it over InfoNCE where classes are few and no label tells which candidates share one."""

    def __init__(self, config: DebiasedConfig) -> None:
        super().__init__()
        self.config = config
        self.scale = Temperature(config)

    def rows(self, batch: Batch, exchange: Exchange) -> Rows:
        """B rows, or 2 B if symmetric."""
        scale = self.scale.scale()
        sides = contrast(
            scaled(unit(batch.queries), scale),
            batch.candidates(),
            batch.pairs(self.config.duplicates),
            exchange=exchange,
            columns=batch.queries.shape[0] if self.config.symmetric else 0,
        )
        return concatenated(*(debiased(side, scale, self.config.positive_rate) for side in sides if side is not None))


def debiased(side: Side, scale: Tensor, rate: float) -> Rows:
    """`log(1 + N g / e^p)`, g = max((mean_neg - rate e^p) / (1 - rate), e^-scale), from logs throughout.

    p is the positive's logit (the mean of several), mean_neg the mean of exp over the N negatives.
    """
    counted = side.weight > 0
    complete = counted & (side.count > 0)
    positive = side.attraction / torch.where(counted, side.weight, 1.0)
    number = torch.where(complete, side.count, 1.0)
    mean_negative = torch.where(complete, side.negatives, 0.0) - number.log()
    excess = mean_negative - positive  # log of mean_neg / e^p
    # Where the correction would make the negatives' mass negative, the floor e^-scale takes over.
    above = excess > (math.log(rate) + 1e-6 if rate else -math.inf)
    safe = torch.where(above, excess, 0.0)
    corrected = safe + torch.log1p(-rate * torch.exp(-safe)) - math.log1p(-rate)
    floor = -scale - positive
    ratio = torch.where(above, torch.maximum(corrected, floor), floor)
    losses = -F.logsigmoid(-(number.log() + ratio))
    return Rows(torch.where(complete, losses, 0.0), counted.to(losses.dtype))
