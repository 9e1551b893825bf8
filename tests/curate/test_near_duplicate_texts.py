"""LSH against all pairs by brute force, and planted edits of real names found again."""

from pathlib import Path

import numpy as np
import pytest

from rayemb.curate import NearDuplicateTexts
from rayemb.curate.minhash import jaccard, shingles
from tests.curate.noise import corpus_of, drawings, dropped, pair, sentence, typo

pytestmark = pytest.mark.usefixtures("ray_cluster")


def brute(texts: list[str], step: NearDuplicateTexts) -> dict[int, int]:
    """The first row of each repeat's group, from all pairs."""
    sets = [shingles(text, step.unit, step.size) for text in texts]
    first = list(range(len(texts)))
    changed = True
    while changed:
        changed = False
        for i in range(len(texts)):
            for j in range(i):
                if first[i] != first[j] and len(sets[i]) and jaccard(sets[i], sets[j]) >= step.threshold:
                    first[i] = first[j] = min(first[i], first[j])
                    changed = True
    return {row: one for row, one in enumerate(first) if one != row}


def test_groups_are_those_of_all_pairs_on_real_names(tmp_path: Path) -> None:
    # Names of emoji in fourteen languages: some are near each other, most are not.
    names = [name for row in drawings(1500)[:40] for name in row.texts]
    texts = [*names[:420], "", "  ", "no", "NO"]
    corpus = corpus_of(tmp_path / "a", {"train": [pair(n, text) for n, text in enumerate(texts)]}, shard_rows=100)
    # A recall this high at 256 permutations: the chance to miss any pair is below 1e-4, whatever the seed.
    step = NearDuplicateTexts(threshold=0.6, size=3, permutations=256, recall=1 - 1e-6)
    found = dropped(step, corpus)
    expected = brute(texts, step)
    assert len(expected) >= 20
    assert {row: verdict["partner"] for row, verdict in found.items()} == expected
    for row, verdict in found.items():
        near = [
            jaccard(shingles(texts[row], "char", 3), shingles(other, "char", 3))
            for at, other in enumerate(texts)
            if at != row
        ]
        assert verdict["score"] == pytest.approx(max(near))


def test_planted_edits_are_found_and_nothing_else(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    clean = [sentence(str(row.text), n) for n, row in enumerate(drawings(4000)[:250])]
    edited = [typo(clean[n], rng) for n in range(0, 250, 3)]
    short = [" ".join(clean[n].split()[:-1]) for n in range(1, 250, 7)]
    texts = clean + edited + short
    corpus = corpus_of(tmp_path / "a", {"train": [pair(n, text) for n, text in enumerate(texts)]}, shard_rows=100)
    found = dropped(NearDuplicateTexts(threshold=0.7), corpus)
    planted = set(range(len(clean), len(texts)))
    recall = len(planted & set(found)) / len(planted)
    false = len(set(found) - planted)
    assert recall >= 0.97
    assert false <= 0.01 * len(clean)
    originals = {row: 3 * (row - 250) for row in range(250, 250 + len(edited))}
    assert all(found[row]["partner"] == original for row, original in originals.items() if row in found)


def test_word_shingles_and_a_corpus_without_any(tmp_path: Path) -> None:
    texts = ["the cat sat on the mat today", "the cat sat on the mat", "a dog ran", "..."]
    corpus = corpus_of(tmp_path / "a", {"train": [pair(n, text) for n, text in enumerate(texts)]})
    found = dropped(NearDuplicateTexts(unit="word", size=2, threshold=0.8), corpus)
    assert {row: verdict["what"] for row, verdict in found.items()} == {
        1: "Jaccard similarity 0.83 to the nearest of its group"
    }
    empty = corpus_of(tmp_path / "b", {"train": [pair(n, "!?") for n in range(3)]})
    assert dropped(NearDuplicateTexts(unit="word"), empty) == {}
