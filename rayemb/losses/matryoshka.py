"""Matryoshka: any loss on prefixes of the vectors (Kusupati et al., 2022, arXiv 2205.13147; card S095)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator

from rayemb.losses.base import Batch, Loss, Rows, Wrapper, WrapperConfig, names_within
from rayemb.parallel import Exchange


class MatryoshkaConfig(WrapperConfig):
    """The weighted sum (not mean) of the loss over prefixes, each normalised anew."""

    name: Literal["matryoshka"] = "matryoshka"
    dims: tuple[int, ...] = Field(min_length=1, description="prefix lengths, the whole vector's among them if wanted")
    weights: tuple[float, ...] | None = Field(None, description="one per prefix; 1 each if not given")

    @model_validator(mode="after")
    def _fit(self) -> MatryoshkaConfig:
        if any(dim < 1 for dim in self.dims) or len(set(self.dims)) != len(self.dims):
            raise ValueError(f"dims must be different and positive, got {list(self.dims)}")
        if self.weights is not None and (len(self.weights) != len(self.dims) or min(self.weights) <= 0):
            raise ValueError(f"weights must be {len(self.dims)} positive numbers, one per prefix")
        for name in sorted(names_within(self.loss) & {"class_proxies", "cross_batch_memory"}):
            raise ValueError(f"{name} knows whole vectors only: it cannot be inside matryoshka")
        if "starbucks" in names_within(self.loss):
            raise ValueError("starbucks has prefixes of its own: it cannot be inside matryoshka")
        if "matryoshka" in names_within(self.loss):
            raise ValueError("matryoshka inside matryoshka: one list of dims is enough")
        return self

    def misfit(self, dim: int) -> str | None:
        """A prefix that is longer than the vectors."""
        if max(self.dims) > dim:
            return f"matryoshka.dims has {max(self.dims)}, the vectors have {dim} dimensions"
        return self.loss.misfit(dim)

    def build(self, dim: int) -> Matryoshka:
        """The loss around the inner one."""
        return Matryoshka(self, self.loss.build(dim))


class Matryoshka(Wrapper):
    """Choose it to have vectors that may be cut to size after training. Costs one more similarity per prefix."""

    def __init__(self, config: MatryoshkaConfig, loss: Loss) -> None:
        super().__init__(loss)
        self.config = config

    def rows(self, batch: Batch, exchange: Exchange) -> Rows:
        """As many rows as the inner loss has."""
        weights = self.config.weights or (1.0,) * len(self.config.dims)
        parts = [self.loss.rows(batch.prefix(dim), exchange) for dim in self.config.dims]
        total = torch.stack([weight * part.losses for weight, part in zip(weights, parts, strict=True)]).sum(0)
        return Rows(total, parts[0].counted)

    def problem(self, batch: Batch) -> str | None:
        """See `Loss.problem`."""
        dim = batch.queries.shape[1]
        if self.config.misfit(dim):
            return self.config.misfit(dim)
        for size in self.config.dims:
            problem = batch.prefix(size).problem() if size < dim else None
            if problem:
                return f"the first {size} coordinates: {problem}"
        return self.loss.problem(batch)
