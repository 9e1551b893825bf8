"""SupCon, the supervised contrastive loss (Khosla et al., 2020), L_out."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rayemb.losses.base import Batch, Rows, scaled, unit
from rayemb.losses.softmax import softmax_loss
from rayemb.losses.temperature import ScaledLoss, Temperature, TemperatureConfig
from rayemb.parallel import Exchange, Pairs, contrast


class SupConConfig(TemperatureConfig):
    """Every other view with the anchor's key is a positive; all of them stand in the denominator."""

    name: Literal["supcon"] = "supcon"
    temperature: float = Field(0.1, gt=0, description="softmax temperature, or its start if it is learnable")
    learnable_temperature: bool = Field(False, description="whether the temperature is trained with the encoder")

    def build(self, dim: int) -> SupCon:
        """The loss."""
        return SupCon(self)


class SupCon(ScaledLoss):
    """Choose it for labelled data. `Batch.keys` are the labels; documents, if there are any, are second views.

    Anchors whose label nobody shares have no positive and do not count in the mean.
    """

    def __init__(self, config: SupConConfig) -> None:
        super().__init__()
        self.config = config
        self.scale = Temperature(config)

    def rows(self, batch: Batch, exchange: Exchange) -> Rows:
        """B rows, or 2 B with documents."""
        views = batch.views()
        keys = views.candidate_keys()
        assert views.keys is not None
        assert keys is not None
        pairs = Pairs(itself=views.own, keys=(views.keys, keys), duplicates="positive")
        anchors = scaled(unit(views.queries), self.scale.scale())
        return softmax_loss(contrast(anchors, views.candidates(), pairs, exchange=exchange)[0])

    def problem(self, batch: Batch) -> str | None:
        """See `Loss.problem`."""
        if batch.weights is not None:
            return "SupCon takes its positives from keys: weights are not supported"
        return "SupCon needs keys: the labels" if batch.keys is None else None
