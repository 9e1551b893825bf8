"""What can vectors of D dimensions return at best? Free embeddings, a construction, and what is proved (S031).

Suffixes: Q queries, N documents, K relevant documents of each query, D dimensions, S seeds fitted side by side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations, islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.metrics.arrays import Floats
from rayemb.evaluate.metrics.errors import MetricError

if TYPE_CHECKING:
    import torch

Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]


def limit_sets(n: int, k: int, most: int | None = None, *, seed: int = 0) -> Integers:
    """`(Q, k)` int64 different k-sets of 0 .. n-1, each sorted, the sets too: all C(n, k), or `most` drawn at random.

    Memory O(most · k) even where C(n, k) is astronomical.
    """
    check_shape(n, k)
    total = math.comb(n, k)
    count = total if most is None else min(most, total)
    if count * k > 200_000_000:
        raise MetricError(f"{count:,} sets of {k} are too many to hold", where="queries", fix="ask for fewer")
    rng = np.random.default_rng(seed)
    if total <= max(4 * count, 100_000):  # few enough to list
        kept = np.sort(rng.permutation(total)[:count])
        return np.array(list(_at(combinations(range(n), k), kept)), np.int64).reshape(count, k)
    drawn: set[tuple[int, ...]] = set()
    while len(drawn) < count:  # at most a quarter is taken, so that few draws are wasted
        drawn.add(tuple(sorted(rng.choice(n, k, replace=False).tolist())))
    return np.array(sorted(drawn), np.int64).reshape(count, k)


class Free(NamedTuple):
    """Vectors fitted to a relevance matrix without any model between, the best of several seeds."""

    solved: float
    """Share of the queries whose relevant documents all come first, in [0, 1]."""
    recall: float
    """Mean share of the relevant documents among the first K: the "accuracy" of the paper's code."""
    loss: float
    steps: int
    """Steps taken; fewer than allowed where all was solved, or nothing moved."""
    queries: Floats
    """`(Q, D)` unit vectors."""
    documents: Floats
    """`(N, D)` unit vectors."""


