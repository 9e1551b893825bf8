"""Alignment: the cosine of the model, a threshold or an exact share of the whole corpus, whatever the sharding."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayemb.curate import Alignment, CurationError, Rows
from rayemb.curate.draw import uniform_of
from rayemb.curate.quantile import Cut, cut_at, histogram
from tests.curate.digits import caption, corpus_of, digit_rows, judged, labels_of, own_vectors, trained_model

ROWS = 300
SCORES = st.lists(
    st.one_of(st.floats(width=32, allow_nan=False), st.sampled_from([0.0, -0.0, 1.0, float("inf"), -float("inf")])),
    max_size=40,
)


def cut_of(scores: np.ndarray, rows: np.ndarray, keep: int, shards: int) -> Cut | None:
    parts = list(zip(np.array_split(scores, shards), np.array_split(rows, shards), strict=True))
    return cut_at(len(scores), keep, lambda prefix: sum(histogram(s, r, prefix) for s, r in parts))  # type: ignore[arg-type,return-value]


@given(SCORES, st.integers(0, 45), st.integers(1, 5), st.integers(0, 3))
def test_the_cut_is_the_sorted_list_s(values: list[float], keep: int, shards: int, seed: int) -> None:
    scores = np.array(values, np.float32)
    # Ordinals that differ in more than one of their digits.
    ordinals = np.random.default_rng(seed).permutation(len(values)).astype(np.int64) * ((1 << 33) + 70_001)
    cut = cut_of(scores, ordinals, keep, shards)
    best = sorted(range(len(values)), key=lambda n: (-scores[n], ordinals[n]))[:keep]
    kept = np.zeros(len(values), bool) if cut is None else cut.keeps(scores, ordinals)
    assert sorted(np.flatnonzero(kept).tolist()) == sorted(best)
    if best and len(best) < len(values) and cut is not None:
        assert cut.score == min(scores[n] for n in best)


def test_a_million_equal_scores_still_give_the_exact_share() -> None:
    scores, rows = np.full(1_000_000, 0.25, np.float32), np.arange(1_000_000)
    cut = cut_of(scores, rows, 300_001, 3)
    assert cut is not None
    assert np.array_equal(np.flatnonzero(cut.keeps(scores, rows)), np.arange(300_001))


def test_a_monotone_transform_keeps_the_same_rows_and_all_is_all() -> None:
    scores = np.random.default_rng(0).normal(size=500).astype(np.float32)
    rows = np.arange(500)
    first, second = (cut_of(values, rows, 137, 4) for values in (scores, (3 * scores + 5).astype(np.float32)))
    assert first is not None
    assert second is not None
    assert np.array_equal(first.keeps(scores, rows), second.keeps((3 * scores + 5).astype(np.float32), rows))
    every = cut_of(scores, rows, 500, 4)
    assert every is not None
    assert every.keeps(scores, rows).all()
    assert every.score == -np.inf
    with pytest.raises(ValueError, match="NaN"):
        histogram(np.array([np.nan], np.float32), np.array([0]), ())


def test_draws_are_uniform_and_known_by_row_and_seed_alone() -> None:
    rows = np.arange(200_000)
    drawn = uniform_of(rows, 5)
    assert np.array_equal(drawn[777:], uniform_of(rows[777:], 5))
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = np.histogram(drawn, 20, (0, 1))[0]
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 45  # chi-square, 19 degrees of freedom: p ~ 0.001
    assert abs(np.corrcoef(drawn, uniform_of(rows, 6))[0, 1]) < 0.01
    assert abs(np.corrcoef(drawn[1:], drawn[:-1])[0, 1]) < 0.01


@pytest.mark.usefixtures("ray_cluster")
class TestOnDigits:
    @pytest.fixture(scope="class")
    def place(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        root = tmp_path_factory.mktemp("alignment")
        labels = labels_of(ROWS)
        shown = [int((label + 3) % 10) if n % 5 == 0 else int(label) for n, label in enumerate(labels)]
        texts = [caption(label, n) for n, label in enumerate(shown)]
        corpus_of(root / "corpus", digit_rows(ROWS, text=texts))
        trained_model().save(str(root / "model"))
        return root

    def rows(self, place: Path) -> Rows:
        from rayemb.data import Corpus

        return Rows.of(Corpus.open(str(place / "corpus")), seed=2)

    def cosines(self, place: Path) -> np.ndarray:
        from rayemb.data import Corpus

        texts = Corpus.open(str(place / "corpus")).column("train", "text")
        query, text = own_vectors(ROWS, texts)
        return (query * text).sum(1)

    def test_a_threshold_drops_what_is_below_it(self, place: Path) -> None:
        found = judged(Alignment(model=str(place / "model"), threshold=0.5, workers=1), self.rows(place))
        cosines = self.cosines(place)
        assert len(found) == ROWS
        np.testing.assert_allclose([found[n]["score"] for n in range(ROWS)], cosines, atol=2e-6)
        sure = np.abs(cosines - 0.5) > 1e-5
        assert sure.sum() > 290
        assert all(found[n]["drop"] == (cosines[n] < 0.5) for n in np.flatnonzero(sure))
        wrong = np.arange(0, ROWS, 5)
        assert np.mean([found[n]["drop"] for n in wrong]) > 0.9  # every fifth text was another digit's

    def test_a_share_is_exact_and_does_not_depend_on_batches(self, place: Path) -> None:
        rows = self.rows(place)
        found = judged(Alignment(model=str(place / "model"), keep_fraction=0.8, batch_size=64), rows)
        kept = {n for n, verdict in found.items() if not verdict["drop"]}
        assert len(kept) == 240
        assert rows.facts["kept"] == 240
        cosines = self.cosines(place)
        cut = np.sort(cosines)[-240]
        assert rows.facts["lowest_score_kept"] == pytest.approx(cut, abs=2e-6)
        assert {n for n in kept if cosines[n] < cut - 1e-5} == set()
        assert {v["reason"] for v in found.values() if v["drop"]} == {"misaligned"}

    def test_a_corpus_with_one_side_is_refused(self, place: Path, tmp_path: Path) -> None:
        rows = Rows.of(corpus_of(tmp_path, digit_rows(5), kind="text"))
        with pytest.raises(CurationError, match="compares two sides"):
            Alignment(model=str(place / "model"), threshold=0).judge(rows)


def test_one_of_threshold_and_share() -> None:
    with pytest.raises(ValueError, match="one of them"):
        Alignment(model="m")
    with pytest.raises(ValueError, match="one of them"):
        Alignment(model="m", threshold=0.1, keep_fraction=0.5)
