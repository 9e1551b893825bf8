"""What a set of vectors looks like without labels: its rank, its spread, its pairs; and whether it has collapsed.

All sums are in float64, and each comes in a form that adds up over shards, so that many processes find what one would.
Suffixes: N vectors, D dimensions, B rows of one block, M candidates.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.metrics.errors import MetricError
from rayemb.evaluate.metrics.retrieval import _integers, _vectors

EPS = 1e-7
"""Of the paper. At 1e-5, which one public implementation has, rank-32 data in 2,048 dimensions measure 40."""
UNIT = 1e-3
COLLAPSED_RANK, COLLAPSED_COSINE = 0.02, 0.99
"""Below this share of the rank there could be, or above this mean cosine, vectors no longer tell their inputs apart."""


class Spread(NamedTuple):
    """Sums over a shard of vectors, to be added up over shards: `Spread(*map(sum, zip(*shards)))`."""

    rows: int
    total: NDArray[np.float64]  # (D,) sum of the unit vectors
    gram: NDArray[np.float64]  # (D, D) sum of their outer products


def spread(vectors: NDArray[np.float32]) -> Spread:
    """The sums of one shard `(N, D)` that `rankme_of` and `mean_cosine_of` need; O(D²) memory."""
    x_ND = _vectors(vectors, "vectors")
    return Spread(len(x_ND), x_ND.sum(axis=0), x_ND.T @ x_ND)


def rankme(vectors: NDArray[np.float32], *, eps: float = EPS) -> float:
    """The effective rank in [1, min(N, D)]: exp of the entropy of the singular values (S066, Garrido et al., 2023).

    Of the vectors as they are, neither centred nor normalised. Compare only values of equal N and D, with N well
    above D (N caps it), and of trained encoders: an untrained one may be high.

    Args:
        vectors: `(N, D)` floats, finite.
        eps: is added to each share of the sum, as in the paper.
    """
    x_ND = _vectors(vectors, "vectors")
    if not x_ND.size:
        raise MetricError("there are no vectors", where="vectors")
    values: NDArray[np.float64] = np.linalg.svd(x_ND, compute_uv=False).astype(np.float64)
    return _effective_rank(values, eps)


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
    return _effective_rank(values[: min(rows, len(values))], eps)


def _effective_rank(values: NDArray[np.float64], eps: float) -> float:
    total = values.sum()
    if total == 0:
        raise MetricError("all vectors are zero", where="vectors")
    p = values / total + eps
    p = p[p > 0]
    return float(np.exp(-(p * np.log(p)).sum()))


def uniformity(vectors: NDArray[np.float32], *, t: float = 2.0, block: int = 1024) -> float:
    """log mean exp(-t ‖x - y‖²) over distinct pairs of unit vectors `(N, D)` (S046; Wang & Isola, 2020).

    0 if all are one vector, lower the more evenly they lie on the sphere. O(block · N) memory, O(N² D) time.
    """
    total = uniformity_sum(vectors, vectors, 0, t=t, block=block)
    rows = len(vectors)
    if rows < 2:
        raise MetricError(f"pairs need two vectors, got {rows}", where="vectors")
    return float(np.log(total / (rows * (rows - 1))))


def uniformity_sum(
    part: NDArray[np.float32], vectors: NDArray[np.float32], start: int, *, t: float = 2.0, block: int = 1024
) -> float:
    """The sum of exp(-t ‖x - y‖²) of a shard's x, `vectors[start : start + len(part)]`, over all y but x itself."""
    x_ND, y_MD = _units(part, "part"), _units(vectors, "vectors")
    total = 0.0
    for at in range(0, len(x_ND), block):
        s_BM = x_ND[at : at + block] @ y_MD.T
        values_BM = np.exp(-2 * t * (1 - s_BM.clip(-1, 1)))
        rows = np.arange(len(values_BM))
        values_BM[rows, start + at + rows] = 0.0
        total += float(values_BM.sum())
    return total


def alignment(queries: NDArray[np.float32], documents: NDArray[np.float32]) -> float:
    """The mean ‖x - y‖² of the pairs in unit vectors `(N, D)` and `(N, D)`, in [0, 4]; 0 is perfect (S046)."""
    x_ND, y_ND = _units(queries, "queries"), _units(documents, "documents")
    if x_ND.shape != y_ND.shape or not len(x_ND):
        raise MetricError(f"expected pairs, got {x_ND.shape} and {y_ND.shape}", where="documents")
    return float(((x_ND - y_ND) ** 2).sum(axis=1).mean())


