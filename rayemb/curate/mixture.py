"""Clean and noisy pairs by a mixture of two Gaussians over their losses, and what to do about them. Knows no Ray."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Doubles = NDArray[np.float64]


@dataclass(frozen=True)
class Split:
    """Two Gaussians over a loss; the clean one has the lower mean."""

    means: tuple[float, float]  # clean, noisy
    deviations: tuple[float, float]
    shares: tuple[float, float]

    @property
    def separation(self) -> float:
        """Ashman's D: the distance of the means over the deviations' root mean square; above 2: two modes."""
        spread = ((self.deviations[0] ** 2 + self.deviations[1] ** 2) / 2) ** 0.5
        return abs(self.means[1] - self.means[0]) / spread if spread > 0 else float("inf")

    def clean_probability(self, losses_N: Floats) -> Doubles:
        """The posterior `(N,)` of the clean Gaussian, never rising with the loss.

        Outside the two means it is the one at the mean: the tails of the wider Gaussian lie above the other's, so
        that the plain posterior calls pairs of the very lowest loss noisy.
        """
        values = np.clip(np.asarray(losses_N, np.float64), *self.means)
        logs = [
            np.log(share) - np.log(deviation) - 0.5 * ((values - mean) / deviation) ** 2
            for mean, deviation, share in zip(self.means, self.deviations, self.shares, strict=True)
        ]
        probability: Doubles = 1 / (1 + np.exp(np.clip(logs[1] - logs[0], -700, 700)))
        return probability


def fit_split(losses_N: Floats, *, seed: int) -> Split | None:
    """Two Gaussians fitted to losses (min-max normalised for the fit, by EM from k-means); None if all are equal."""
    values = np.asarray(losses_N, np.float64)
    low, span = float(values.min()), float(np.ptp(values))
    if span == 0:
        return None
    from sklearn.mixture import GaussianMixture  # half a second

    # The floor under the variances keeps a Gaussian from closing in on one value.
    mixture = GaussianMixture(2, reg_covar=1e-5, max_iter=200, n_init=2, random_state=seed)
    mixture.fit(((values - low) / span)[:, None])
    means = mixture.means_.ravel() * span + low
    deviations, shares = np.sqrt(mixture.covariances_.ravel()) * span, mixture.weights_.ravel()
    clean, noisy = np.argsort(means, kind="stable")
    return Split(
        (float(means[clean]), float(means[noisy])),
        (float(deviations[clean]), float(deviations[noisy])),
        (float(shares[clean]), float(shares[noisy])),
    )


def pair_losses(
    query_ND: Floats,
    text_ND: Floats,
    query_RD: Floats,
    text_RD: Floats,
    same_NR: NDArray[np.bool_],
    *,
    temperature: float,
) -> Floats:
    """InfoNCE of each pair `(N,)` against R reference pairs, the mean of both directions.

    The references take the place of a batch, so that a loss does not depend on whom a pair was dealt together with.
    `same_NR`: references that are no negatives (the pair itself, equal texts).
    """
    own_N = (query_ND * text_ND).sum(1, dtype=np.float64) / temperature
    losses = np.zeros(len(own_N))
    for against_NR in (query_ND @ text_RD.T, text_ND @ query_RD.T):
        logits = np.where(same_NR, -np.inf, against_NR.astype(np.float64) / temperature)
        logits = np.concatenate([own_N[:, None], logits], axis=1)
        top = logits.max(1, keepdims=True)
        losses += (top[:, 0] + np.log(np.exp(logits - top).sum(1)) - own_N) / 2
    return losses.astype(np.float32)


def soft_margin(probability_N: Doubles, margin: float = 0.2) -> Doubles:
    """The hinge's margin `(N,)` for pairs that are clean with this probability: `margin * (10^y - 1) / 9`."""
    margins: Doubles = margin * (10.0 ** np.asarray(probability_N, np.float64) - 1) / 9
    return margins


def pseudo_classes(vectors_ND: Floats, prototypes_CD: Floats, temperature: float) -> Floats:
    """A distribution over prototypes `(N, C)` for each vector: softmax of cosine / temperature, of unit length.

    Unit length, so that an inner product of two is the cosine by which pseudo-captions are chosen.
    """
    logits = (vectors_ND @ prototypes_CD.T).astype(np.float64) / temperature
    shares = np.exp(logits - logits.max(1, keepdims=True))
    directions: Floats = (shares / np.linalg.norm(shares, axis=1, keepdims=True)).astype(np.float32)
    return directions


def nearest_clean(noisy_NC: Floats, clean_MC: Floats, tile: int = 1024) -> tuple[NDArray[np.int64], Floats]:
    """For each noisy row the clean row `(N,)` of the nearest distribution, and their cosine `(N,)`."""
    parts = [noisy_NC[at : at + tile] @ clean_MC.T for at in range(0, len(noisy_NC), tile)]
    places = [part.argmax(1) for part in parts]
    cosines = [part.max(1) for part in parts]
    empty = np.zeros(0)
    return (
        np.concatenate([*places, empty]).astype(np.int64),
        np.concatenate([*cosines, empty]).astype(np.float32).clip(0, 1),
    )
