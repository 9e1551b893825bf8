"""Classification by the nearest neighbours, as DINO does it, without trusting ties."""

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.metrics.arrays import as_integers, as_vectors
from rayemb.evaluate.metrics.errors import MetricError
from rayemb.evaluate.metrics.retrieval import TIE, _excluded, _k


def knn_hits(
    queries: NDArray[np.float32],
    candidates: NDArray[np.float32],
    labels_q: NDArray[np.int64],
    labels_c: NDArray[np.int64],
    *,
    exclude: NDArray[np.int64] | None = None,
    k: int = 20,
    temperature: float = 0.07,
    block: int = 1024,
) -> NDArray[np.float64]:
    """Per query `(Q,)` float64: 1 where its class has the most votes of its k nearest candidates, else 0.

    A neighbour votes with exp(similarity / temperature) (Caron et al., 2021). Ties count against the model: of equally
    near candidates those of another class are neighbours first, and a class that shares the first place has lost.

    Args:
        queries: `(Q, D)` floats, unit vectors.
        candidates: `(M, D)`.
        labels_q: `(Q,)` int64.
        labels_c: `(M,)` int64.
        exclude: `(Q,)` int64: the candidate that is the query itself (leave-one-out), -1 where there is none.
        k: neighbours; all candidates where there are fewer.
        block: queries at a time; memory is O(block · M).
    """
    q_QD, c_MD = as_vectors(queries, "queries"), as_vectors(candidates, "candidates")
    l_Q, l_M = as_integers(labels_q, len(q_QD), "labels_q"), as_integers(labels_c, len(c_MD), "labels_c")
    self_Q = _excluded(exclude, len(q_QD), len(c_MD))
    if len(c_MD) < 1 + (self_Q >= 0).any():
        raise MetricError("there are no candidates", where="candidates")
    hits = np.zeros(len(q_QD))
    for start in range(0, len(q_QD), block):
        part = slice(start, start + block)
        s_BM = q_QD[part] @ c_MD.T
        rows = np.flatnonzero(self_Q[part] >= 0)
        s_BM[rows, self_Q[part][rows]] = -np.inf
        own_BM = l_Q[part, None] == l_M[None, :]
        order_BM = s_BM - 2 * TIE * own_BM
        most = min(_k(k), len(c_MD))
        at_BK = np.argpartition(-order_BM, most - 1, axis=1)[:, :most]
        s_BK = np.take_along_axis(s_BM, at_BK, axis=1)
        votes_BK = np.exp((s_BK - s_BK.max(axis=1, keepdims=True)) / temperature)
        hits[part] = [_won(l_M[at], v, int(own)) for at, v, own in zip(at_BK, votes_BK, l_Q[part], strict=True)]
    return hits


def _won(labels: NDArray[np.int64], votes: NDArray[np.float64], own: int) -> bool:
    there, inverse = np.unique(labels, return_inverse=True)
    sums = np.bincount(inverse, weights=votes)
    mine = sums[there == own].sum()
    others = sums[there != own].max(initial=0.0)
    return bool(mine > others * (1 + 1e-4))
