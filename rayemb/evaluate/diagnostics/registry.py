"""What a diagnostic is and what it may be given: a suite or a sweep chooses by name and by what there is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from math import isfinite
from numbers import Real
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.metrics.arrays import Floats, normalised
from rayemb.evaluate.metrics.errors import MetricError


@dataclass(frozen=True, eq=False)
class Inputs:
    """All that a diagnostic could look at; None where there is none. Row i is everywhere the same item."""

    vectors: Floats | None = None
    """`(N, D)` as the model gives them; a diagnostic that asks for directions normalises them itself."""
    labels: NDArray[np.int64] | None = None
    """`(N,)` int64, the class of each item."""
    pairs: Floats | None = None
    """`(N, D)` the other side of each item: its text where `vectors` are images, its document, its caption."""
    texts: tuple[str, ...] | None = None
    """`(N,)` what the vectors were made from."""
    views: Floats | None = None
    """`(N, V, D)` V augmented views of each item."""
    train: Floats | None = None
    """`(M, D)` the items that the model was trained on."""
    other: Floats | None = None
    """`(N, E)` the same items by another model, of any width."""
    graph: NDArray[np.int64] | None = None
    """`(L, 2)` int64, the rows that each undirected edge joins."""

    def given(self) -> frozenset[str]:
        """The names of the inputs that are there."""
        return frozenset(field.name for field in fields(self) if getattr(self, field.name) is not None)

    def need(self, name: str) -> Any:
        """The input of that name; MetricError where it is not there."""
        value = getattr(self, name)
        if value is None:
            raise MetricError("is needed and was not given", where=name)
        return value

    def unit(self, name: str = "vectors") -> NDArray[np.float64]:
        """The vectors of that name at length 1; MetricError where one is zero."""
        return normalised(self.need(name), name)

    def lengths(self) -> NDArray[np.int64]:
        """`(N,)` int64, the texts' lengths in characters: models of different tokenisers see the same ones."""
        return np.array([len(text) for text in self.need("texts")], np.int64)


Measure = Callable[[Inputs], "float | NamedTuple"]
Better = Literal["higher", "lower", "neither"]


@dataclass(frozen=True)
class Diagnostic:
    """One way of looking at a space."""

    name: str
    needs: frozenset[str]
    """Names of fields of `Inputs`."""
    measure: Measure
    better: Better
    """Which way the main figure is better, all else equal; `neither` where that depends on the task."""
    source: str
    """The method's card, authors and year."""

    def run(self, inputs: Inputs) -> dict[str, float]:
        """The main figure under the diagnostic's own name, then others as `name_field`.

        Only numbers: what else the measure holds (curves, spectra) is for those who call it directly.
        Raises MetricError if an input is missing or a figure is not finite.
        """
        missing = sorted(self.needs - inputs.given())
        if missing:
            raise MetricError(f"needs {', '.join(missing)}", where=self.name, fix="give them, or leave it out")
        figures = _numbers(self.name, self.measure(inputs))
        wrong = sorted(name for name, value in figures.items() if not isfinite(value))
        if wrong:
            raise MetricError(f"there is no finite figure for {', '.join(wrong)}", where=self.name)
        return figures


def entry(name: str, needs: str, measure: Measure, better: Better, source: str) -> Diagnostic:
    """A `Diagnostic` in one line; `needs` are names of `Inputs`, with spaces between them."""
    return Diagnostic(name, frozenset(needs.split()), measure, better, source)


def registry(*diagnostics: Diagnostic) -> Mapping[str, Diagnostic]:
    """By name, in the order given; MetricError for a name given twice or a need that is no input."""
    known = {field.name for field in fields(Inputs)}
    found: dict[str, Diagnostic] = {}
    for diagnostic in diagnostics:
        if diagnostic.name in found:
            raise MetricError("is there twice", where=diagnostic.name)
        if diagnostic.needs - known:
            raise MetricError(f"no such inputs: {sorted(diagnostic.needs - known)}", where=diagnostic.name)
        found[diagnostic.name] = diagnostic
    return found


def _numbers(name: str, result: "float | NamedTuple") -> dict[str, float]:
    if not isinstance(result, tuple):
        return {name: float(result)}
    (_, main), *others = result._asdict().items()
    return {name: float(main)} | {f"{name}_{field}": float(value) for field, value in others if isinstance(value, Real)}
