"""Graph reconstruction (S184) against scikit-learn's average precision, all orders of small graphs, and digits."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.sparse.csgraph import floyd_warshall
from scipy.spatial.distance import cdist
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA
from sklearn.manifold import spectral_embedding
from sklearn.metrics import average_precision_score
from sklearn.neighbors import kneighbors_graph

from rayemb.evaluate.diagnostics.graph_reconstruction import Metric, graph_reconstruction, random_precision
from rayemb.evaluate.metrics import MetricError

Array = NDArray[np.float64]
Edges = NDArray[np.int64]


def grid(side: int) -> Edges:
    at = np.arange(side * side).reshape(side, side)
    return np.concatenate([np.c_[at[:, :-1].ravel(), at[:, 1:].ravel()], np.c_[at[:-1].ravel(), at[1:].ravel()]])


def adjacency(edges: Edges, n: int) -> Array:
    a = np.zeros((n, n))
    a[edges[:, 0], edges[:, 1]] = a[edges[:, 1], edges[:, 0]] = 1
    np.fill_diagonal(a, 0)
    return a


def naive(x: Array, edges: Edges, k: int, exact: bool, metric: str) -> list[float]:
    """Each node's average precision: Floyd-Warshall and scikit-learn, node by node."""
    n = len(x)
    hops = floyd_warshall(adjacency(edges, n), unweighted=True)
    scores = x @ x.T if metric == "dot" else -np.round(cdist(x, x, metric), 12)
    found = []
    for v in range(n):
        others = np.arange(n) != v
        relevant = (hops[v] == k if exact else hops[v] <= k)[others]
        if relevant.any():
            found.append(float(average_precision_score(relevant, scores[v][others])))
    return found


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
@pytest.mark.parametrize("exact", [False, True])
def test_it_is_sklearns_average_precision(metric: Metric, exact: bool) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40, 3))
    edges = rng.integers(0, 37, size=(45, 2))  # loops, edges given twice, and three nodes alone
    for block in (1, 7, 100):
        found = graph_reconstruction(x, edges, exact=exact, metric=metric, block=block)
        for k in (1, 2, 3):
            expected = naive(x, edges, k, exact, metric)
            assert found.hops[k].map == pytest.approx(np.mean(expected), abs=1e-9)
            assert found.hops[k].nodes == len(expected) == 40 - found.hops[k].alone
            ap = found.hops[k].per_node
            np.testing.assert_allclose(ap[~np.isnan(ap)], expected, atol=1e-9)
    assert found.map == found.hops[1].map


def test_ties_are_one_step_of_the_curve() -> None:
    rng = np.random.default_rng(1)
    x = rng.integers(0, 3, size=(30, 2)).astype(float)  # nine places for thirty nodes
    edges = rng.integers(0, 30, size=(60, 2))
    expected = naive(x, edges, 1, False, "euclidean")
    assert graph_reconstruction(x, edges).map == pytest.approx(np.mean(expected), abs=1e-9)
    flat = graph_reconstruction(np.ones((30, 2)), edges)
    prevalence = adjacency(edges, 30).sum(axis=1) / 29
    assert flat.map == pytest.approx(prevalence[prevalence > 0].mean(), abs=1e-12)
    assert np.isnan(flat.hops[1].distance)


def test_complete_graph_star_and_the_path_are_whole() -> None:
    every = np.array(list(itertools.combinations(range(6), 2)))
    complete = graph_reconstruction(np.random.default_rng(2).normal(size=(6, 3)), every)
    assert complete.map == 1
    assert complete.gain == 1
    assert complete.rule == "at most"
    assert set(complete.hops) == {1, 2, 3}
    assert set(graph_reconstruction(np.eye(6), every, exact=True).hops) == {1}  # nobody is farther
    # The centre at the origin, the leaves on the axes: the centre is nearest to each.
    star = np.array([[0, leaf] for leaf in range(1, 6)])
    found = graph_reconstruction(np.concatenate([np.zeros((1, 5)), np.eye(5)]), star)
    assert found.map == found.hops[1].low_degree == found.hops[1].high_degree == 1
    assert found.hops[1].distance < 1
    line = np.array([[i, i + 1] for i in range(19)])
    path = graph_reconstruction(np.arange(20.0)[:, None], line)
    assert path.map == path.gain == path.hops[2].map == path.hops[3].map == 1


def test_isometries_and_scale_change_nothing() -> None:
    rng = np.random.default_rng(3)
    x = rng.integers(0, 4, size=(36, 3)).astype(float)  # ties that rounding would break
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    base = graph_reconstruction(x, grid(6))
    for other in (x @ rotation, 1e-6 * x, x @ rotation * 1e4 + 77):
        moved = graph_reconstruction(other, grid(6))
        for k in base.hops:
            np.testing.assert_allclose(moved.hops[k].per_node, base.hops[k].per_node, atol=1e-9)
            assert moved.hops[k].distance == pytest.approx(base.hops[k].distance, rel=1e-6)


