"""How far the queries of now are from those of a reference.

Shape suffixes: N queries, D dimensions, P directions, B bins.
"""

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_DIRECTIONS = 16
_BINS = 10
_SEED = 0
# Added to every share, so that an empty bin is no infinity: half a query among a thousand.
_FLOOR = 5e-4


@dataclass(frozen=True)
class Drift:
    """`shift`: squared distance of the means over the reference's total variance; without drift about
    1/N_reference + 1/N_now. `stability`: population stability index, the mean over random directions of
    sum((now - then) ln(now / then)) over ten bins of equal share in the reference; without drift about
    9 (1/N_reference + 1/N_now); by custom 0.1 is a change, 0.25 a large one (Siddiqi, 2006).
    """

    shift: float
    stability: float


@dataclass(frozen=True)
class Reference:
    """What is kept of the queries of then: not the queries."""

    count: int
    mean: Floats  # (D,)
    variance: float
    edges: Floats  # (P, B - 1)

    @classmethod
    def of(cls, x_ND: NDArray[np.float32]) -> "Reference":
        """The reference that these vectors `(N, D)`, N > 1, are."""
        x = np.asarray(x_ND, np.float64)
        mean = x.mean(axis=0)
        variance = float(((x - mean) ** 2).sum(axis=1).mean())
        inner = np.linspace(0, 1, _BINS + 1)[1:-1]
        return cls(len(x), mean, variance, np.quantile(x @ _directions(x.shape[1]).T, inner, axis=0).T)

    def drift(self, x_ND: NDArray[np.float32]) -> Drift:
        """How far these vectors `(N, D)` are from the reference."""
        x = np.asarray(x_ND, np.float64)
        distance = float(((x.mean(axis=0) - self.mean) ** 2).sum())
        projected_NP = x @ _directions(x.shape[1]).T
        then = 1 / _BINS
        indices = []
        for edges, values in zip(self.edges, projected_NP.T, strict=True):
            counts = np.bincount(np.searchsorted(edges, values, side="right"), minlength=_BINS)
            now = np.maximum(counts / len(x), _FLOOR)
            indices.append(((now - then) * np.log(now / then)).sum())
        return Drift(distance / max(self.variance, 1e-12), float(np.mean(indices)))

    def to_bytes(self) -> bytes:
        """The reference as an .npz file."""
        out = io.BytesIO()
        np.savez(out, count=self.count, mean=self.mean, variance=self.variance, edges=self.edges)
        return out.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Reference":
        """The reference in `data`. Raises ValueError, KeyError or OSError for anything else."""
        with np.load(io.BytesIO(data), allow_pickle=False) as found:
            return cls(int(found["count"]), found["mean"], float(found["variance"]), found["edges"])


def _directions(dim: int) -> Floats:
    """Unit vectors `(P, D)`, the same ones always: shares of then and now are along the same lines."""
    drawn = np.random.default_rng(_SEED).normal(size=(_DIRECTIONS, dim))
    unit: Floats = drawn / np.linalg.norm(drawn, axis=1, keepdims=True)
    return unit
