"""Starbucks: one encoder in fixed sizes, each so many layers and coordinates (Zhuang et al., 2024; card S069)."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from rayemb.losses.base import Batch, Loss, Rows, Wrapper, WrapperConfig, names_within, scaled, unit
from rayemb.parallel import Exchange, divergence


class StarbucksConfig(WrapperConfig):
    """The sum of the loss over sizes, and of the divergence of each from what the full one makes of the batch."""

    name: Literal["starbucks"] = "starbucks"
    sizes: tuple[tuple[int, int], ...] = Field(
        min_length=1,
        description="(layers of the text tower, coordinates) of each, from small to large; the last: all of both",
    )
    divergence: float = Field(1.0, ge=0, description="weight of the divergences; 0 for none")

    @model_validator(mode="after")
    def _fit(self) -> StarbucksConfig:
        if min(min(size) for size in self.sizes) < 1:
            raise ValueError("sizes must be positive")
        for small, large in zip(self.sizes, self.sizes[1:], strict=False):
            if not (small[0] < large[0] and small[1] <= large[1]):
                raise ValueError(f"sizes must grow: {list(small)} stands before {list(large)}")
        for name in sorted(
            names_within(self.loss) & {"class_proxies", "cross_batch_memory", "matryoshka", "starbucks"}
        ):
            raise ValueError(f"{name} cannot be inside starbucks: it is not of one size's vectors alone")
        return self

    @property
    def needs(self) -> frozenset[str]:
        """See `LossConfig`."""
        return self.loss.needs | ({"exits"} if len(self.sizes) > 1 else frozenset())

    @property
    def exits(self) -> tuple[int, ...]:
        """The layers after which vectors are wanted, beside the last."""
        return tuple(layers for layers, _ in self.sizes[:-1])

    def misfit(self, dim: int) -> str | None:
        """A last size that is not the whole vector."""
        if self.sizes[-1][1] != dim:
            return f"starbucks.sizes: the last has {self.sizes[-1][1]} coordinates, the vectors have {dim} dimensions"
        return self.loss.misfit(dim)

    def build(self, dim: int) -> Starbucks:
        """The loss around the inner one."""
        return Starbucks(self, self.loss.build(dim))


class Starbucks(Wrapper):
    """Choose it where one model must come in several depths: `Model.cut` takes a size out of it.

    Prefixes are normalised anew, as everywhere here; the released retrieval code takes them as they are. The full
    size's probabilities get no gradient from the divergences, nor does the temperature.
    """

    def __init__(self, config: StarbucksConfig, loss: Loss) -> None:
        super().__init__(loss)
        self.config = config

    def rows(self, batch: Batch, exchange: Exchange) -> Rows:
        """As many rows as the inner loss has."""
        sizes = self.config.sizes
        full = replace(batch, exits={})
        total, counted = self.loss.rows(full, exchange)
        for layers, dim in sizes[:-1]:
            small = batch.exits[layers].prefix(dim)
            total = total + self.loss.rows(small, exchange).losses
            if self.config.divergence:
                apart = self.config.divergence * self._apart(small, full, exchange)
                # An inner loss has one row of each query, or as many of each: the mean is the same.
                total = total + apart.repeat(len(total) // max(1, len(apart)))
        return Rows(total, counted)

    def problem(self, batch: Batch) -> str | None:
        """See `Loss.problem`."""
        for layers, dim in self.config.sizes[:-1]:
            if layers not in batch.exits:
                return f"Starbucks needs the vectors after {layers} layers (Batch.exits)"
            problem = batch.exits[layers].prefix(dim).problem()
            if problem:
                return f"after {layers} layers, the first {dim} coordinates: {problem}"
        if batch.memory is not None:
            return "Starbucks has no memory of each size: use it without one"
        return self.loss.problem(replace(batch, exits={}))

    def _apart(self, small: Batch, full: Batch, exchange: Exchange) -> Tensor:
        warm = full.queries.new_tensor([1.0 / (self.loss.temperature or 1.0)])
        student = scaled(unit(small.queries), warm), small.candidates()
        teacher = scaled(unit(full.queries.detach()), warm), full.candidates().detach()
        return divergence(student, teacher, exchange=exchange)
