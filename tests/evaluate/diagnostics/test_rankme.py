"""RankMe against the card's figures and closed forms; from shards as of the whole."""

import numpy as np
import pytest

from rayemb.evaluate.diagnostics import Spread, rankme, rankme_of, spread
from rayemb.evaluate.metrics import MetricError


def test_rankme_has_the_values_of_the_card() -> None:
    assert rankme(np.eye(8)) == pytest.approx(8.000007, abs=1e-6)
    assert rankme(np.eye(8), eps=0) == pytest.approx(8, abs=1e-12)
    assert rankme(np.ones((4, 4))) == pytest.approx(1.000005, abs=1e-6)
    assert rankme(np.ones((4, 4)), eps=0) == pytest.approx(1, abs=1e-6)
    assert rankme(np.diag([3.0, 1.0])) == pytest.approx(1.754765, abs=1e-6)
    # exp of the entropy of (3/4, 1/4), by hand.
    assert rankme(np.diag([3.0, 1.0]), eps=0) == pytest.approx(4 / 3**0.75, abs=1e-12)


def test_rankme_does_not_see_rotation_order_scale_copies_or_empty_columns() -> None:
    rng = np.random.default_rng(0)
    z = rng.normal(size=(40, 6)) * np.arange(1, 7)
    rotation = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    for other in (z @ rotation, z[rng.permutation(40)], 17 * z, np.concatenate([z, z])):
        assert rankme(other) == pytest.approx(rankme(z), rel=1e-9)
    padded = np.pad(z, ((0, 0), (0, 3)))
    assert rankme(padded) == pytest.approx(rankme(z), rel=1e-5)
    assert rankme(padded, eps=0) == pytest.approx(rankme(z, eps=0), rel=1e-9)


@pytest.mark.parametrize(("rows", "dim"), [(200, 12), (5, 12), (12, 12)])
def test_rankme_from_shards_is_that_of_the_whole(rows: int, dim: int) -> None:
    z = np.random.default_rng(1).normal(size=(rows, dim)) * np.linspace(1, 1e-2, dim)
    shards = [spread(part) for part in np.split(z, [1, 1, rows // 2])]  # one of them is empty
    whole = Spread(*map(sum, zip(*shards, strict=True)))
    assert whole.rows == rows
    np.testing.assert_allclose(whole.total, z.sum(0))
    assert rankme_of(whole.gram, whole.rows) == pytest.approx(rankme(z), rel=1e-6)


def test_what_has_no_rank_is_refused() -> None:
    with pytest.raises(MetricError, match="NaN or infinity"):
        rankme(np.full((2, 2), np.nan))
    with pytest.raises(MetricError, match="all vectors are zero"):
        rankme(np.zeros((2, 2)))
    with pytest.raises(MetricError, match="there are no vectors"):
        rankme(np.zeros((0, 2)))
