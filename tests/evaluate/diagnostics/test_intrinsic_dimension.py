"""Dimensions that are known by construction, against loops; and that a trained space has fewer than its input."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from rayemb.evaluate.diagnostics import intrinsic_dimension
from rayemb.evaluate.metrics import MetricError

Array = NDArray[np.float64]


def by_loops(x: Array, k: int, discard: float) -> tuple[float, float]:
    radii = []
    for i in range(len(x)):
        radii.append(sorted(math.dist(x[i], x[j]) for j in range(len(x)) if j != i)[:k])
    inverse = [sum(math.log(r[-1] / r[j]) for j in range(k - 1)) / (k - 1) for r in radii]
    ratios = sorted(r[1] / r[0] for r in radii)
    points = [(math.log(mu), -math.log(1 - (i + 1) / len(x))) for i, mu in enumerate(ratios) if i + 1 < len(x)]
    points = points[: int(len(x) * (1 - discard))]
    return len(x) / sum(inverse), sum(a * b for a, b in points) / sum(a * a for a, _ in points)


@pytest.mark.parametrize(("rows", "k", "discard"), [(60, 20, 0.1), (30, 2, 0.0), (21, 20, 0.5)])
def test_the_estimates_are_those_of_naive_loops(rows: int, k: int, discard: float) -> None:
    x = np.random.default_rng(rows).normal(size=(rows, 4))
    found = intrinsic_dimension(x, k=k, discard=discard, block=7)
    assert found[:2] == pytest.approx(by_loops(x, k, discard), rel=1e-9)
    assert found.duplicates == 0


@pytest.mark.parametrize("seed", range(3))
def test_five_dimensions_are_found_in_sixty_four(seed: int) -> None:
    rng = np.random.default_rng(seed)
    inside = np.linalg.qr(rng.normal(size=(64, 5)))[0]
    found = intrinsic_dimension(rng.normal(size=(2000, 5)) @ inside.T)
    assert found.mle == pytest.approx(5, abs=0.5)
    assert found.two_nn == pytest.approx(5, abs=0.5)


def test_a_square_has_two() -> None:
    found = intrinsic_dimension(np.random.default_rng(0).uniform(size=(5000, 2)))
    assert found.mle == pytest.approx(2, abs=0.2)
    assert found.two_nn == pytest.approx(2, abs=0.2)


def test_it_does_not_see_rotation_shift_scale_order_or_copies() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(200, 6))
    whole = intrinsic_dimension(x)
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    for other in (x @ rotation, x + 7, 1e-3 * x, x[rng.permutation(200)], np.pad(x, ((0, 0), (0, 3)))):
        assert intrinsic_dimension(other) == pytest.approx(whole, rel=1e-8)
    assert intrinsic_dimension(np.concatenate([x, x[:50]])) == pytest.approx((*whole[:2], 50), rel=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_a_classifier_lowers_it(digits, seed: int) -> None:
    # Konz & Mazurowski: the representation's is at most the data's. A contrastive loss, which spreads its vectors, does
    # not lower it on digits (6.1-6.9 of 6.1-6.4); classification, of which they speak, does (4.4-4.6).
    pixels, labels = torch.tensor(digits.pixels / 16, dtype=torch.float32), torch.tensor(digits.labels)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        body = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, 32), torch.nn.ReLU())
        head = torch.nn.Linear(32, 10)
        order = torch.randperm(len(pixels))
        train, test = order[:1000], order[1000:]
        optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=3e-3)
        for _ in range(400):
            rows = train[torch.randint(1000, (128,))]
            loss = F.cross_entropy(head(body(pixels[rows])), labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        after = intrinsic_dimension(body(pixels[test]).double().numpy())
    before = intrinsic_dimension(digits.pixels[test])
    assert after.mle < before.mle - 1
    assert after.two_nn < before.two_nn - 1


def test_what_has_no_dimension_is_refused() -> None:
    with pytest.raises(MetricError, match="20 neighbours need 21 distinct vectors, got 1"):
        intrinsic_dimension(np.ones((50, 3)))
    with pytest.raises(MetricError, match="all neighbours are equally far"):
        intrinsic_dimension(np.eye(30), k=5)
    with pytest.raises(MetricError, match="1 of 30 vectors hold NaN"):
        intrinsic_dimension(np.where(np.eye(30) * np.arange(30) == 3, np.nan, 1.0))
    with pytest.raises(MetricError, match="k: a ratio needs two neighbours"):
        intrinsic_dimension(np.eye(30), k=1)
    with pytest.raises(MetricError, match="discard: expected a share"):
        intrinsic_dimension(np.eye(30), discard=1)
