"""Noisy correspondence: the mixture's split, the soft margin, and 40 % mismatched digits found and repaired."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayemb.curate import NoisyCorrespondence, Rows
from rayemb.curate.mixture import (
    Split,
    fit_split,
    nearest_clean,
    pair_losses,
    pseudo_classes,
    soft_margin,
)
from rayemb.data import Corpus
from tests.curate.digits import caption, corpus_of, digit_rows, judged, labels_of, trained_model

ROWS = 400


def test_the_soft_margin() -> None:
    np.testing.assert_allclose(soft_margin(np.array([0, 0.5, 1])), [0, 0.04805, 0.2], atol=5e-6)


def test_two_separated_clusters_are_told_apart() -> None:
    rng = np.random.default_rng(0)
    losses = np.concatenate([rng.normal(0.5, 0.05, 700), rng.normal(3, 0.3, 300)]).astype(np.float32)
    split = fit_split(losses, seed=0)
    assert split is not None
    clean = split.clean_probability(losses)
    assert clean[:700].min() > 0.99
    assert clean[700:].max() < 0.01
    np.testing.assert_allclose(split.means, (0.5, 3), atol=0.05)
    np.testing.assert_allclose(split.shares, (0.7, 0.3), atol=0.01)
    assert split.separation == pytest.approx(2.5 / np.sqrt((0.05**2 + 0.3**2) / 2), rel=0.1)


def test_the_lowest_losses_stay_clean_where_the_noisy_gaussian_is_wide() -> None:
    split = Split((1.0, 4.0), (0.2, 3.0), (0.6, 0.4))
    probabilities = split.clean_probability(np.linspace(-10, 10, 400).astype(np.float32))
    assert (np.diff(probabilities) <= 1e-12).all()
    # The plain posterior at -2: the narrow Gaussian is 15 deviations away, the wide one 2.
    plain = [s / d * np.exp(-0.5 * ((-2 - m) / d) ** 2) for m, d, s in ((1.0, 0.2, 0.6), (4.0, 3.0, 0.4))]
    assert plain[0] / sum(plain) < 0.01
    assert probabilities[0] > 0.5


def test_equal_losses_have_no_split() -> None:
    assert fit_split(np.full(50, 0.25, np.float32), seed=0) is None


def test_losses_are_infonce_against_the_references() -> None:
    rng = np.random.default_rng(0)
    query, text = rng.normal(size=(2, 6, 4)).astype(np.float32)
    others = rng.normal(size=(2, 5, 4)).astype(np.float32)
    same = rng.random((6, 5)) < 0.3
    found = pair_losses(query, text, others[0], others[1], same, temperature=0.5)
    for n in range(6):
        own = float(query[n] @ text[n]) / 0.5
        total = 0.0
        for vector, against in ((query[n], others[1]), (text[n], others[0])):
            logits = [own, *(float(vector @ against[r]) / 0.5 for r in range(5) if not same[n, r])]
            total += np.log(np.sum(np.exp(logits))) - own
        assert found[n] == pytest.approx(total / 2, rel=1e-5)


def test_a_pseudo_caption_comes_from_the_nearest_distribution() -> None:
    prototypes = np.eye(3, dtype=np.float32)
    clean = pseudo_classes(np.eye(3, dtype=np.float32), prototypes, 0.1)
    noisy = pseudo_classes(np.array([[0.1, 0.9, 0.2], [0.5, 0.5, 0.5]], np.float32), prototypes, 0.1)
    nearest, cosine = nearest_clean(noisy, clean)
    assert nearest[0] == 1
    assert cosine[0] > 0.99
    assert cosine[1] == pytest.approx(1 / np.sqrt(3), abs=1e-3)  # between all three, like none of them
    np.testing.assert_allclose(np.linalg.norm(noisy, axis=1), 1, atol=1e-6)


@pytest.mark.usefixtures("ray_cluster")
class TestOnDigits:
    @pytest.fixture(scope="class")
    def place(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        root = tmp_path_factory.mktemp("noisy")
        corpus_of(root / "corpus", digit_rows(ROWS, text=[caption(label, n) for n, label in enumerate(self.shown())]))
        corpus_of(root / "clean", digit_rows(ROWS))
        trained_model().save(str(root / "model"))
        return root

    def wrong(self) -> np.ndarray:
        return np.random.default_rng(0).random(ROWS) < 0.4

    def shown(self) -> list[int]:
        shift = np.where(self.wrong(), np.random.default_rng(1).integers(1, 10, ROWS), 0)
        return [int(label) for label in (labels_of(ROWS) + shift) % 10]

    def run(self, place: Path, corpus: str = "corpus", **settings: Any) -> tuple[dict[int, dict[str, Any]], Rows]:
        step = NoisyCorrespondence(model=str(place / "model"), workers=1, references=200, prototypes=20, **settings)
        rows = Rows.of(Corpus.open(str(place / corpus)), seed=1)
        return judged(step, rows), rows

    def test_mismatched_pairs_are_found_and_repaired(self, place: Path) -> None:
        found, rows = self.run(place, mode="repair")
        wrong, labels = self.wrong(), labels_of(ROWS)
        noisy = np.array([found[n]["score"] < 0.5 for n in range(ROWS)])
        assert noisy[wrong].mean() >= 0.8  # the card's bar
        assert wrong[noisy].mean() >= 0.8
        assert rows.facts["separation"] > 2
        assert rows.facts["noisy_share"] == pytest.approx(0.4, abs=0.12)
        repaired = [n for n in range(ROWS) if found[n]["new_text"]]
        assert set(repaired) <= set(np.flatnonzero(noisy))
        assert len(repaired) > 0.8 * noisy.sum()
        right = [caption(int(labels[n]), 0).split()[2] in found[n]["new_text"] for n in repaired]
        assert np.mean(right) > 0.8  # before: those of the noisy that were right, below .2
        texts = rows.corpus.column("train", "text")
        for n in repaired:
            assert found[n]["new_text"] == texts[found[n]["partner"]]
            assert found[n]["new_texts"] == [found[n]["new_text"]]
            assert found[n]["what"].endswith(f"was: {texts[n]}")
            assert 0.5 <= found[n]["new_score"] <= 1
            assert not found[found[n]["partner"]]["drop"]

    def test_clean_pairs_are_not_halved(self, place: Path) -> None:
        found, rows = self.run(place, "clean")
        assert not any(verdict["drop"] for verdict in found.values())
        assert rows.facts["separation"] < 2
        assert rows.facts["noisy_share"] == 0

    def test_the_margin_as_a_score(self, place: Path) -> None:
        found, _ = self.run(place, mode="score", score="margin", measure="similarity")
        clean = np.array([found[n]["score"] for n in range(ROWS)])
        np.testing.assert_allclose([found[n]["new_score"] for n in range(ROWS)], soft_margin(clean), atol=1e-6)
        assert not any(verdict["drop"] for verdict in found.values())
        assert (clean[self.wrong()] < 0.5).mean() >= 0.8
