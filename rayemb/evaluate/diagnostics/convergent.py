"""Have two models learnt the same units? One to one, few to one, many to many (S090, Li, Yosinski et al., 2016).

A unit is a dimension of a space. `cka`, `svcca` and `mutual_knn` see through a rotation; these do not: they ask whether
the *axes* mean the same, which is what one needs to know before cutting, averaging or stitching dimensions.

Suffixes: N items, P and Q units of the two spaces, L penalties. Everything is of units at mean 0 and variance 1. A unit
that never moves (a dead one) has no correlation; it is left out, counted, and the numbers of the others are kept.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.diagnostics.spaces import centred, two_spaces
from rayemb.evaluate.metrics.arrays import Floats
from rayemb.evaluate.metrics.errors import MetricError

Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]
DEAD = 1e-12
"""A standard deviation below this share of the unit's largest value is the rounding of a constant."""
PENALTIES = (0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
"""On units of variance 1; a penalty of 1 always leaves nothing."""


class UnitMatching(NamedTuple):
    """Which unit of the other space each unit is most like."""

    matched: float
    """Mean correlation of the best one-to-one assignment, in [-1, 1]."""
    semi_matched: float
    """Mean of each unit's best correlation, where many may choose the same: never below `matched`."""
    greedy: float
    """Mean of taking the best pair left, again and again."""
    chance: float
    """About what `semi_matched` is between unrelated units, √(2 ln Q / N)."""
    dead: int
    """Units of both spaces that never move."""
    pairs: Integers
    """`(M, 2)` units of the assignment, best first, M = min(P, Q)."""
    correlations: Doubles
    """`(M,)` of those pairs, falling."""
    semi_correlations: Doubles
    """`(P,)` each unit's best, falling: where this curve leaves the one above, units are redundant or have no match."""


def unit_matching(x: Floats, y: Floats, *, absolute: bool = False) -> UnitMatching:
    """How well the units of `(N, P)` match units of `(N, Q)`, one to one and many to one.

    1 for a permuted copy, low for a rotated one. With fewer items than units high values come by chance: see `chance`.

    Args:
        x: `(N, P)` floats, finite.
        y: `(N, Q)`, row i the same item as in `x`.
        absolute: count a unit and its negative as the same. The paper has signs.

    Time O(N P Q + max(P, Q)³), memory O(P Q). Raises MetricError for tables of unequal length, non-finite rows, and a
    table whose units are all dead.
    """
    from scipy.optimize import linear_sum_assignment

    z_NP, z_NQ, at_P, at_Q, dead = _units(x, y)
    r_PQ = _between(z_NP, z_NQ)
    score_PQ = np.abs(r_PQ) if absolute else r_PQ
    rows, columns = linear_sum_assignment(score_PQ, maximize=True)
    order = np.argsort(-score_PQ[rows, columns], kind="stable")
    rows, columns = rows[order], columns[order]
    best_P = score_PQ.max(axis=1)
    return UnitMatching(
        float(score_PQ[rows, columns].mean()),
        float(best_P.mean()),
        _greedy(score_PQ),
        float(np.sqrt(2 * np.log(max(2, len(at_Q))) / len(z_NP))),
        dead,
        np.stack([at_P[rows], at_Q[columns]], axis=1),
        score_PQ[rows, columns],
        np.sort(best_P)[::-1],
    )


class SparsePrediction(NamedTuple):
    """How much of a unit a few units of the other space tell."""

    r2: float
    """The best mean held-out R² of any penalty."""
    units: float
    """Mean number of units that it uses."""
    one_unit_r2: float
    """Mean held-out R² of the single best unit, for comparison."""
    penalties: Doubles
    """`(L,)` falling."""
    r2_by_penalty: Doubles
    """`(L,)` mean held-out R², at most 1; below 0 where the fit is worse than the mean."""
    units_by_penalty: Doubles
    """`(L,)` mean number of units used."""


def sparse_prediction(
    x: Floats,
    y: Floats,
    *,
    penalties: Sequence[float] = PENALTIES,
    targets: int | None = 128,
    held_out: float = 0.25,
    seed: int = 0,
) -> SparsePrediction:
    """Predicts units of `(N, P)` from few units of `(N, Q)` by the Lasso, for a sweep of penalties.

    The curve of R² against the number of units used tells a shared basis (high from one unit on) from a shared
    subspace (high, but only with many).

    Args:
        x: `(N, P)` floats, finite: whose units are predicted.
        y: `(N, Q)`, row i the same item as in `x`: from what.
        penalties: of ‖w‖₁, in units of variance 1, each > 0; of little use above 1.
        targets: predict this many units of `x`, drawn with `seed`; None: all.
        held_out: share of the items that R² is measured on, in (0, 1). The paper measured on what it fitted.
        seed: draws the held-out items and the targets.

    Time O(N Q² + targets · L · Q²), memory O(Q² + N (P + Q)). Raises MetricError as `unit_matching`, and for fewer than
    8 items.
    """
    from sklearn.linear_model import lasso_path

    alphas_L = np.sort(np.asarray(penalties, np.float64))[::-1]
    if not len(alphas_L) or not np.isfinite(alphas_L).all() or alphas_L[-1] <= 0:
        raise MetricError(f"penalties are positive numbers, got {list(penalties)}", where="penalties")
    if not 0 < held_out < 1:
        raise MetricError(f"a share lies between 0 and 1, got {held_out}", where="held_out")
    if targets is not None and targets < 1:
        raise MetricError(f"at least one unit is predicted, got {targets}", where="targets")
    z_NP, z_NQ, *_ = _units(x, y, least=8)
    rng = np.random.default_rng(seed)
    test, train = np.split(rng.permutation(len(z_NP)), [max(2, round(held_out * len(z_NP)))])
    if len(train) < 4:
        raise MetricError(f"{len(train)} items are left to fit", where="held_out", fix="hold out fewer")
    chosen = rng.permutation(z_NP.shape[1])[:targets]
    # Mean 0 of the fitted items, so that no intercept is needed; a unit may be constant among them and stays 0.
    mean_P, mean_Q = z_NP[train].mean(axis=0), z_NQ[train].mean(axis=0)
    a_NP, a_NQ = z_NP - mean_P, z_NQ - mean_Q
    fit_NQ = np.asfortranarray(a_NQ[train])
    gram_QQ = fit_NQ.T @ fit_NQ
    errors_TL, used_TL, one_T = np.empty((len(chosen), len(alphas_L))), np.empty((len(chosen), len(alphas_L))), []
    for i, unit in enumerate(chosen):
        target_N = a_NP[train, unit]
        cross_Q = fit_NQ.T @ target_N
        _, w_QL, _ = lasso_path(fit_NQ, target_N, alphas=alphas_L, precompute=gram_QQ, Xy=cross_Q, max_iter=5000)
        spread = (a_NP[test, unit] ** 2).mean() or 1.0
        errors_TL[i] = ((a_NQ[test] @ w_QL - a_NP[test, unit, None]) ** 2).mean(axis=0) / spread
        used_TL[i] = (w_QL != 0).sum(axis=0)
        one_T.append(_one_unit(cross_Q, gram_QQ, a_NQ[test], a_NP[test, unit]) / spread)
    r2_L = 1 - errors_TL.mean(axis=0)
    best = int(r2_L.argmax())
    used_L = used_TL.mean(axis=0)
    return SparsePrediction(float(r2_L[best]), float(used_L[best]), float(1 - np.mean(one_T)), alphas_L, r2_L, used_L)


class SpectralOverlap(NamedTuple):
    """Groups of units that go together, and whether both spaces are in them."""

    mixed: float
    """Share of the clusters that hold units of both spaces."""
    balance: float
    """Mean over units of how evenly its cluster is shared, in [0, 1]: 1 if every cluster has its fair part of both."""
    clusters: Integers
    """`(C, 2)` how many units of each space each cluster holds, largest first."""
    members: Integers
    """`(P + Q,)` cluster of each live unit, those of the first space before the second's."""


def spectral_overlap(x: Floats, y: Floats, *, clusters: int = 10, seed: int = 0) -> SpectralOverlap:
    """Clusters the units of `(N, P)` and `(N, Q)` together, by |correlation|, and counts the clusters of both spaces.

    Spectral clustering of the joint graph: edges within each space and between the two. Two spaces that share a
    subspace but not its basis have mixed clusters; unrelated ones fall apart into clusters of their own.

    Args:
        x: `(N, P)` floats, finite.
        y: `(N, Q)`, row i the same item as in `x`.
        clusters: C, from 2 to P + Q - 1.
        seed: of the k-means in it.

    Time and memory O((P + Q)³) and O((P + Q)²). Raises MetricError as `unit_matching`.
    """
    from sklearn.cluster import SpectralClustering

    z_NP, z_NQ, at_P, at_Q, _ = _units(x, y)
    p, q = len(at_P), len(at_Q)
    if not 2 <= clusters < p + q:
        raise MetricError(f"{p + q} live units make 2 to {p + q - 1} clusters, got {clusters}", where="clusters")
    z_NU = np.concatenate([z_NP, z_NQ], axis=1)
    graph_UU = np.abs(_between(z_NU, z_NU))
    # Self-edges are all alike and say nothing. A floor keeps units without any correlation in one graph.
    np.fill_diagonal(graph_UU, 0.0)
    graph_UU = np.maximum(graph_UU, 1e-9)
    found = SpectralClustering(clusters, affinity="precomputed", random_state=seed, assign_labels="kmeans")
    members_U = found.fit_predict((graph_UU + graph_UU.T) / 2).astype(np.int64)
    counts_C2 = np.stack(
        [np.bincount(members_U[:p], minlength=clusters), np.bincount(members_U[p:], minlength=clusters)]
    )
    counts_C2 = counts_C2.T[np.argsort(-counts_C2.sum(axis=0), kind="stable")].astype(np.int64)
    sizes_C = counts_C2.sum(axis=1)
    there = sizes_C > 0
    share_C = counts_C2[there, 0] / sizes_C[there]
    fair = p / (p + q)
    # 1 where a cluster holds the first space's share of all units, falling to 0 where it holds one space only.
    even_C = np.where(share_C <= fair, share_C / fair, (1 - share_C) / (1 - fair))
    return SpectralOverlap(
        float((counts_C2[there] > 0).all(axis=1).mean()),
        float(np.average(even_C, weights=sizes_C[there])),
        counts_C2,
        members_U,
    )


class Convergence(NamedTuple):
    """Two spaces unit by unit, in one row of figures; the functions above have the curves."""

    matched: float
    semi_matched: float
    chance: float
    sparse_r2: float
    sparse_units: float
    one_unit_r2: float
    mixed: float
    balance: float
    dead: int


def convergent_learning(
    x: Floats, y: Floats, *, clusters: int = 10, targets: int | None = 64, seed: int = 0
) -> Convergence:
    """`unit_matching`, `sparse_prediction` and `spectral_overlap` of `(N, P)` and `(N, Q)` at once.

    `clusters` is lowered to what few units allow. Other arguments and errors as there.
    """
    match = unit_matching(x, y)
    sparse = sparse_prediction(x, y, targets=targets, seed=seed)
    live = np.asarray(x).shape[1] + np.asarray(y).shape[1] - match.dead
    if live > 2:
        groups = spectral_overlap(x, y, clusters=min(clusters, live - 1), seed=seed)
        mixed, balance = groups.mixed, groups.balance
    else:
        mixed = balance = 1.0  # one unit each: together they are the one cluster there is
    return Convergence(
        match.matched,
        match.semi_matched,
        match.chance,
        sparse.r2,
        sparse.units,
        sparse.one_unit_r2,
        mixed,
        balance,
        match.dead,
    )


def _units(x: Floats, y: Floats, least: int = 2) -> tuple[Doubles, Doubles, Integers, Integers, int]:
    """Both tables at mean 0 and variance 1, without dead units; the numbers of those left; how many were dead."""
    x_NP, y_NQ = two_spaces(x, y, least=least, why="a correlation")
    z_NP, at_P = _standard(x_NP, "vectors")
    z_NQ, at_Q = _standard(y_NQ, "other")
    return z_NP, z_NQ, at_P, at_Q, x_NP.shape[1] + y_NQ.shape[1] - len(at_P) - len(at_Q)


def _standard(x_NP: Doubles, name: str) -> tuple[Doubles, Integers]:
    rest_NP = centred(x_NP, name)
    scale_P = np.sqrt((rest_NP**2).mean(axis=0))
    live = np.flatnonzero(scale_P > DEAD * np.abs(x_NP).max(axis=0))
    if not len(live):
        raise MetricError("no unit moves", where=name)
    return rest_NP[:, live] / scale_P[live], live.astype(np.int64)


def _between(z_NP: Doubles, z_NQ: Doubles) -> Doubles:
    r_PQ: Doubles = (z_NP.T @ z_NQ / len(z_NP)).clip(-1.0, 1.0)
    return r_PQ


def _greedy(score_PQ: Doubles) -> float:
    order = np.argsort(-score_PQ, axis=None, kind="stable")
    free_P, free_Q = np.ones(score_PQ.shape[0], bool), np.ones(score_PQ.shape[1], bool)
    taken: list[float] = []
    for p, q in zip(*np.unravel_index(order, score_PQ.shape), strict=True):
        if free_P[p] and free_Q[q]:
            free_P[p] = free_Q[q] = False
            taken.append(float(score_PQ[p, q]))
            if len(taken) == min(score_PQ.shape):
                break
    return float(np.mean(taken))


def _one_unit(cross_Q: Doubles, gram_QQ: Doubles, test_NQ: Doubles, target_N: Doubles) -> float:
    """Held-out squared error of a regression on the one unit that fits best."""
    own_Q = np.diag(gram_QQ)
    gain_Q = np.divide(cross_Q**2, own_Q, out=np.zeros_like(cross_Q), where=own_Q > 0)
    best = int(gain_Q.argmax())
    weight = cross_Q[best] / own_Q[best] if own_Q[best] > 0 else 0.0
    return float(((weight * test_NQ[:, best] - target_N) ** 2).mean())
