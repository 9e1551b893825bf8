"""Semantic duplicates: every dropped row has a kept one that close, and nothing else is dropped."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayemb.curate import Rows, SemanticDuplicates
from rayemb.curate.clusters import across_borders, assign, centroids_of, duplicate_of, unit
from rayemb.data import EmbedConfig, embed_corpus
from tests.curate.digits import SEEN, corpus_of, digit_rows, judged, own_vectors, png, trained_model


def naive(vectors: np.ndarray, to_centroid: np.ndarray, epsilon: float, sign: int) -> list[int]:
    """The greedy rule, one pair at a time."""
    stands, kept = [-1] * len(vectors), []
    for row in sorted(range(len(vectors)), key=lambda r: (sign * to_centroid[r], r)):
        close = [k for k in kept if float(vectors[row] @ vectors[k]) > 1 - epsilon]
        if close:
            stands[row] = close[0]
        else:
            kept.append(row)
    return stands


@given(st.integers(0, 40), st.sampled_from([0.05, 0.3, 1.0]), st.sampled_from(["farthest", "closest"]), st.data())
def test_a_row_is_dropped_for_a_kept_one_alone(rows: int, epsilon: float, keep: str, data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 10_000)))
    vectors = unit(rng.normal(size=(rows, 3)).astype(np.float32))[rng.integers(0, max(1, rows), rows)]
    to_centroid = rng.integers(0, 4, rows).astype(np.float32)
    found = duplicate_of(vectors, to_centroid, epsilon=epsilon, keep=keep)  # type: ignore[arg-type]
    assert found.tolist() == naive(vectors, to_centroid, epsilon, 1 if keep == "farthest" else -1)


def test_a_chain_keeps_both_ends() -> None:
    # Neighbours 20 degrees apart: a-b and b-c repeat each other at epsilon 0.1 (26 degrees), a-c do not.
    angles = np.deg2rad([0, 20, 40])
    chain = np.stack([np.cos(angles), np.sin(angles)], 1).astype(np.float32)
    assert duplicate_of(chain, np.array([0.1, 0.2, 0.3], np.float32), epsilon=0.1).tolist() == [-1, 0, -1]


def test_rows_beyond_one_tile_are_compared_with_those_before(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = unit(np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32))
    cosine = np.linspace(0, 1, 60).astype(np.float32)
    whole = duplicate_of(vectors, cosine, epsilon=0.2)
    monkeypatch.setattr("rayemb.curate.clusters.TILE", 7)
    assert duplicate_of(vectors, cosine, epsilon=0.2).tolist() == whole.tolist() == naive(vectors, cosine, 0.2, 1)


def test_centroids_are_seeded_and_no_more_than_there_are_rows() -> None:
    rows = np.random.default_rng(0).normal(size=(200, 6)).astype(np.float32)
    first, again = centroids_of(rows, 5, seed=3), centroids_of(rows, 5, seed=3)
    assert np.array_equal(first, again)
    np.testing.assert_allclose(np.linalg.norm(first, axis=1), 1, atol=1e-5)
    assert len(centroids_of(np.ones((9, 4), np.float32), 5, seed=0)) == 1
    nearest, cosine = assign(rows, first)
    brute = unit(rows) @ first.T
    assert np.array_equal(nearest, brute.argmax(1))
    np.testing.assert_allclose(cosine, brute.max(1), atol=1e-6)


def test_pairs_across_borders_are_counted() -> None:
    rows = unit(np.random.default_rng(0).normal(size=(80, 3)).astype(np.float32))
    clusters = np.arange(80) % 2
    pairs = [(a, b) for b in range(80) for a in range(b) if rows[a] @ rows[b] > 0.95]
    assert across_borders(rows, clusters, epsilon=0.05) == (
        len(pairs),
        sum(int(clusters[a] != clusters[b]) for a, b in pairs),
    )


@pytest.mark.usefixtures("ray_cluster")
def test_repeated_pictures_are_found_by_a_model_and_by_a_table(tmp_path: Path) -> None:
    # 200 digits, then the first 40 again, some of them a shade lighter.
    rows = digit_rows(240)
    for n in range(40):
        rows[200 + n]["image"] = png(SEEN + n)
    corpus = corpus_of(tmp_path / "corpus", rows)
    trained_model().save(str(tmp_path / "model"))
    config = EmbedConfig(workers=1, cpus_per_worker=1, batch_size=100)
    embed_corpus(corpus.uri, str(tmp_path / "model"), str(tmp_path / "table"), config)
    settings = {"epsilon": 1e-4, "rows_per_cluster": 60}
    by_table = SemanticDuplicates(embeddings=str(tmp_path / "table"), **settings)
    by_model = SemanticDuplicates(model=str(tmp_path / "model"), workers=1, **settings)
    of_table, of_model = Rows.of(corpus, seed=1), Rows.of(corpus, seed=1)
    found = judged(by_table, of_table)
    # Vectors of other batches differ by float32's rounding, so equal cosines to a centroid may change places.
    pairs = {frozenset((row, v["partner"])) for row, v in found.items()}
    assert pairs == {frozenset((row, v["partner"])) for row, v in judged(by_model, of_model).items()}
    assert {frozenset((n, 200 + n)) for n in range(40)} <= pairs

    # What is missed and what is wrong, by brute force over all rows.
    vectors = own_vectors(200, [])[0]
    vectors = np.concatenate([vectors, vectors[:40]])
    cosines = vectors @ vectors.T
    assert all(verdict["score"] > 1 - 2e-4 for verdict in found.values())
    assert all(cosines[row, verdict["partner"]] > 1 - 2e-4 for row, verdict in found.items())
    kept = sorted(set(range(240)) - set(found))
    left = np.triu(cosines[np.ix_(kept, kept)] > 1 - 0.5e-4, 1).sum()
    facts = of_table.facts
    assert facts["clusters"] == 4
    assert facts["pairs_sampled"] >= 40
    assert left <= facts["pairs_across_borders"]
    assert {verdict["reason"] for verdict in found.values()} == {"semantic_duplicate"}


def test_one_source_of_vectors_is_asked_for() -> None:
    with pytest.raises(ValueError, match="give model or embeddings"):
        SemanticDuplicates()
    with pytest.raises(ValueError, match="give model or embeddings"):
        SemanticDuplicates(model="a", embeddings="b")
