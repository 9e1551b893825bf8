"""NT-Xent, SimCLR's loss (Chen et al., 2020)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from rayemb.losses.base import Batch, Rows, scaled, unit
from rayemb.losses.softmax import softmax_loss
from rayemb.losses.temperature import ScaledLoss, Temperature, TemperatureConfig
from rayemb.parallel import Duplicates, Exchange, Pairs, contrast


class NTXentConfig(TemperatureConfig):
    """Each of two views seeks the other among all views of all ranks: 2 B anchors, 2 M - 1 candidates."""

    name: Literal["nt_xent"] = "nt_xent"
    temperature: float = Field(0.1, gt=0, description="softmax temperature, or its start if it is learnable")
    learnable_temperature: bool = Field(False, description="whether the temperature is trained with the encoder")
    duplicates: Duplicates = Field(
        "ignore", description="what a candidate with the anchor's key is: positive, ignore or negative"
    )

    def build(self, dim: int) -> NTXent:
        """The loss."""
        return NTXent(self)


class NTXent(ScaledLoss):
    """Choose it over InfoNCE when queries and documents are two views of the same kind of thing, by one encoder."""

    def __init__(self, config: NTXentConfig) -> None:
        super().__init__()
        self.config = config
        self.scale = Temperature(config)

    def rows(self, batch: Batch, exchange: Exchange) -> Rows:
        """2 B rows; hard negatives and memory are candidates of both views."""
        views = batch.views()
        candidates, keys = views.candidates(), views.candidate_keys()
        pairs = Pairs(
            own=torch.cat([batch.own + len(batch.own), batch.own]),
            itself=views.own,
            keys=(views.keys, keys) if views.keys is not None and keys is not None else None,
            duplicates=self.config.duplicates,
        )
        anchors = scaled(unit(views.queries), self.scale.scale())
        return softmax_loss(contrast(anchors, candidates, pairs, exchange=exchange)[0])

    def problem(self, batch: Batch) -> str | None:
        """See `Loss.problem`."""
        if batch.weights is not None:
            return "NTXent knows one positive per view: weights are not supported"
        return super().problem(batch)
