"""How clustered a space is, without labels: the lengths at which its points grow together (S072).

Ghalyan, Gourgoulias et al., 2023. In the Vietoris-Rips filtration of N points all components are born at 0, and the
N - 1 times at which one dies are the edges of the Euclidean minimum spanning tree: no library of topology is needed.
Suffixes: N vectors, D dimensions, E = N - 1 edges.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.metrics.arrays import Floats, as_vectors, normalised
from rayemb.evaluate.metrics.errors import MetricError


class Separability(NamedTuple):
    """Functionals of the persistence times p, none of which sees scale or order.

    As classes separate, a few long edges between clusters come to stand beside many short ones within. On digits, over
    the checkpoints of eight runs, the first followed the labelled silhouette of unit vectors (Spearman 0.98 or more),
    `tail` nearly (0.90), `mean` mostly (-0.71), and `spread` hardly (-0.16). Log all.
    """

    concentration: float
    """1 - entropy, of -Σ q ln q / ln E with q = p / Σ p; in [0, 1], rises."""
    tail: float
    """The share of length in edges longer than mean + 2 std, or in the `clusters` - 1 longest; rises."""
    mean: float
    """mean(p) / max(p), the paper's, in [0, 1]; falls."""
    spread: float
    """std(p) / max(p); rises, but with the noise of the one longest edge."""
    edges: NDArray[np.float64]
    """`(E,)` float64, the persistence times, ascending, untrimmed and in the vectors' own unit."""


def separability(
    vectors: Floats,
    *,
    unit: bool = True,
    clusters: int | None = None,
    trim: float = 0.001,
    samples: int = 2000,
    seed: int = 0,
) -> Separability:
    """The functionals of `(N, D)` vectors. O(S² D) time and O(S D) memory for S = min(N, samples).

    Compare only values of equal S: the same seed draws the same rows, so that a curve over checkpoints is one.

    Args:
        vectors: floats, finite, N > 2.
        unit: normalise first, which the paper found essential.
        clusters: a guess of how many there are, for `tail`.
        trim: the share of the longest edges left out as outliers' (2 of 2,000).
        samples: at most so many rows are looked at.
        seed: which.

    Raises MetricError where all vectors are one.
    """
    x_ND = normalised(vectors, "vectors") if unit else as_vectors(vectors, "vectors")
    if len(x_ND) < 3 or samples < 3:
        raise MetricError(f"a spread of edges needs three vectors, got {min(len(x_ND), samples)}", where="vectors")
    if not 0 <= trim < 1:
        raise MetricError(f"expected a share in [0, 1), got {trim}", where="trim")
    if len(x_ND) > samples:
        x_ND = x_ND[np.random.default_rng(seed).choice(len(x_ND), samples, replace=False)]
    edges = persistence(x_ND)
    p_E = edges[: max(len(edges) - int(trim * len(edges)), 2)]
    longest, total = float(p_E[-1]), float(p_E.sum())
    if longest <= 1e-9 * float(abs(x_ND).max()):
        raise MetricError("all vectors are one", where="vectors")
    if clusters is None:
        tail = p_E[p_E > p_E.mean() + 2 * p_E.std()]
    elif 2 <= clusters <= len(p_E):
        tail = p_E[-(clusters - 1) :]
    else:
        raise MetricError(f"expected 2 .. {len(p_E)}, got {clusters}", where="clusters")
    q_E = p_E[p_E > 0] / total
    entropy = -float((q_E * np.log(q_E)).sum() / np.log(len(p_E)))
    return Separability(
        concentration=min(max(1 - entropy, 0.0), 1.0),
        tail=float(tail.sum()) / total,
        mean=total / len(p_E) / longest,
        spread=float(p_E.std()) / longest,
        edges=edges,
    )


def persistence(vectors: Floats) -> NDArray[np.float64]:
    """The edges `(N - 1,)` float64 of the minimum spanning tree of `(N, D)` vectors, ascending (Prim, 1957).

    The merge heights of single linkage. O(N² D) time, O(N D) memory: a row of distances at a time.
    """
    x_ND = as_vectors(vectors, "vectors", least=1, why="a tree")
    centred_ND = x_ND - x_ND.mean(axis=0)
    squares_N = (centred_ND**2).sum(axis=1)
    near_N, parent_N = np.full(len(x_ND), np.inf), np.zeros(len(x_ND), np.int64)
    outside_N = np.ones(len(x_ND), np.bool_)
    children, at = [], 0
    for _ in range(len(x_ND) - 1):
        outside_N[at] = False
        d_N = squares_N + squares_N[at] - 2 * (centred_ND @ centred_ND[at])
        closer_N = outside_N & (d_N < near_N)
        near_N[closer_N], parent_N[closer_N] = d_N[closer_N], at
        at = int(np.where(outside_N, near_N, np.inf).argmin())
        children.append(at)
    # The lengths once more from differences: products leave a duplicate at 1e-8 rather than at 0.
    return np.sort(np.linalg.norm(x_ND[children] - x_ND[parent_N[children]], axis=1))


def plateau(scores: Sequence[float], *, window: int = 3, tolerance: float = 0.02) -> int | None:
    """The first evaluation (from 0) at which a score has levelled out; None where it has not.

    That is, where none of the last `window` steps from one evaluation to the next changed it by more than `tolerance`
    of itself. On digits `concentration` still grew by more than 2 % a step long after the accuracy had stopped growing,
    and 10 % stopped within one point of the best checkpoint.
    """
    if window < 1 or not tolerance > 0:
        raise MetricError(f"no plateau with window {window} and tolerance {tolerance}", where="window, tolerance")
    bad = [at for at, score in enumerate(scores) if not np.isfinite(score)]
    if bad:
        raise MetricError("is not finite", where=f"scores[{bad[0]}]")
    still = 0
    for at, (before, after) in enumerate(pairwise(scores), start=1):
        still = still + 1 if abs(after - before) <= tolerance * abs(before) else 0
        if still == window:
            return at
    return None
