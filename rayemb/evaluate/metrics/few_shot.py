"""Few-shot classification: episodes of N classes with K examples each, by the nearest prototype.

Suffixes: E episodes, W ways (classes of an episode), K shots, R queries a class, S = K + R, D dimensions.
"""

from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rayemb.evaluate.metrics.arrays import as_integers, as_vectors
from rayemb.evaluate.metrics.bootstrap import Interval
from rayemb.evaluate.metrics.errors import MetricError
from rayemb.evaluate.metrics.retrieval import TIE


class Episodes(NamedTuple):
    """Which rows play which part. `skipped` are the classes with too few items, which no episode draws."""

    classes: NDArray[np.int64]  # (E, W)
    support: NDArray[np.int64]  # (E, W, K) rows
    queries: NDArray[np.int64]  # (E, W, R) rows
    skipped: tuple[int, ...]


class FewShot(NamedTuple):
    """Mean accuracy ± 1.96 · s / sqrt(E) over episodes, and each episode's own `(E,)` for paired comparisons."""

    interval: Interval
    accuracies: NDArray[np.float64]
    skipped: tuple[int, ...]


def draw_episodes(
    labels: NDArray[np.int64],
    *,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    episodes: int = 600,
    seed: int,
) -> Episodes:
    """Episodes over items of the classes `labels` `(N,)`, drawn without replacement within an episode.

    Episode e depends on `seed` and e alone: two models see the same ones, and many processes may share them out.
    Classes with fewer than shots + queries items are skipped: to pad them would put a query among its own examples.
    Raises MetricError for numbers out of range, and where fewer than `ways` classes are left; it names those that lack.
    """
    y_N = as_integers(labels, None, "labels")
    if ways < 2 or shots < 1 or queries < 1 or episodes < 2 or seed < 0:
        raise MetricError(
            f"no episodes: ways {ways}, shots {shots}, queries {queries}, episodes {episodes}, seed {seed}",
            where="ways, shots, queries, episodes, seed",
            fix="at least 2, 1, 1, 2 and 0",
        )
    order = np.argsort(y_N, kind="stable")
    names, starts, sizes = np.unique(y_N[order], return_index=True, return_counts=True)
    need = shots + queries
    able = np.flatnonzero(sizes >= need)
    skipped = tuple(int(name) for name in names[sizes < need])
    if len(able) < ways:
        lacking = ", ".join(f"{names[i]} ({sizes[i]})" for i in np.flatnonzero(sizes < need)[:8])
        raise MetricError(
            f"{len(able)} of {len(names)} classes have the {need} items of {shots} shots and {queries} queries, "
            f"but {ways} are needed" + (f"; too few have {lacking}" if lacking else ""),
            where="labels",
            fix="ask for fewer ways, shots or queries, or bring more items",
        )
    classes = np.empty((episodes, ways), np.int64)
    rows = np.empty((episodes, ways, need), np.int64)
    for e in range(episodes):
        rng = np.random.default_rng([seed, e])
        drawn = rng.choice(able, ways, replace=False)
        classes[e] = names[drawn]
        for w, at in enumerate(drawn):
            rows[e, w] = order[starts[at] + rng.choice(sizes[at], need, replace=False)]
    return Episodes(classes, rows[:, :, :shots], rows[:, :, shots:], skipped)


def few_shot(
    vectors: NDArray[np.float32],
    labels: NDArray[np.int64],
    *,
    ways: int = 5,
    shots: int = 1,
    queries: int = 15,
    episodes: int = 600,
    metric: Literal["cosine", "euclidean"] = "cosine",
    seed: int,
) -> FewShot:
    """N-way K-shot accuracy of the nearest prototype, the mean of a class's examples (Snell et al., 2017).

    Inductive: each query is judged alone, never with the other queries of its episode; transductive figures are some
    points higher and must not be mixed with these. A query as near (within `TIE`) to another prototype is a miss.

    Args:
        vectors: `(N, D)` floats, finite.
        labels: `(N,)` integers.
        ways, shots, queries, episodes, seed: as for `draw_episodes`; queries are of each class.
        metric: "cosine": normalised vectors and normalised prototypes. "euclidean": both as they are.

    The interval is over episodes of this one model (normal, ddof 1): it says nothing of other training seeds. Raises
    MetricError for wrong shapes, non-finite vectors, and as `draw_episodes` does.
    """
    x_ND = as_vectors(vectors, "vectors")
    y_N = as_integers(labels, len(x_ND), "labels")
    if metric not in ("cosine", "euclidean"):
        raise MetricError(f"there is no metric {metric!r}", where="metric", fix="cosine or euclidean")
    drawn = draw_episodes(y_N, ways=ways, shots=shots, queries=queries, episodes=episodes, seed=seed)
    if metric == "cosine":
        x_ND = _unit(x_ND)
    accuracies = np.array(
        [
            _episode(x_ND[support], x_ND[asked], metric)
            for support, asked in zip(drawn.support, drawn.queries, strict=True)
        ]
    )
    mean, half = accuracies.mean(), 1.96 * accuracies.std(ddof=1) / np.sqrt(episodes)
    return FewShot(Interval(float(mean), float(mean - half), float(mean + half)), accuracies, drawn.skipped)


def _episode(support_WKD: NDArray[np.float64], queries_WRD: NDArray[np.float64], metric: str) -> float:
    ways, each, dim = queries_WRD.shape
    q_QD = queries_WRD.reshape(-1, dim)
    own_Q = np.repeat(np.arange(ways), each)
    prototype_WD = support_WKD.mean(axis=1)
    if metric == "cosine":
        near_QW = q_QD @ _unit(prototype_WD).T
        tie_Q = np.full(len(q_QD), TIE)
    else:
        # Differences, not |q|² - 2qp + |p|², which loses the digits of near vectors far from the origin.
        near_QW = -((q_QD[:, None] - prototype_WD[None]) ** 2).sum(axis=2)
        tie_Q = TIE * np.maximum((q_QD**2).sum(axis=1), (prototype_WD**2).sum(axis=1).max())
    mine_Q = near_QW[np.arange(len(q_QD)), own_Q].copy()
    near_QW[np.arange(len(q_QD)), own_Q] = -np.inf
    return float((mine_Q > near_QW.max(axis=1) + tie_Q).mean())


def _unit(x_ND: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(x_ND / np.maximum(np.linalg.norm(x_ND, axis=-1, keepdims=True), 1e-12))
