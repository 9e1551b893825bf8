"""How much of a graph is in the vectors of its nodes? k-hop reconstruction (S184, RESTORE, Yip et al., 2023).

Each node ranks all others by distance; those within k hops should come first. For node embeddings, for taxonomies and
product graphs, and for the neighbour graph of a space before it was compressed.

Suffixes: N nodes, D dimensions, L edges, S nodes that are looked at, B of one block.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.diagnostics.spaces import table
from rayemb.evaluate.metrics.arrays import Floats
from rayemb.evaluate.metrics.errors import MetricError

Doubles = NDArray[np.float64]
Integers = NDArray[np.int64]
TIE = 1e-10
"""Distances closer than this share of the largest squared length are a tie: rounding, which a rotation may change."""
Metric = Literal["euclidean", "cosine", "dot"]


class Hop(NamedTuple):
    """Reconstruction at one number of hops."""

    map: float
    """Mean average precision over the nodes that have anyone there, in (0, 1]."""
    chance: float
    """What a random order has: close to the share of nodes that are relevant, a little above."""
    distance: float
    """Mean distance to those nodes as a share of the mean distance to all others: below 1 if they are nearer."""
    nodes: int
    """Nodes that the means are over."""
    alone: int
    """Nodes without anyone there, left out."""
    low_degree: float
    """`map` of the third of the nodes with the fewest edges, which hubs would drown. NaN where degrees are all one."""
    high_degree: float
    """`map` of the third with the most."""
    per_node: Doubles
    """`(S,)` average precision of each node looked at, NaN for those left out."""


class GraphReconstruction(NamedTuple):
    """A graph from its vectors; the main figure is one hop's, the graph itself."""

    map: float
    gain: float
    """(map - chance) / (1 - chance) at the first number of hops: 0 is a random order, 1 the graph."""
    hops: dict[int, Hop]
    rule: Literal["at most", "exactly"]
    """What "k hops" means here."""
    seen: Integers
    """`(S,)` the nodes that were looked at."""


def graph_reconstruction(
    vectors: Floats,
    edges: NDArray[np.int64],
    *,
    hops: Sequence[int] = (1, 2, 3),
    exact: bool = False,
    metric: Metric = "euclidean",
    sample: int | None = None,
    seed: int = 0,
    block: int = 256,
) -> GraphReconstruction:
    """Mean average precision with which distances find the nodes k hops away, for each k of `hops`.

    The graph is undirected; edges given twice count once, loops are none. The node itself is no candidate. **Ties**:
    nodes at one distance are one step of the precision-recall curve, as in scikit-learn's `average_precision_score`,
    so that a space where all nodes are one point has the share of relevant nodes and not what a sort makes of it.

    Args:
        vectors: `(N, D)` floats, finite.
        edges: `(L, 2)` int64, rows of `vectors`.
        hops: the first is the main figure.
        exact: relevant are nodes exactly k hops away; else at most k.
        metric: "euclidean"; "cosine"; or "dot" for factorisations whose inner products are the graph. `Hop.distance`
            is then 1 - cosine, or NaN for "dot", which is no distance.
        sample: look at so many nodes only, drawn with `seed`; they are ranked against all. None: at all.
        block: nodes at a time.

    Time O(S N (D + log N)) and a breadth-first search a node, memory O(block · N + L). Raises MetricError for
    non-finite rows, an edge to a node that is not there (the edge is named), and a graph without edges.
    """
    x_ND = _prepared(vectors, metric)
    edges_L2 = _edges(edges, len(x_ND))
    if not len(hops) or min(hops) < 1 or len(set(hops)) < len(hops):
        raise MetricError(f"different numbers from 1, got {list(hops)}", where="hops")
    if block < 1 or (sample is not None and sample < 1):
        raise MetricError(f"at least 1, got {block} and {sample}", where="block, sample")
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import dijkstra

    n = len(x_ND)
    both = np.concatenate([edges_L2, edges_L2[:, ::-1]])
    graph = csr_array((np.ones(len(both)), (both[:, 0], both[:, 1])), shape=(n, n))
    graph.data[:] = 1.0  # twice given is summed
    degree_N = np.diff(graph.indptr)
    seen_S = np.arange(n)
    if sample is not None and sample < n:
        seen_S = np.sort(np.random.default_rng(seed).permutation(n)[:sample])
    precision_SH, chance_SH, near_SH = (np.full((len(seen_S), len(hops)), np.nan) for _ in range(3))
    far_S = np.empty(len(seen_S))
    for start in range(0, len(seen_S), block):
        part, nodes_B = slice(start, start + block), seen_S[start : start + block]
        hops_BN = dijkstra(graph, indices=nodes_B, unweighted=True, limit=max(hops))
        order_BN, length_BN, tie = _distances(x_ND, nodes_B, metric)
        far_S[part] = length_BN.sum(axis=1) / (n - 1)
        for at, k in enumerate(hops):
            relevant_BN = (hops_BN == k) if exact else (hops_BN > 0) & (hops_BN <= k)
            count_B = relevant_BN.sum(axis=1)
            has = count_B > 0
            precision_SH[part, at][has] = average_precision(order_BN[has], relevant_BN[has], tie)
            chance_SH[part, at][has] = random_precision(count_B[has], n - 1)
            near_SH[part, at][has] = (length_BN * relevant_BN).sum(axis=1)[has] / count_B[has]
    if np.isnan(precision_SH[:, 0]).all():
        raise MetricError(f"no node that was looked at has another at {hops[0]} hops", where="edges, hops")
    found = {
        k: _hop(precision_SH[:, at], chance_SH[:, at], near_SH[:, at], far_S, degree_N[seen_S], metric)
        for at, k in enumerate(hops)
        if not np.isnan(precision_SH[:, at]).all()
    }
    main = found[hops[0]]
    room = 1 - main.chance
    # In a complete graph every order is the graph.
    gain = (main.map - main.chance) / room if room > 1e-12 else 1.0
    return GraphReconstruction(main.map, gain, found, "exactly" if exact else "at most", seen_S)