def free_embeddings(
    relevant: NDArray[np.int64],
    n: int,
    dim: int,
    *,
    temperature: float = 0.1,
    lr: float = 0.01,
    steps: int = 3000,
    patience: int = 1000,
    seeds: int = 3,
    seed: int = 0,
) -> Free:
    """Unit vectors of queries and documents themselves, fitted to `relevant` by InfoNCE: the best of `seeds` tries.

    The protocol of Weller et al. (2025): full batch, all documents as negatives, the loss averaged over positives,
    Adam, vectors brought back to length 1 after each step. The figures say what gradients reach, not what exists:
    see `reachable` and `cyclic_embeddings`.

    Args:
        relevant: `(Q, K)` int64 in 0 .. n-1.
        n: documents.
        dim: D ≥ 1.
        temperature, lr: the paper's .1 and .01.
        steps: at most; a fit ends when one try has solved every query (looked at every 25 steps).
        patience: ends, too, when no try's loss has fallen by 1e-5 for so many steps.
        seeds: tries side by side, as one tensor.

    Time O(steps · seeds · Q N D), memory O(seeds · Q (N + D)). Raises MetricError for settings without sense.
    """
    import torch
    import torch.nn.functional as F

    relevant_QK = np.asarray(relevant)
    if relevant_QK.ndim != 2 or not relevant_QK.size or relevant_QK.min() < 0 or relevant_QK.max() >= n:
        raise MetricError(f"expected integers (Q, K) in 0 .. {n - 1}, got {relevant_QK.shape}", where="relevant")
    for name, value in {"dim": dim, "steps": steps, "seeds": seeds, "patience": patience}.items():
        if value < 1:
            raise MetricError(f"is at least 1, got {value}", where=name)
    if temperature <= 0 or lr <= 0:
        raise MetricError(f"are positive, got {temperature} and {lr}", where="temperature, lr")
    at_QK = torch.from_numpy(relevant_QK.astype(np.int64))
    generator = torch.Generator().manual_seed(seed)

    def start(rows: int) -> torch.Tensor:
        return F.normalize(torch.randn(seeds, rows, dim, generator=generator), dim=-1).requires_grad_()

    q_SQD, c_SND = start(len(relevant_QK)), start(n)
    index_SQK = at_QK.expand(seeds, *at_QK.shape)
    adam = torch.optim.Adam([q_SQD, c_SND], lr=lr)
    best_S, since = torch.full((seeds,), float("inf")), 0
    taken = 0
    for taken in range(1, steps + 1):
        s_SQN = q_SQD @ c_SND.transpose(1, 2) / temperature
        loss_S = (s_SQN.logsumexp(-1, keepdim=True) - s_SQN.gather(2, index_SQK)).mean(dim=(1, 2))
        adam.zero_grad(set_to_none=True)
        loss_S.sum().backward()  # type: ignore[no-untyped-call]  # each try has its own gradient
        adam.step()
        with torch.no_grad():
            for x in (q_SQD, c_SND):
                x.copy_(F.normalize(x, dim=-1))
            better_S = loss_S.detach() < best_S - 1e-5
            best_S = torch.where(better_S, loss_S.detach(), best_S)
            since = 0 if bool(better_S.any()) else since + 1
            if since >= patience:
                break
            if taken % 25 == 0 and bool((_margins(q_SQD, c_SND, index_SQK) > 0).all(dim=1).any()):
                break
    with torch.no_grad():
        solved_S = (_margins(q_SQD, c_SND, index_SQK) > 0).float().mean(dim=1)
        winner = int(torch.argmax(solved_S - 1e-6 * best_S.clamp(max=1e3)))
        q_QD, c_ND = q_SQD[winner].detach(), c_SND[winner].detach()
        top_QK = (q_QD @ c_ND.T).topk(relevant_QK.shape[1], dim=1).indices
        found = (top_QK[:, :, None] == at_QK[:, None, :]).any(dim=1)
    return Free(
        float(solved_S[winner]), float(found.float().mean()), float(best_S[winner]), taken, q_QD.numpy(), c_ND.numpy()
    )


def critical_n(
    dim: int, k: int = 2, *, most: int = 64, steps: int = 3000, seeds: int = 3, seed: int = 0
) -> tuple[int, dict[int, float]]:
    """The largest n up to `most` all of whose k-sets free embeddings of `dim` dimensions are seen to return.

    A gallop from n = k + 1, then bisection, as in the paper; each n gets `seeds` tries of `steps` steps. What one
    finds is a floor: other seeds or more steps may reach more. Also returns the share of queries solved at each n
    that was tried. The queries of one n number C(n, k): keep `most` and k small.
    """
    if most <= k:
        raise MetricError(f"is above k = {k}, got {most}", where="most")
    tried: dict[int, float] = {}

    def solves(n: int) -> bool:
        if n not in tried:
            tried[n] = free_embeddings(limit_sets(n, k), n, dim, steps=steps, seeds=seeds, seed=seed).solved
        return tried[n] == 1.0

    low, high = k, k + 1  # k documents have one k-set, which all vectors return
    while high <= most and solves(high):
        low, high = high, min(2 * high, most) if high < most else most + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if solves(middle) else (low, middle)
    return low, dict(sorted(tried.items()))


def reachable(n: int, k: int, dim: int) -> bool | None:
    """Whether unit vectors of `dim` dimensions exist for n documents such that every k-set is some query's first k.

    In exact arithmetic. True where n ≤ dim + 1 (a simplex) or dim ≥ 2 min(k, n - k) (a cyclic polytope, Gale, 1963:
    `cyclic_embeddings`), so that 4 dimensions serve all pairs of *any* number of documents. False where dim < 2k and
    n ≥ dim + k: of any dim + 2 points on a sphere, two parts of two or more have hulls that meet (Radon, 1921), and a
    k-set that holds the smaller and none of the larger is not separable. None between: neither argument reaches.
    """
    check_shape(n, k)
    if dim < 1:
        raise MetricError(f"is at least 1, got {dim}", where="dim")
    small = min(k, n - k)  # a set and the rest are separated by the same hyperplane
    if n <= dim + 1 or dim >= 2 * small:
        return True
    return False if n >= dim + small and n >= dim + 2 else None


