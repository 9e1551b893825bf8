"""Classes of vectors as Gaussians that mislabelled and scarce rows distort little. Knows no Ray."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class ClassGaussian:
    """Mean `(D,)` and covariance `(D, D)` of one class, from `count` rows."""

    mean: Doubles
    covariance: Doubles
    count: int


def outlier_factors(vectors_ND: Floats, neighbours: int) -> Doubles:
    """The Local Outlier Factor `(N,)` of each row of one class: about 1 inside it, larger for rows that stand apart."""
    from sklearn.neighbors import LocalOutlierFactor  # half a second, here and below

    model = LocalOutlierFactor(n_neighbors=min(neighbours, len(vectors_ND) - 1))
    model.fit(np.asarray(vectors_ND, np.float64))
    factors: Doubles = -model.negative_outlier_factor_
    return factors


def outliers(factors_N: Doubles, *, limit: float, max_share: float) -> NDArray[np.bool_]:
    """Rows `(N,)` whose factor is above `limit`, of a class the worst `max_share` at most."""
    worst = np.argsort(-factors_N, kind="stable")
    flagged = np.zeros(len(factors_N), bool)
    flagged[worst[: int(max_share * len(factors_N))]] = True
    return flagged & (factors_N > limit)


def class_gaussian(vectors_ND: Floats) -> ClassGaussian:
    """The Gaussian of one class's rows, its covariance shrunk (Ledoit and Wolf, 2004): it is full rank from 2 rows."""
    rows = np.asarray(vectors_ND, np.float64)
    if len(rows) < 2:
        return ClassGaussian(rows.mean(0), np.zeros((rows.shape[1],) * 2), len(rows))
    from sklearn.covariance import ledoit_wolf

    return ClassGaussian(rows.mean(0), ledoit_wolf(rows)[0], len(rows))


def calibrated(
    classes: list[ClassGaussian], *, head_share: float, nearest: int, gamma: float, alpha: float
) -> list[ClassGaussian]:
    """The classes, the statistics of scarce ones mixed with those of their nearest well-filled ones.

    A class is *head* if it has at least `head_share` of the largest one's rows; heads stay as they are. For a tail
    class k and its `nearest` head classes c by distance of the means, weights `w_c` in proportion to
    `n_c / (1 + |mu_c - mu_k|)`:
    `mu = gamma * sum w_c mu_c + (1 - gamma) mu_k`; `S = gamma * sum w_c S_c + (1 - gamma) S_k + alpha I`.
    The card's `alpha` adds a matrix of ones, which lets all coordinates rise and fall together; here it is the
    identity, which spreads. gamma 0 and alpha 0 leave a class its own.
    """
    largest = max((c.count for c in classes), default=0)
    heads = [c for c in classes if c.count >= head_share * largest]
    found = []
    for own in classes:
        if own.count >= head_share * largest:
            found.append(own)
            continue
        distances = np.array([np.linalg.norm(head.mean - own.mean) for head in heads])
        chosen = np.argsort(distances, kind="stable")[:nearest]
        weights = np.array([heads[c].count for c in chosen]) / (1 + distances[chosen])
        weights /= weights.sum()
        mean = sum(w * heads[c].mean for w, c in zip(weights, chosen, strict=True))
        covariance = sum(w * heads[c].covariance for w, c in zip(weights, chosen, strict=True))
        found.append(
            ClassGaussian(
                gamma * mean + (1 - gamma) * own.mean,
                gamma * covariance + (1 - gamma) * own.covariance + alpha * np.eye(len(own.mean)),
                own.count,
            )
        )
    return found


def sampled(own: ClassGaussian, count: int, rng: np.random.Generator) -> Floats:
    """`count` vectors `(count, D)` drawn from a class's Gaussian."""
    values, vectors = np.linalg.eigh(own.covariance)
    noise = rng.standard_normal((count, len(own.mean)))
    drawn: Floats = (own.mean + (noise * np.sqrt(values.clip(0))) @ vectors.T).astype(np.float32)
    return drawn


def balanced(
    classes: list[ClassGaussian], *, cap: int | None, rng: np.random.Generator
) -> tuple[Floats, NDArray[np.int64]]:
    """Synthetic vectors `(M, D)` and their class numbers `(M,)` that fill every class to `cap` rows.

    Default: to the largest class. Nothing is drawn for a class that has as many.
    """
    largest = max((c.count for c in classes), default=0)
    goal = largest if cap is None else cap
    parts = [sampled(own, max(0, goal - own.count), rng) for own in classes]
    labels = np.repeat(np.arange(len(classes)), [len(part) for part in parts])
    return np.concatenate(parts) if parts else np.zeros((0, 0), np.float32), labels.astype(np.int64)
