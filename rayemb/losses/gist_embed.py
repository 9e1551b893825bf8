"""GISTEmbed: in-batch negatives vetoed by a frozen guide (Solatorio, 2024, arXiv 2402.16829; card S188)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from rayemb.losses.base import Batch, Rows, scaled, unit
from rayemb.losses.softmax import among_documents, among_queries, joined, softmax_loss
from rayemb.losses.temperature import ScaledLoss, Temperature, TemperatureConfig
from rayemb.parallel import Exchange, Veto, contrast, widened

ROUNDING = 1e-6
"""More than two products of fp32 unit vectors differ that should be equal (6e-8 at 768 dimensions, measured)."""


class GISTEmbedConfig(TemperatureConfig):
    """A candidate that the guide finds closer than the query's own document is not a negative."""

    name: Literal["gist_embed"] = "gist_embed"
    temperature: float = Field(0.01, gt=0, description="softmax temperature, or its start if it is learnable")
    learnable_temperature: bool = Field(False, description="whether the temperature is trained with the encoder")
    margin: float = Field(0.0, ge=0, le=1, description="taken off the guide's similarity of the own pair; 0: the paper")
    margin_strategy: Literal["absolute", "relative"] = Field(
        "absolute", description="threshold t - margin, or t - |t| * margin"
    )
    contrast_queries: bool = Field(True, description="other queries are negatives too")
    contrast_documents: bool = Field(True, description="other documents are negatives of the query's document too")

    @property
    def needs(self) -> frozenset[str]:
        """See `LossConfig`."""
        return frozenset({"guide"})

    def build(self, dim: int) -> GISTEmbed:
        """The loss."""
        return GISTEmbed(self)


class GISTEmbed(ScaledLoss):
    """Choose it where batches hold unlabelled near-duplicates and a good frozen encoder is at hand (`Batch.guide`).

    Only queries are anchors. Equal keys, where there are any, are left out as well.
    """

    def __init__(self, config: GISTEmbedConfig) -> None:
        super().__init__()
        self.config = config
        self.scale = Temperature(config)

    def rows(self, batch: Batch, exchange: Exchange) -> Rows:
        """B rows."""
        guide, scale = batch.guide, self.scale.scale()
        assert guide is not None
        assert guide.documents is not None
        # Thresholds are similarities too: in 16 bits a document would not even be as close as itself.
        queries, documents = unit(widened(guide.queries)), unit(widened(guide.documents))
        candidates = documents if guide.negatives is None else torch.cat([documents, unit(widened(guide.negatives))])
        above = self._threshold((queries * documents).sum(1))
        forward, _ = contrast(
            scaled(unit(batch.queries), scale),
            batch.candidates(),
            batch.pairs("ignore", (Veto(above, anchors=queries, candidates=candidates),)),
            exchange=exchange,
        )
        negatives = [forward.negatives]
        if self.config.contrast_queries:
            veto = Veto(above, anchors=queries, candidates=queries)
            negatives.append(among_queries(batch, scale, "ignore", exchange, veto).negatives)
        if self.config.contrast_documents:
            veto = Veto(above, anchors=documents, candidates=documents)
            negatives.append(among_documents(batch, scale, "ignore", exchange, veto, negatives=False).negatives)
        return softmax_loss(forward, negatives=joined(*negatives))

    def problem(self, batch: Batch) -> str | None:
        """See `Loss.problem`."""
        guide = batch.guide
        if guide is None or guide.documents is None or batch.documents is None:
            return "GISTEmbed needs documents and the guide's vectors of queries and documents"
        if batch.memory is not None:
            return "GISTEmbed has no guide vectors of the memory's documents: use it without a memory"
        for name, own, guides in (
            ("queries", batch.queries, guide.queries),
            ("documents", batch.documents, guide.documents),
            ("negatives", batch.negatives, guide.negatives),
        ):
            found = (None if rows is None else rows.shape[0] for rows in (own, guides))
            if len(set(found)) > 1:
                return f"the guide's {name} are not the batch's: GISTEmbed needs one guide vector each"
        return None

    def _threshold(self, own: Tensor) -> Tensor:
        scale = own.abs() if self.config.margin_strategy == "relative" else torch.ones_like(own)
        # Texts as close as the own document stay negatives, however their products are rounded.
        return (own - self.config.margin * scale + ROUNDING).detach()