def cyclic_embeddings(n: int, k: int, relevant: NDArray[np.int64]) -> tuple[Doubles, Doubles]:
    """Vectors of 2k dimensions that solve *any* k-sets of n documents: queries `(Q, 2k)`, documents `(n, 2k)`, float64.

    Documents lie on the curve (cos t, sin t, ..., cos kt, sin kt) / √k at n even steps; the query of a set is minus
    the trigonometric polynomial Π (1 - cos(t - s)) over its members s, which is 0 there and positive elsewhere
    (Gale, 1963). All unit vectors. The margin shrinks like n^-2k: for pairs it is 2.1e-5 at n = 50, which float16 and
    8-bit codes do not resolve. A hard test of precision and quantisation, with a known answer.

    Raises MetricError if k > n or a set is not k different documents.
    """
    sets_QK = np.asarray(relevant)
    check_shape(n, k)
    if sets_QK.ndim != 2 or sets_QK.shape[1] != k or (sets_QK.size and (sets_QK.min() < 0 or sets_QK.max() >= n)):
        raise MetricError(f"expected integers (Q, {k}) in 0 .. {n - 1}, got {sets_QK.shape}", where="relevant")
    order = np.sort(sets_QK, axis=1)
    twice = np.flatnonzero((order[:, 1:] == order[:, :-1]).any(axis=1))
    if len(twice):
        raise MetricError(f"set {twice[0]} names a document twice", where="relevant")
    t_N = 2 * np.pi * np.arange(n) / n
    harmonics_k = np.arange(1, k + 1)
    angle_Nk = t_N[:, None] * harmonics_k
    documents = np.stack([np.cos(angle_Nk), np.sin(angle_Nk)], axis=2).reshape(n, 2 * k) / np.sqrt(k)
    # The polynomial's Fourier coefficients at -k .. k, factor by factor: 1 - (e^i(t-s) + e^-i(t-s)) / 2.
    poly_QH = np.zeros((len(sets_QK), 2 * k + 1), complex)
    poly_QH[:, k] = 1
    for place in range(k):
        turn_Q1 = np.exp(1j * t_N[sets_QK[:, place]])[:, None]
        up_QH, down_QH = np.roll(poly_QH, 1, axis=1) / turn_Q1, np.roll(poly_QH, -1, axis=1) * turn_Q1
        poly_QH = poly_QH - (up_QH + down_QH) / 2
    up_Qk = poly_QH[:, k + 1 :]
    queries = -np.stack([2 * up_Qk.real, -2 * up_Qk.imag], axis=2).reshape(len(sets_QK), 2 * k)
    return queries / np.linalg.norm(queries, axis=1, keepdims=True), documents


def check_shape(n: int, k: int) -> None:
    """MetricError unless n documents have sets of k."""
    if n < 1 or not 1 <= k <= n:
        raise MetricError(f"{n} documents have no sets of {k}", where="n, k", fix="1 ≤ k ≤ n")


def _at(items: Iterator[tuple[int, ...]], places: Integers) -> Iterator[tuple[int, ...]]:
    """The items at these rising places."""
    gaps = np.diff(places, prepend=-1) - 1
    for gap in gaps:
        yield from islice(items, int(gap), int(gap) + 1)


def _margins(q_SQD: torch.Tensor, c_SND: torch.Tensor, index_SQK: torch.Tensor) -> torch.Tensor:
    """`(S, Q)` by how much the worst relevant document beats the best other."""
    s_SQN = q_SQD @ c_SND.transpose(1, 2)
    own_SQ = s_SQN.gather(2, index_SQK).amin(dim=2)
    if s_SQN.shape[2] == index_SQK.shape[2]:
        return own_SQ + float("inf")  # there is no other
    return own_SQ - s_SQN.scatter(2, index_SQK, float("-inf")).amax(dim=2)