def tolerance(vectors: NDArray[np.float32], labels: NDArray[np.int64]) -> float:
    """The mean cosine of distinct pairs of one class, in [-1, 1] (S046; Wang & Liu, 2021). O(N D).

    Args:
        vectors: `(N, D)` unit vectors.
        labels: `(N,)` int64. A class of one has no pairs; MetricError if none has any.
    """
    x_ND = _units(vectors, "vectors")
    _, inverse, counts = np.unique(_integers(labels, len(x_ND), "labels"), return_inverse=True, return_counts=True)
    pairs = int((counts * (counts - 1)).sum())
    if not pairs:
        raise MetricError("no class has two vectors", where="labels")
    sums = np.zeros((len(counts), x_ND.shape[1]))
    np.add.at(sums, inverse, x_ND)
    return float(((sums**2).sum() - (x_ND**2).sum()) / pairs)


def mean_cosine(vectors: NDArray[np.float32]) -> float:
    """The mean cosine of distinct pairs of unit vectors `(N, D)`, in [-1/(N-1), 1]: near 1, all are one vector."""
    x_ND = _units(vectors, "vectors")
    return mean_cosine_of(x_ND.sum(axis=0), len(x_ND))


def mean_cosine_of(total: NDArray[np.float64], rows: int) -> float:
    """`mean_cosine` of N = `rows` unit vectors from their sum `(D,)`."""
    if rows < 2:
        raise MetricError(f"pairs need two vectors, got {rows}", where="vectors")
    return float((np.square(total).sum() - rows) / (rows * (rows - 1)))


def relative_penalties(
    similarities: NDArray[np.float32], positives: NDArray[np.int64], temperature: float
) -> NDArray[np.float64]:
    """How each anchor's repulsion is dealt out to its negatives, `(B, M)` float64 (S046).

    r_ij = exp(s_ij / τ) / sum over negatives k of exp(s_ik / τ): each row sums to 1, and the positive's place holds 0.
    InfoNCE pushes negative j with r_ij times the strength with which it pulls the positive.

    Args:
        similarities: `(B, M)` floats.
        positives: `(B,)` int64, the column of each row's positive.
        temperature: τ > 0.
    """
    s_BM = _vectors(similarities, "similarities") / temperature
    at_B = _integers(positives, len(s_BM), "positives")
    if s_BM.shape[1] < 2:
        raise MetricError("there are no negatives", where="similarities")
    s_BM[np.arange(len(s_BM)), at_B] = -np.inf
    e_BM = np.exp(s_BM - s_BM.max(axis=1, keepdims=True))
    shares: NDArray[np.float64] = e_BM / e_BM.sum(axis=1, keepdims=True)
    return shares


def negative_entropy(
    similarities: NDArray[np.float32], positives: NDArray[np.int64], temperature: float
) -> NDArray[np.float64]:
    """The entropy `(B,)` in nats of each anchor's `relative_penalties`, in [0, ln(M - 1)]; it rises with τ.

    Near 0 the hardest negative takes all the gradient, near ln(M - 1) all negatives are treated alike.
    """
    r_BM = relative_penalties(similarities, positives, temperature)
    entropy: NDArray[np.float64] = -(r_BM * np.log(np.where(r_BM > 0, r_BM, 1.0))).sum(axis=1)
    return entropy


def collapse(rank: float, rows: int, dim: int, cosine: float) -> str | None:
    """Why N = `rows` vectors of `dim` dimensions count as collapsed, in words; None where they do not.

    Args:
        rank: their `rankme`; too low below 2 % of min(N, D), unless that is less than 2.
        cosine: their `mean_cosine`; too high above 0.99.
    """
    most = min(rows, dim)
    if cosine > COLLAPSED_COSINE:
        return f"all vectors are nearly one (mean cosine {cosine:.4f})"
    if most > 1 and rank < max(1.05, COLLAPSED_RANK * most):
        return f"the vectors have rank {rank:.2f} of {most}"
    return None


def _units(array: NDArray[np.float32], name: str) -> NDArray[np.float64]:
    x_ND = _vectors(array, name)
    wrong = int((abs((x_ND**2).sum(axis=1) - 1) > UNIT).sum())
    if wrong:
        raise MetricError(f"{wrong:,} of {len(x_ND):,} vectors are not of length 1", where=name, fix="normalise them")
    return x_ND
