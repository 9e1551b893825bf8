"""Uniformity, alignment and tolerance, and how a temperature deals out the repulsion (S046).

Wang & Isola, 2020; Wang & Liu, 2021. All sums are in float64, and uniformity's adds up over shards, so that many
processes find what one would.
Suffixes: N vectors, D dimensions, B rows of one block, M candidates.
"""

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.metrics.arrays import Floats, as_integers, as_units, as_vectors
from rayemb.evaluate.metrics.errors import MetricError


def uniformity(vectors: Floats, *, t: float = 2.0, block: int = 1024) -> float:
    """log mean exp(-t ‖x - y‖²) over distinct pairs of unit vectors `(N, D)` (S046; Wang & Isola, 2020).

    0 if all are one vector, lower the more evenly they lie on the sphere. O(block · N) memory, O(N² D) time.
    """
    total = uniformity_sum(vectors, vectors, 0, t=t, block=block)
    rows = len(vectors)
    if rows < 2:
        raise MetricError(f"pairs need two vectors, got {rows}", where="vectors")
    return float(np.log(total / (rows * (rows - 1))))


def uniformity_sum(part: Floats, vectors: Floats, start: int, *, t: float = 2.0, block: int = 1024) -> float:
    """The sum of exp(-t ‖x - y‖²) of a shard's x, `vectors[start : start + len(part)]`, over all y but x itself."""
    x_ND, y_MD = as_units(part, "part"), as_units(vectors, "vectors")
    total = 0.0
    for at in range(0, len(x_ND), block):
        s_BM = x_ND[at : at + block] @ y_MD.T
        values_BM = np.exp(-2 * t * (1 - s_BM.clip(-1, 1)))
        rows = np.arange(len(values_BM))
        values_BM[rows, start + at + rows] = 0.0
        total += float(values_BM.sum())
    return total


def alignment(queries: Floats, documents: Floats) -> float:
    """The mean ‖x - y‖² of the pairs in unit vectors `(N, D)` and `(N, D)`, in [0, 4]; 0 is perfect (S046)."""
    x_ND, y_ND = as_units(queries, "queries"), as_units(documents, "documents")
    if x_ND.shape != y_ND.shape or not len(x_ND):
        raise MetricError(f"expected pairs, got {x_ND.shape} and {y_ND.shape}", where="documents")
    return float(((x_ND - y_ND) ** 2).sum(axis=1).mean())


def tolerance(vectors: Floats, labels: NDArray[np.int64]) -> float:
    """The mean cosine of distinct pairs of one class, in [-1, 1] (S046; Wang & Liu, 2021). O(N D).

    Args:
        vectors: `(N, D)` unit vectors.
        labels: `(N,)` int64. A class of one has no pairs; MetricError if none has any.
    """
    x_ND = as_units(vectors, "vectors")
    _, inverse, counts = np.unique(as_integers(labels, len(x_ND), "labels"), return_inverse=True, return_counts=True)
    pairs = int((counts * (counts - 1)).sum())
    if not pairs:
        raise MetricError("no class has two vectors", where="labels")
    sums = np.zeros((len(counts), x_ND.shape[1]))
    np.add.at(sums, inverse, x_ND)
    return float(((sums**2).sum() - (x_ND**2).sum()) / pairs)


def relative_penalties(similarities: Floats, positives: NDArray[np.int64], temperature: float) -> NDArray[np.float64]:
    """How each anchor's repulsion is dealt out to its negatives, `(B, M)` float64 (S046).

    r_ij = exp(s_ij / τ) / sum over negatives k of exp(s_ik / τ): each row sums to 1, and the positive's place holds 0.
    InfoNCE pushes negative j with r_ij times the strength with which it pulls the positive.

    Args:
        similarities: `(B, M)` floats.
        positives: `(B,)` int64, the column of each row's positive.
        temperature: τ > 0.
    """
    s_BM = as_vectors(similarities, "similarities") / temperature
    at_B = as_integers(positives, len(s_BM), "positives")
    if s_BM.shape[1] < 2:
        raise MetricError("there are no negatives", where="similarities")
    s_BM[np.arange(len(s_BM)), at_B] = -np.inf
    e_BM = np.exp(s_BM - s_BM.max(axis=1, keepdims=True))
    shares: NDArray[np.float64] = e_BM / e_BM.sum(axis=1, keepdims=True)
    return shares


def negative_entropy(similarities: Floats, positives: NDArray[np.int64], temperature: float) -> NDArray[np.float64]:
    """The entropy `(B,)` in nats of each anchor's `relative_penalties`, in [0, ln(M - 1)]; it rises with τ.

    Near 0 the hardest negative takes all the gradient, near ln(M - 1) all negatives are treated alike.
    """
    r_BM = relative_penalties(similarities, positives, temperature)
    entropy: NDArray[np.float64] = -(r_BM * np.log(np.where(r_BM > 0, r_BM, 1.0))).sum(axis=1)
    return entropy
