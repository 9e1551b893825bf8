"""InfoNCE (van den Oord et al., 2018): one-way, symmetric (CLIP, Radford et al., 2021), four blocks (GTE, 2023)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from rayemb.losses.base import Batch, Rows, scaled, unit
from rayemb.losses.softmax import among_documents, among_queries, concatenated, joined, softmax_loss, with_margin
from rayemb.losses.temperature import ScaledLoss, Temperature, TemperatureConfig
from rayemb.parallel import Duplicates, Exchange, contrast

Direction = Literal["query_to_document", "document_to_query", "query_to_query", "document_to_document"]


class InfoNCEConfig(TemperatureConfig):
    """Softmax over all candidates; the positives of one anchor share its probability mass.

    The default is CLIP's symmetric loss; with hard negatives it is the multiple-negatives *symmetric* ranking loss
    (documents seek among queries only). `[query_to_document]` is the multiple-negatives ranking loss. All four
    directions with `partition: joint` are GTE's improved contrastive loss (Li et al., 2023, arXiv 2308.03281).
    """

    name: Literal["infonce"] = "infonce"
    directions: tuple[Direction, ...] = Field(
        ("query_to_document", "document_to_query"), min_length=1, description="who is told apart from whom"
    )
    partition: Literal["per_direction", "joint"] = Field(
        "per_direction", description="a softmax for each direction, averaged, or one per query over all directions"
    )
    margin: float = Field(0.0, ge=0, lt=2, description="subtracted from the cosine of the positives")
    duplicates: Duplicates = Field(
        "positive", description="what a candidate with the anchor's key is: positive, ignore or negative"
    )

    @model_validator(mode="after")
    def _fit(self) -> InfoNCEConfig:
        if len(set(self.directions)) != len(self.directions):
            raise ValueError("directions repeat")
        within = {"query_to_query", "document_to_document"} & set(self.directions)
        if within and self.partition == "per_direction":
            raise ValueError(f"{sorted(within)[0]} has no positive of its own: partition must be joint")
        if self.partition == "joint" and "query_to_document" not in self.directions:
            raise ValueError("partition joint needs the direction query_to_document, which has the positives")
        return self

    def build(self, dim: int) -> InfoNCE:
        """The loss."""
        return InfoNCE(self)


class InfoNCE(ScaledLoss):
    """Choose it for pairs with many in-batch negatives; softmax losses with more to them are beside this file."""

    def __init__(self, config: InfoNCEConfig) -> None:
        super().__init__()
        self.config = config
        self.scale = Temperature(config)

    def rows(self, batch: Batch, exchange: Exchange) -> Rows:
        """B rows, or 2 B for both directions with a softmax each."""
        config, scale, directions = self.config, self.scale.scale(), set(self.config.directions)
        backwards = "document_to_query" in directions
        forward, backward = contrast(
            scaled(unit(batch.queries), scale),
            batch.candidates(),
            batch.pairs(config.duplicates),
            exchange=exchange,
            columns=batch.queries.shape[0] if backwards else 0,
        )
        forward = with_margin(forward, config.margin * scale)
        backward = with_margin(backward, config.margin * scale) if backward is not None else None
        if config.partition == "per_direction":
            parts = [softmax_loss(forward)] if "query_to_document" in directions else []
            parts += [softmax_loss(backward)] if backward is not None else []
            return concatenated(*(parts or [softmax_loss(forward)]))  # no rank has a row: neither has the other side
        negatives, positives = [forward.negatives], [forward.positives]
        if backward is not None:
            # The positive is in the denominator twice, as in the paper: once in either direction.
            negatives.append(backward.negatives)
            positives.append(backward.positives)
        if "query_to_query" in directions:
            negatives.append(among_queries(batch, scale, config.duplicates, exchange).negatives)
        if "document_to_document" in directions:
            negatives.append(among_documents(batch, scale, config.duplicates, exchange).negatives)
        return softmax_loss(forward, negatives=joined(*negatives), positives=joined(*positives))
