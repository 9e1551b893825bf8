"""Softmax over learned class proxies: normalised softmax, CosFace (Wang et al., 2018), ArcFace (Deng et al., 2019)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rayemb.losses.base import Batch, Rows, scaled, unit
from rayemb.losses.softmax import softmax_loss, with_margin
from rayemb.losses.temperature import ScaledLoss, Temperature, TemperatureConfig
from rayemb.parallel import Alone, Exchange, Pairs, Side, contrast


class ClassProxiesConfig(TemperatureConfig):
    """Candidates are parameters, one per class; `Batch.labels` says which is the positive."""

    name: Literal["class_proxies"] = "class_proxies"
    temperature: float = Field(1 / 64, gt=0, description="1 / scale of the cosine, or its start if it is learnable")
    learnable_temperature: bool = Field(False, description="whether the temperature is trained with the encoder")
    classes: int = Field(ge=1, description="number of classes")
    margin: float = Field(0.0, ge=0, lt=2, description="CosFace: subtracted from the cosine of the positive")
    angular_margin: float = Field(0.0, ge=0, lt=math.pi / 2, description="ArcFace: added to its angle, in radians")
    seed: int = Field(0, ge=0, description="of the proxies' first values")

    @property
    def needs(self) -> frozenset[str]:
        """See `LossConfig`."""
        return frozenset({"labels"})

    def build(self, dim: int) -> ClassProxies:
        """The loss, with proxies `(classes, dim)`."""
        return ClassProxies(self, dim)


class ClassProxies(ScaledLoss):
    """Choose it for closed sets of labels: no batch has to hold two of a class."""

    def __init__(self, config: ClassProxiesConfig, dim: int) -> None:
        super().__init__()
        self.config = config
        self.scale = Temperature(config)
        generator = torch.Generator().manual_seed(config.seed)
        self.proxies = nn.Parameter(torch.randn(config.classes, dim, generator=generator) / dim**0.5)

    def rows(self, batch: Batch, exchange: Exchange) -> Rows:
        """B rows."""
        scale = self.scale.scale()
        # Every rank has all proxies: there is nothing to exchange, and their gradients are averaged like any weight's.
        side, _ = contrast(
            scaled(unit(batch.queries), scale),
            unit(self.proxies),
            Pairs(own=batch.labels),
            exchange=Alone(exchange.tiling),
        )
        if self.config.angular_margin:
            side = _turned(side, scale, self.config.angular_margin)
        return softmax_loss(with_margin(side, self.config.margin * scale))

    def problem(self, batch: Batch) -> str | None:
        """See `Loss.problem`."""
        if batch.labels is None:
            return "ClassProxies needs labels"
        if batch.queries.shape[1] != self.proxies.shape[1]:
            return f"queries have {batch.queries.shape[1]} dimensions, the proxies {self.proxies.shape[1]}"
        if batch.labels.numel() and not 0 <= int(batch.labels.min()) <= int(batch.labels.max()) < self.config.classes:
            return f"labels are not all from 0 to {self.config.classes - 1}"
        return None


def _turned(side: Side, scale: Tensor, margin: float) -> Side:
    """The side with its positive's cosine c replaced by cos(acos(c) + margin).

    Beyond pi - margin that would rise again; there it is c - margin * sin(margin), as in the released code.
    """
    cosine = (side.attraction / scale).clamp(-1, 1)
    sine = (1 - cosine * cosine).clamp(min=1e-12).sqrt()
    turned = cosine * math.cos(margin) - sine * math.sin(margin)
    logit = torch.where(cosine > -math.cos(margin), turned, cosine - margin * math.sin(margin)) * scale
    return replace(side, positives=logit, attraction=logit)
