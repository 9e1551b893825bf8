"""Whether long texts' vectors grow alike, as attention averages over ever more tokens (S183; Zhou et al., 2024).

Suffixes: N texts, D dimensions, K buckets of length, T tokens.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.metrics.arrays import Floats, as_integers, normalised
from rayemb.evaluate.metrics.errors import MetricError


class LengthCollapse(NamedTuple):
    """Mean cosines by length. A query is short and a document long: what separates the two hurts retrieval."""

    gap: float
    """The mean cosine of two of the longest bucket minus that of two of the shortest; above 0, long ones collapse."""
    across: float
    """The mean cosine of one of the shortest and one of the longest."""
    cosines: NDArray[np.float64]
    """`(K, K)` float64, the mean cosine of distinct texts of two buckets, shortest first."""
    longest: NDArray[np.int64]
    """`(K,)` int64, the greatest length in each bucket."""
    sizes: NDArray[np.int64]
    """`(K,)` int64, texts in each bucket."""


def length_collapse(vectors: Floats, lengths: NDArray[np.int64], *, buckets: int = 4) -> LengthCollapse:
    """The mean cosines of `(N, D)` vectors, taken at length 1, by the length `(N,)` of their texts. O(N D).

    Texts on the subject of each other are alike at any length: give texts whose subjects do not go with their length,
    or pieces of different length of the same ones.

    Args:
        vectors: of any length but 0.
        lengths: in tokens, or in characters where tokenisers differ.
        buckets: of as equal size as they can be, since texts of one length share one.

    Raises MetricError for fewer than two different lengths, and for a bucket of one text.
    """
    x_ND = normalised(vectors, "vectors")
    length_N = as_integers(lengths, len(x_ND), "lengths")
    if buckets < 2:
        raise MetricError(f"short and long are two buckets, got {buckets}", where="buckets")
    if len(x_ND) < 2 * buckets:
        raise MetricError(f"{buckets} buckets of two need {2 * buckets} texts, got {len(x_ND)}", where="vectors")
    tops = np.quantile(length_N, np.linspace(0, 1, buckets + 1)[1:], method="lower")
    bucket_N = np.unique(np.searchsorted(np.unique(tops), length_N), return_inverse=True)[1]
    sizes = np.bincount(bucket_N)
    if len(sizes) < 2:
        raise MetricError(f"all texts are of one length, {length_N[0]}, or nearly all", where="lengths")
    longest = np.array([length_N[bucket_N == at].max() for at in range(len(sizes))])
    if sizes.min() < 2:
        alone = longest[sizes.argmin()]
        raise MetricError(f"only one text is about {alone} long", where="lengths", fix="ask for fewer buckets")
    sums = np.zeros((len(sizes), x_ND.shape[1]))
    np.add.at(sums, bucket_N, x_ND)
    pairs = np.outer(sizes, sizes) - np.diag(sizes)
    cosines = (sums @ sums.T - np.diag(sizes.astype(np.float64))) / pairs
    gap = float(cosines[-1, -1] - cosines[0, 0])
    return LengthCollapse(gap, float(cosines[0, -1]), cosines, longest.astype(np.int64), sizes.astype(np.int64))


def high_frequency(states: Floats, real: NDArray[np.bool_] | None = None) -> NDArray[np.float64]:
    """Per text `(N,)` float64 in [0, 1]: ‖X - mean over tokens‖ / ‖X‖ of one layer's token states.

    What attention cannot average away; by length and layer, it shows where long texts lose what tells tokens apart.

    Args:
        states: `(N, T, D)` floats.
        real: `(N, T)` bool, False where a token is padding; None: all are real.
    """
    x_NTD = np.asarray(states)
    if x_NTD.ndim != 3 or not np.issubdtype(x_NTD.dtype, np.floating):
        raise MetricError(f"expected floats (N, T, D), got {x_NTD.dtype} {x_NTD.shape}", where="states")
    real_NT = np.ones(x_NTD.shape[:2], np.bool_) if real is None else np.asarray(real)
    if real_NT.shape != x_NTD.shape[:2] or real_NT.dtype != np.bool_:
        raise MetricError(f"expected bool {x_NTD.shape[:2]}, got {real_NT.dtype} {real_NT.shape}", where="real")
    return np.array([_share(x_TD[real_T], at) for at, (x_TD, real_T) in enumerate(zip(x_NTD, real_NT, strict=True))])


def _share(x_TD: NDArray[np.floating], at: int) -> float:
    x_TD = x_TD.astype(np.float64)
    total = float(np.linalg.norm(x_TD))
    if not np.isfinite(total) or not total:
        raise MetricError("has no real tokens, none but zeros, or NaN or infinity", where=f"states, text {at}")
    return float(np.linalg.norm(x_TD - x_TD.mean(axis=0))) / total