def average_precision(distances: Doubles, relevant: NDArray[np.bool_], tie: float = 0.0) -> Doubles:
    """`(B,)` average precision of each row of `(B, N)`: nearest first, equal distances (within `tie`) as one step.

    Rows need a relevant column. A column at infinite distance that is not relevant counts for nothing.
    """
    order_BN = np.argsort(distances, axis=1, kind="stable")
    d_BN = np.take_along_axis(distances, order_BN, axis=1)
    own_BN = np.take_along_axis(relevant, order_BN, axis=1)
    last_BN = np.ones(d_BN.shape, bool)  # of its group of equals
    with np.errstate(invalid="ignore"):
        last_BN[:, :-1] = ~(d_BN[:, 1:] - d_BN[:, :-1] <= tie)
    places = np.arange(d_BN.shape[1])
    end_BN = np.where(last_BN, places, d_BN.shape[1])
    end_BN = np.minimum.accumulate(end_BN[:, ::-1], axis=1)[:, ::-1]
    found_BN = np.take_along_axis(np.cumsum(own_BN, axis=1), end_BN, axis=1)
    total: Doubles = (own_BN * found_BN / (end_BN + 1)).sum(axis=1) / own_BN.sum(axis=1)
    return total


def random_precision(relevant: Integers, candidates: int) -> Doubles:
    """The exact expected average precision of a random order of `candidates`, for each number of relevant ones.

    (1/m) (H_m + (r - 1) (m - H_m) / (m - 1)) with r relevant of m and H the harmonic number: at place i a relevant one
    sees on average 1 + (i - 1) (r - 1) / (m - 1) of its kind so far. For large m close to r / m.
    """
    m, r = candidates, np.asarray(relevant, np.float64)
    harmonic = float((1 / np.arange(1, m + 1)).sum())
    share: Doubles = (harmonic + (r - 1) * ((m - harmonic) / (m - 1) if m > 1 else 0.0)) / m
    return share


def _hop(ap_S: Doubles, chance_S: Doubles, near_S: Doubles, far_S: Doubles, degree_S: Integers, metric: str) -> Hop:
    has = ~np.isnan(ap_S)
    ap, degree = ap_S[has], degree_S[has]
    few, many = np.quantile(degree, [1 / 3, 2 / 3])
    split = degree.min() < degree.max()
    ratio = float("nan")
    if metric != "dot" and far_S[has].mean() > 0:
        ratio = float(near_S[has].mean() / far_S[has].mean())
    return Hop(
        float(ap.mean()),
        float(chance_S[has].mean()),
        ratio,
        int(has.sum()),
        int((~has).sum()),
        float(ap[degree <= few].mean()) if split else float("nan"),
        float(ap[degree >= max(many, degree.min() + 1)].mean()) if split else float("nan"),
        ap_S,
    )


def _prepared(vectors: Floats, metric: str) -> Doubles:
    x_ND = table(vectors, "vectors", least=2, why="a graph")
    if metric == "euclidean":
        x_ND -= x_ND.mean(axis=0)  # so that a shift costs no digits
        return x_ND
    if metric == "dot":
        return x_ND
    if metric != "cosine":
        raise MetricError(f"euclidean, cosine or dot, got {metric!r}", where="metric")
    length_N = np.linalg.norm(x_ND, axis=1)
    zero = np.flatnonzero(length_N == 0)
    if len(zero):
        raise MetricError(f"row {zero[0]:,} is zero, so it has no cosine ({len(zero):,} are)", where="vectors")
    unit_ND: Doubles = x_ND / length_N[:, None]
    return unit_ND


def _distances(x_ND: Doubles, nodes_B: Integers, metric: str) -> tuple[Doubles, Doubles, float]:
    """What to rank by `(B, N)`, the node itself last; the distance `(B, N)`, 0 to itself; a tie in the first."""
    rows = np.arange(len(nodes_B))
    products_BN, square_N = x_ND[nodes_B] @ x_ND.T, (x_ND**2).sum(axis=1)
    if metric == "euclidean":
        rank_BN = (square_N[nodes_B, None] + square_N - 2 * products_BN).clip(min=0.0)
        length_BN = np.sqrt(rank_BN)
    else:
        rank_BN = -products_BN
        length_BN = 1 - products_BN if metric == "cosine" else np.zeros_like(products_BN)
    length_BN[rows, nodes_B] = 0.0
    rank_BN[rows, nodes_B] = np.inf
    return rank_BN, length_BN, TIE * float(square_N.max())


def _edges(edges: NDArray[np.int64], n: int) -> Integers:
    edges = np.asarray(edges)
    if edges.ndim != 2 or edges.shape[1] != 2 or (edges.size and not np.issubdtype(edges.dtype, np.integer)):
        raise MetricError(f"expected integers (L, 2), got {edges.dtype} {edges.shape}", where="edges")
    wrong = np.argwhere((edges < 0) | (edges >= n))
    if len(wrong):
        at, end = wrong[0]
        raise MetricError(
            f"edge {at} {tuple(edges[at].tolist())} goes to node {edges[at, end]}, there are {n:,}", where="edges"
        )
    kept: Integers = edges[edges[:, 0] != edges[:, 1]].astype(np.int64)
    if not len(kept):
        raise MetricError("there are no edges between different nodes", where="edges")
    return kept
