"""NT-Xent against loops over views and closed forms; the released one is in test_peers.py."""

import math

import pytest
import torch

from rayemb.losses import Batch
from tests.losses.common import cosines, exact, surprise, vectors


@pytest.mark.parametrize("duplicates", ["positive", "ignore", "negative"])
@pytest.mark.parametrize("more", [0, 2])
def test_it_is_its_definition(duplicates: str, more: int) -> None:
    q, d, n = vectors(4), vectors(4, seed=1), vectors(more, seed=2)
    keys = [0, 0, 1, 2]
    views = torch.cat([q, d, n])
    logits = (cosines(views, views) / 0.2).tolist()
    key = keys + keys + [None] * more  # type: ignore[list-item]
    losses = []
    for i in range(8):
        twin = (i + 4) % 8
        same = [j for j in range(8) if key[j] == key[i] and j not in (i, twin)]
        positives = [twin, *same] if duplicates == "positive" else [twin]
        out = same if duplicates == "ignore" else []
        others = [j for j in range(8 + more) if j != i and j not in positives and j not in out]
        total = math.log(math.fsum(math.exp(logits[i][j]) for j in positives + others))
        losses.append(total - math.fsum(logits[i][j] for j in positives) / len(positives))
    batch = Batch(q, d, negatives=n if more else None, keys=torch.tensor(keys))
    loss = exact({"name": "nt_xent", "temperature": 0.2, "duplicates": duplicates})
    assert loss(batch).item() == pytest.approx(math.fsum(losses) / 8, rel=1e-12)


def test_closed_form_of_orthogonal_pairs() -> None:
    axes = torch.eye(4, dtype=torch.float64)
    value = exact({"name": "nt_xent", "temperature": 0.5})(Batch(axes, axes)).item()
    assert value == pytest.approx(surprise(2.0, [0.0] * 6))


def test_views_may_change_places() -> None:
    q, d = vectors(5), vectors(5, seed=1)
    loss = exact({"name": "nt_xent"})
    torch.testing.assert_close(loss(Batch(q, d)), loss(Batch(d, q)))


def test_one_pair_alone_has_nothing_to_learn() -> None:
    assert exact({"name": "nt_xent"})(Batch(vectors(1), vectors(1, seed=1))).item() == 0