@pytest.mark.parametrize(("r", "m"), [(1, 1), (1, 6), (3, 6), (6, 6), (2, 7)])
def test_chance_is_the_mean_over_all_orders(r: int, m: int) -> None:
    values = []
    for places in itertools.combinations(range(1, m + 1), r):
        values.append(np.mean([(i + 1) / place for i, place in enumerate(places)]))
    assert random_precision(np.array([r]), m)[0] == pytest.approx(np.mean(values), abs=1e-12)


def test_random_vectors_are_at_chance_and_spectral_ones_far_above() -> None:
    edges, n = grid(15), 225
    for seed in range(3):
        rng = np.random.default_rng(seed)
        noise = graph_reconstruction(rng.normal(size=(n, 8)), edges)
        spectral = graph_reconstruction(
            spectral_embedding(adjacency(edges, n), n_components=8, random_state=seed), edges
        )
        for k in (1, 2, 3):
            assert noise.hops[k].map == pytest.approx(noise.hops[k].chance, abs=0.02)
            assert noise.hops[k].distance == pytest.approx(1, abs=0.05)
            assert spectral.hops[k].map > 0.5
            assert spectral.hops[k].distance < 0.6
        assert abs(noise.gain) < 0.03
        assert spectral.gain > 0.5


def test_a_sample_is_of_the_same_nodes_for_the_same_seed() -> None:
    x, edges = np.random.default_rng(4).normal(size=(225, 4)), grid(15)
    whole, part = graph_reconstruction(x, edges), graph_reconstruction(x, edges, sample=60, seed=1, block=32)
    assert len(part.seen) == 60
    np.testing.assert_allclose(part.hops[1].per_node, whole.hops[1].per_node[part.seen])
    np.testing.assert_array_equal(part.seen, graph_reconstruction(x, edges, sample=60, seed=1).seen)


def test_the_neighbour_graph_of_digits_survives_eight_bits_but_not_two_components() -> None:
    x = load_digits().data[:800]
    graph = kneighbors_graph(x, 10).tocoo()
    edges = np.stack([graph.row, graph.col], axis=1).astype(np.int64)
    full = graph_reconstruction(x, edges, hops=(1, 2))
    small = PCA(16, random_state=0).fit_transform(x)
    codes = np.round((small - small.min()) / np.ptp(small) * 255)
    eight = graph_reconstruction(codes, edges, hops=(1, 2))
    tiny = graph_reconstruction(PCA(2, random_state=0).fit_transform(x), edges, hops=(1, 2))
    assert full.map > 0.9  # not 1: the graph of neighbours is directed, its edges here are not
    assert full.map > eight.map > full.map - 0.25
    assert tiny.map < 0.3
    assert full.hops[1].map > full.hops[1].chance


def test_bad_graphs_and_settings_are_named() -> None:
    x, edges = np.random.default_rng(5).normal(size=(9, 2)), grid(3)
    with pytest.raises(MetricError, match=r"edges: edge 1 \(3, 99\) goes to node 99, there are 9"):
        graph_reconstruction(x, np.array([[0, 1], [3, 99]]))
    with pytest.raises(MetricError, match=r"edge 0 \(-1, 2\) goes to node -1"):
        graph_reconstruction(x, np.array([[-1, 2]]))
    with pytest.raises(MetricError, match="no edges between different nodes"):
        graph_reconstruction(x, np.array([[2, 2]]))
    with pytest.raises(MetricError, match=r"expected integers \(L, 2\)"):
        graph_reconstruction(x, edges.astype(float))  # type: ignore[arg-type]
    with pytest.raises(MetricError, match="hops"):
        graph_reconstruction(x, edges, hops=(0, 1))
    with pytest.raises(MetricError, match="hops"):
        graph_reconstruction(x, edges, hops=())
    with pytest.raises(MetricError, match="at 8 hops"):
        graph_reconstruction(x, edges, hops=(8,), exact=True)
    with pytest.raises(MetricError, match="metric"):
        graph_reconstruction(x, edges, metric="l1")  # type: ignore[arg-type]
    with pytest.raises(MetricError, match="sample"):
        graph_reconstruction(x, edges, sample=0)
    x[7] = np.nan
    with pytest.raises(MetricError, match="vectors: row 7 holds"):
        graph_reconstruction(x, edges)
    x[7] = 0
    with pytest.raises(MetricError, match="vectors: row 7 is zero"):
        graph_reconstruction(x, edges, metric="cosine")
