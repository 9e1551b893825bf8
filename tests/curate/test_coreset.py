"""Coreset: leverages that sum to the rank, an unbiased weighted sample, and rare directions that uniform draws lose."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rayemb.curate import Coreset, CurationError, Rows
from rayemb.curate.sensitivity import (
    gram,
    importance,
    leverage,
    lewis_inverse,
    lewis_weights,
    probabilities,
    pseudo_inverse,
    weighted_norm,
)
from tests.curate.digits import corpus_of, digit_rows, judged, raw_vectors, table_of

ROWS = 400


def over(shards: list[np.ndarray]) -> Callable[[Callable[[np.ndarray], np.ndarray]], np.ndarray]:
    return lambda part: sum(part(shard) for shard in shards)  # type: ignore[return-value]


def test_leverages_are_the_hat_matrix_s_diagonal_and_sum_to_the_rank() -> None:
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(200, 12)) @ rng.normal(size=(12, 20))).astype(np.float64)  # rank 12 in 20 dimensions
    shards = np.array_split(rows, 7)
    inverse = pseudo_inverse(sum(gram(shard) for shard in shards))
    found = np.concatenate([leverage(shard, inverse) for shard in shards])
    expected = np.diag(rows @ np.linalg.pinv(rows))
    np.testing.assert_allclose(found, expected, atol=1e-9)
    assert found.sum() == pytest.approx(12, abs=1e-6)
    assert found.min() >= 0
    assert found.max() <= 1


def test_a_row_orthogonal_to_all_others_has_leverage_1_and_always_stays() -> None:
    rows = np.random.default_rng(0).normal(size=(100, 6))
    rows[:, 5] = 0
    rows[37] = [0, 0, 0, 0, 0, 0.001]  # short, but alone in its direction
    inverse = pseudo_inverse(gram(rows))
    assert leverage(rows, inverse)[37] == pytest.approx(1, abs=1e-9)
    chance = probabilities(leverage(rows, inverse), 6.0, 6)
    assert chance[37] == pytest.approx(1, abs=1e-9)
    assert chance.sum() <= 6 + 1e-9


@pytest.mark.parametrize("p", [1.0, 1.5, 3.0])
def test_lewis_weights_are_at_their_fixed_point(p: float) -> None:
    rows = np.random.default_rng(1).normal(size=(150, 8)) * np.random.default_rng(2).exponential(size=(150, 1))
    inverse = lewis_inverse(p, over(np.array_split(rows, 4)), rounds=60)
    weights = lewis_weights(rows, inverse, p)
    # Cohen and Peng's definition: w_i is the leverage of row i of W^(1/2 - 1/p) A.
    scaled = weights[:, None] ** (0.5 - 1 / p) * rows
    np.testing.assert_allclose(weights, np.diag(scaled @ np.linalg.pinv(scaled)), rtol=1e-6)
    assert weights.sum() == pytest.approx(8, abs=1e-6)


def test_lewis_weights_of_p_2_are_leverages() -> None:
    rows = np.random.default_rng(1).normal(size=(50, 5))
    inverse = lewis_inverse(2, over([rows]), rounds=3)
    np.testing.assert_allclose(lewis_weights(rows, inverse, 2), leverage(rows, pseudo_inverse(gram(rows))), atol=1e-12)


@pytest.mark.parametrize(("p", "scheme"), [(1.0, "root_leverage"), (1.0, "lewis"), (2.0, "leverage")])
def test_the_weighted_norm_is_unbiased(p: float, scheme: str) -> None:
    rows = raw_vectors(ROWS).astype(np.float64)
    x = np.random.default_rng(3).normal(size=64)
    inverse = lewis_inverse(p if scheme == "lewis" else 2, over([rows]), rounds=10)
    values = importance(rows, inverse, scheme, p)  # type: ignore[arg-type]
    chance = probabilities(values, values.sum(), 150)
    rng = np.random.default_rng(4)
    drawn = []
    for _ in range(2000):
        kept = rng.random(ROWS) < chance
        drawn.append(weighted_norm(rows[kept], x, p, 1 / chance[kept]))
    error = np.std(drawn) / np.sqrt(2000)
    assert abs(np.mean(drawn) - weighted_norm(rows, x, p)) < 3 * error


@pytest.mark.parametrize(("p", "scheme"), [(1.0, "root_leverage"), (1.0, "lewis"), (2.0, "leverage")])
def test_norms_hold_within_a_fifth_where_a_uniform_sample_fails(p: float, scheme: str) -> None:
    """The card's claim on real vectors: pixels at the border of the digits are lit in very few of them."""
    rows = raw_vectors(1000).astype(np.float64)
    rng = np.random.default_rng(5)
    rare = np.eye(64)[np.flatnonzero(((rows > 0).sum(0) > 0) & ((rows > 0).sum(0) < 20))]
    assert len(rare) >= 3
    queries = np.concatenate([rng.normal(size=(200 - len(rare), 64)), rare])
    worst = {}
    for name in (scheme, "uniform"):
        inverse = lewis_inverse(p if name == "lewis" else 2, over([rows]), rounds=10)
        values = importance(rows, inverse, name, p)  # type: ignore[arg-type]
        chance = probabilities(values, values.sum(), 700)
        kept = np.random.default_rng(6).random(len(rows)) < chance
        ratios = [
            (weighted_norm(rows[kept], x, p, 1 / chance[kept]) / weighted_norm(rows, x, p)) ** (1 / p) for x in queries
        ]
        worst[name] = np.abs(np.array(ratios) - 1).max()
    assert worst[scheme] < 0.2
    assert worst["uniform"] > 0.2


@pytest.mark.usefixtures("ray_cluster")
def test_the_step_draws_by_leverage_and_writes_the_weights(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "corpus", digit_rows(ROWS))
    vectors = raw_vectors(ROWS)
    step = Coreset(embeddings=table_of(tmp_path / "table", corpus, vectors), budget=200)
    rows = Rows.of(corpus, seed=3)
    found = judged(step, rows)
    expected = np.diag(vectors.astype(np.float64) @ np.linalg.pinv(vectors.astype(np.float64)))
    rank = np.linalg.matrix_rank(vectors)
    assert rows.facts["total_importance"] == pytest.approx(rank, abs=1e-4)
    chance = np.minimum(1, 200 * expected / rank)
    np.testing.assert_allclose([found[n]["score"] for n in range(ROWS)], chance, rtol=1e-3)
    kept = [n for n in range(ROWS) if not found[n]["drop"]]
    assert 150 < len(kept) <= 230
    assert all(found[n]["new_score"] == pytest.approx(1 / chance[n], rel=1e-3) for n in kept)
    assert all(found[n]["new_score"] is None for n in set(range(ROWS)) - set(kept))
    assert all(n in kept for n in np.flatnonzero(chance >= 1))


@pytest.mark.usefixtures("ray_cluster")
def test_a_table_of_another_corpus_is_refused(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "corpus", digit_rows(60))
    other = corpus_of(tmp_path / "other", digit_rows(60, id=[f"other-{n}" for n in range(60)]))
    table = table_of(tmp_path / "table", other, raw_vectors(60))
    with pytest.raises(Exception, match="not the corpus's, in order"):
        judged(Coreset(embeddings=table, budget=5), Rows.of(corpus))
    with pytest.raises(CurationError, match="vectors of each image"):
        judged(Coreset(embeddings=table, budget=5, side="text"), Rows.of(corpus))
