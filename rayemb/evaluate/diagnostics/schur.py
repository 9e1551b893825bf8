"""What of the vectors their partners explain, what is their own, and how diverse each part is (S107).

Ospanov, Jalali & Farnia, 2024: images and their prompts. Second moments are not centred, as in the paper.
Suffixes: N items, P dimensions of the condition (the prompt), D of the vectors, F frequencies.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.metrics.arrays import Floats, as_vectors, normalised
from rayemb.evaluate.metrics.errors import MetricError

NULL = 1e-12
"""Below this share of the largest, a direction of the conditions is rounding and explains nothing."""
CLIP = 1e-10
"""Eigenvalues below this count as none, before any trace is taken: the public code takes tiny negative ones along."""
SIGMA, FREQUENCIES = 3.5, 2500
"""Of the paper's demonstration."""


class Moments(NamedTuple):
    """Sums over a shard of pairs, to be added up over shards: `Moments(*map(sum, zip(*shards)))`."""

    rows: int
    xx: NDArray[np.float64]  # (P, P)
    xy: NDArray[np.float64]  # (P, D)
    yy: NDArray[np.float64]  # (D, D)


class Decomposition(NamedTuple):
    """C_yy = `explained` + `residual`, both `(D, D)` float64, symmetric and positive semidefinite."""

    explained: NDArray[np.float64]
    residual: NDArray[np.float64]


class SchurEntropy(NamedTuple):
    """Diversities, at least 1, of vectors of unit length: exp of the entropy of a part's spectrum."""

    residual: float
    """Of what the conditions do not explain: the vectors' own."""
    explained: float
    """Of what follows from the conditions."""
    share: float
    """The trace of the explained part over that of all, in [0, 1]."""


def moments(conditions: Floats, vectors: Floats) -> Moments:
    """The sums that `decompose` and `residual_map` need of pairs `(N, P)` and `(N, D)`; O((P + D)²) memory."""
    x_NP, y_ND = as_vectors(conditions, "conditions"), as_vectors(vectors, "vectors")
    if len(x_NP) != len(y_ND):
        raise MetricError(f"expected pairs, got {len(x_NP):,} conditions of {len(y_ND):,} vectors", where="conditions")
    return Moments(len(x_NP), x_NP.T @ x_NP, x_NP.T @ y_ND, y_ND.T @ y_ND)


def decompose(of: Moments) -> Decomposition:
    """The explained part C_xy' C_xx⁺ C_xy and the Schur complement that is left. O(P³ + P D (P + D)) time."""
    xx, xy, yy = _means(of)
    values_P, basis_PP = np.linalg.eigh(xx)
    keep = values_P > NULL * max(values_P[-1], 0.0)
    root = (basis_PP[:, keep] / np.sqrt(values_P[keep])).T @ xy
    explained = root.T @ root
    return Decomposition(explained, yy - explained)


def schur_entropy(vectors: Floats, conditions: Floats) -> SchurEntropy:
    """The SCE of `(N, D)` vectors given `(N, P)` conditions, both taken at length 1: the cosine kernel.

    With N below P the conditions explain everything, as a regression would: bring N well above P. For a Gaussian
    kernel give `entropies(decompose(moments(...)))` the `fourier_features` of both.
    """
    return entropies(decompose(moments(normalised(conditions, "conditions"), normalised(vectors, "vectors"))))


def entropies(parts: Decomposition) -> SchurEntropy:
    """exp of -Σ λ ln(λ / Σ λ) of each part, and the explained share of the trace.

    The eigenvalues are normalised within the logarithm alone, as in the paper: a part of little trace has little to
    say however diverse it is, and its score tends to 1.
    """
    explained, residual = _spectrum(parts.explained), _spectrum(parts.residual)
    total = float(explained.sum() + residual.sum())
    if not total:
        raise MetricError("all vectors are zero", where="vectors")
    return SchurEntropy(_diversity(residual), _diversity(explained), float(explained.sum()) / total)


def residual_map(of: Moments, *, ridge: float = 0.0) -> NDArray[np.float64]:
    """Γ `(P, D)` float64, the least-squares map from conditions to vectors, to be kept for `residualize`.

    Args:
        of: the moments of a set of pairs to fit on.
        ridge: is added to the diagonal of C_xx. With few pairs, N near P, 0 fits their noise.
    """
    if ridge < 0:
        raise MetricError(f"a ridge is not negative, got {ridge}", where="ridge")
    xx, xy, _ = _means(of)
    values_P, basis_PP = np.linalg.eigh(xx)
    keep = values_P > NULL * max(values_P[-1], 0.0)
    basis = basis_PP[:, keep]
    found: NDArray[np.float64] = (basis / (values_P[keep] + ridge)) @ (basis.T @ xy)
    return found


def residualize(
    vectors: Floats, conditions: Floats, gamma: NDArray[np.float64] | None = None, *, ridge: float = 0.0
) -> NDArray[np.float64]:
    """The vectors `(N, D)` without what follows linearly from their conditions `(N, P)`: y - Γ'x, float64.

    "All but X": take a prompt, a style, a language out of the vectors. They are not of unit length: normalise before a
    search by cosine.

    Args:
        vectors: to correct.
        conditions: one a vector.
        gamma: a `residual_map` fitted on other pairs; None: on these, whose cross-moment with the result is then 0.
        ridge: as for `residual_map`, where it is fitted here.
    """
    x_NP, y_ND = as_vectors(conditions, "conditions"), as_vectors(vectors, "vectors")
    if gamma is None:
        gamma = residual_map(moments(x_NP, y_ND), ridge=ridge)
    if len(x_NP) != len(y_ND) or gamma.shape != (x_NP.shape[1], y_ND.shape[1]):
        raise MetricError(f"no map {gamma.shape} from {x_NP.shape} to {y_ND.shape}", where="gamma")
    return y_ND - x_NP @ gamma


def frequencies(dim: int, *, seed: int, sigma: float = SIGMA, count: int = FREQUENCIES) -> NDArray[np.float64]:
    """`(dim, F)` frequencies of the Gaussian kernel of width `sigma`; the same ones for both sides of a pair."""
    if not sigma > 0:
        raise MetricError(f"a width is positive, got {sigma}", where="sigma")
    return np.random.default_rng(seed).normal(scale=1 / sigma, size=(dim, count))


def fourier_features(vectors: Floats, frequencies_DF: NDArray[np.float64]) -> NDArray[np.float64]:
    """`(N, 2 F)` unit vectors whose inner products tend to exp(-‖x - y‖² / 2σ²) (Rahimi & Recht, 2007)."""
    at_NF: NDArray[np.float64] = as_vectors(vectors, "vectors") @ frequencies_DF
    features: NDArray[np.float64] = np.concatenate([np.cos(at_NF), np.sin(at_NF)], axis=1)
    features /= frequencies_DF.shape[1] ** 0.5
    return features


def _means(of: Moments) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    if of.rows < 1:
        raise MetricError("there are no pairs", where="vectors")
    return of.xx / of.rows, of.xy / of.rows, of.yy / of.rows


def _spectrum(part: NDArray[np.float64]) -> NDArray[np.float64]:
    values: NDArray[np.float64] = np.linalg.eigvalsh(part).astype(np.float64)
    return values[values > CLIP]


def _diversity(values: NDArray[np.float64]) -> float:
    return float(np.exp(-(values * np.log(values / values.sum())).sum())) if len(values) else 1.0
