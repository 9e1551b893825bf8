"""Hubness: whether a few vectors are everyone's neighbours, and others nobody's.

Radovanović et al., 2010 (k-occurrence and its skewness); Feldbauer et al., 2018 (Robin Hood index).
Suffixes: Q queries, M candidates, D dimensions, B queries of one block.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.metrics.arrays import Floats, normalised
from rayemb.evaluate.metrics.errors import MetricError

TIE = 1e-6
"""Cosines closer than this are a tie, as in `rayemb.evaluate.metrics`."""


class Hubness(NamedTuple):
    """How unevenly the places in the lists of nearest neighbours are dealt out to the candidates."""

    skewness: float
    """Third standardised moment of the k-occurrence; 0 where all occur alike, above about 1.4 there are hubs."""
    robin_hood: float
    """The share of places, in [0, 1), that would have to change hands for all to occur alike."""
    antihubs: float
    """The share of candidates that are in nobody's list: no search of k results finds them."""
    hubs: float
    """The share of places that hubs take, those that occur at least twice as often as the mean."""
    largest: float
    """The share of queries whose list has the largest hub."""
    occurrence: NDArray[np.float64]
    """`(M,)` in how many lists each candidate is; its mean is k · Q / M."""


def hubness(vectors: Floats, *, k: int = 10, queries: Floats | None = None, block: int = 1024) -> Hubness:
    """How often each of `(M, D)` vectors is among the k nearest by cosine, of the others or of `queries` `(Q, D)`.

    Candidates that tie for the last places share them in equal parts: a sort that takes the first by row makes hubs
    of a constant model's first rows, and its figures change with the order. O(block · M) memory, O(Q M D) time.

    Args:
        vectors: the candidates; of any length but 0, they are normalised.
        k: places in each list; fewer than there are candidates, since else all are in every list.
        queries: the other side, texts that search images; None: the vectors themselves, each without itself.
    """
    c_MD = normalised(vectors, "vectors")
    q_QD = c_MD if queries is None else normalised(queries, "queries")
    if q_QD.shape[1] != c_MD.shape[1]:
        raise MetricError(f"vectors have {c_MD.shape[1]} dimensions, queries {q_QD.shape[1]}", where="queries")
    others = len(c_MD) - (queries is None)
    if not 1 <= k < others:
        raise MetricError(f"lists of {k} have no choice among {max(others, 0):,} candidates", where="k")
    if not len(q_QD):
        raise MetricError("there are no queries", where="queries")
    occurrence_M = np.zeros(len(c_MD))
    for start in range(0, len(q_QD), block):
        s_BM = q_QD[start : start + block] @ c_MD.T
        if queries is None:
            own = np.arange(len(s_BM))
            s_BM[own, start + own] = -np.inf
        last_B1 = np.partition(s_BM, -k, axis=1)[:, -k, None]
        above_BM = s_BM > last_B1 + TIE
        tied_BM = (s_BM >= last_B1 - TIE) & ~above_BM
        left_B = k - above_BM.sum(axis=1)
        occurrence_M += above_BM.sum(axis=0) + (left_B / tied_BM.sum(axis=1)) @ tied_BM
    return _figures(occurrence_M, k, len(q_QD))


def _figures(n_M: NDArray[np.float64], k: int, queries: int) -> Hubness:
    mean = k * queries / len(n_M)
    apart_M = n_M - mean
    spread = float((apart_M**2).mean())
    alike = spread <= 1e-12 * mean**2
    return Hubness(
        skewness=0.0 if alike else float((apart_M**3).mean() / spread**1.5),
        robin_hood=float(abs(apart_M).sum() / (2 * k * queries)),
        antihubs=float((n_M == 0).mean()),
        hubs=float(n_M[n_M >= 2 * mean].sum() / (k * queries)),
        largest=float(n_M.max() / queries),
        occurrence=n_M,
    )
