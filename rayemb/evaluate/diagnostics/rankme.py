"""RankMe: how many directions a space uses, without a label (S066; Garrido et al., 2023).

All sums are in float64 and add up over shards, so that many processes find what one would.
Suffixes: N vectors, D dimensions.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.metrics.arrays import Floats, as_vectors
from rayemb.evaluate.metrics.errors import MetricError

EPS = 1e-7
"""Of the paper. At 1e-5, which one public implementation has, rank-32 data in 2,048 dimensions measure 40."""


class Spread(NamedTuple):
    """Sums over a shard of vectors, to be added up over shards: `Spread(*map(sum, zip(*shards)))`."""

    rows: int
    total: NDArray[np.float64]  # (D,) sum of the unit vectors
    gram: NDArray[np.float64]  # (D, D) sum of their outer products


def spread(vectors: Floats) -> Spread:
    """The sums of one shard `(N, D)` that `rankme_of` and `mean_cosine_of` need; O(D²) memory."""
    x_ND = as_vectors(vectors, "vectors")
    return Spread(len(x_ND), x_ND.sum(axis=0), x_ND.T @ x_ND)


def rankme(vectors: Floats, *, eps: float = EPS) -> float:
    """The effective rank in [1, min(N, D)]: exp of the entropy of the singular values (S066, Garrido et al., 2023).

    Of the vectors as they are, neither centred nor normalised. Compare only values of equal N and D, with N well
    above D (N caps it), and of trained encoders: an untrained one may be high.

    Args:
        vectors: `(N, D)` floats, finite.
        eps: is added to each share of the sum, as in the paper.
    """
    x_ND = as_vectors(vectors, "vectors")
    if not x_ND.size:
        raise MetricError("there are no vectors", where="vectors")
    values: NDArray[np.float64] = np.linalg.svd(x_ND, compute_uv=False).astype(np.float64)
    return effective_rank(values, eps)


def rankme_of(gram: NDArray[np.float64], rows: int, *, eps: float = EPS) -> float:
    """`rankme` of N = `rows` vectors from the sum of their outer products `(D, D)`, float64.

    Squares have half the digits: a singular value below 1e-8 of the largest is rounding, and counts as little.
    """
    gram = np.asarray(gram)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1] or gram.dtype != np.float64:
        raise MetricError(f"expected float64 (D, D), got {gram.dtype} {gram.shape}", where="gram")
    if rows < 1 or not gram.size:
        raise MetricError("there are no vectors", where="gram")
    values = np.sqrt(np.linalg.eigvalsh(gram).clip(min=0.0))[::-1]
    return effective_rank(values[: min(rows, len(values))], eps)


def effective_rank(values: NDArray[np.float64], eps: float = EPS) -> float:
    """exp of the entropy of non-negative `values` `(D,)`, their sum made 1 and `eps` added to each share."""
    total = values.sum()
    if total == 0:
        raise MetricError("all vectors are zero", where="vectors")
    p = values / total + eps
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))
