"""SigLIP, the pairwise sigmoid loss (Zhai et al., 2023, arXiv 2303.15343)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import nn

from rayemb.losses.base import Batch, Rows, scaled, unit
from rayemb.losses.temperature import ScaledLoss, Temperature, TemperatureConfig
from rayemb.parallel import Duplicates, Exchange, contrast, widened


class SigLIPConfig(TemperatureConfig):
    """Each pair is a yes-or-no question of its own; the sum over all pairs is divided by the batch size, once."""

    name: Literal["siglip"] = "siglip"
    temperature: float = Field(0.1, gt=0, description="1 / scale of the cosine, or its start if it is learnable")
    bias: float = Field(-10.0, description="added to every logit, or its start: most pairs are negatives")
    learnable_bias: bool = Field(True, description="whether the bias is trained with the encoder")
    duplicates: Duplicates = Field(
        "ignore", description="what a candidate with the anchor's key is: positive, ignore or negative"
    )

    def build(self, dim: int) -> SigLIP:
        """The loss."""
        return SigLIP(self)


class SigLIP(ScaledLoss):
    """Choose it where batches are small or candidates are shared among many positives: nothing is normalised over."""

    def __init__(self, config: SigLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.scale = Temperature(config)
        self.bias = nn.Parameter(torch.full((1,), config.bias), requires_grad=config.learnable_bias)

    def rows(self, batch: Batch, exchange: Exchange) -> Rows:
        """B rows: the sum of a query's questions."""
        candidates = batch.candidates()
        side, _ = contrast(
            scaled(unit(batch.queries), self.scale.scale()),
            candidates,
            batch.pairs(self.config.duplicates),
            exchange=exchange,
            bias_C=widened(self.bias).expand(candidates.shape[0]),
            reduction="sigmoid",
        )
        losses = side.negatives + side.attraction
        return Rows(losses, torch.ones_like(losses))
