"""Shingles and signatures: equal to datasketch's, and to sets made letter by letter."""

import numpy as np
import pytest
from datasketch import MinHash
from hypothesis import given
from hypothesis import strategies as st

from rayemb.curate.minhash import Unit, band_keys, banding, jaccard, shingles, signatures

TEXTS = st.text(alphabet="abcdé ßÅ漢字🙂\n\t", max_size=30)


def grams(text: str, size: int) -> set[str]:
    """The sets of n-grams, naively; the alphabet above casefolds and normalises predictably."""
    import unicodedata

    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    size = min(size, len(plain))
    return {plain[at : at + size] for at in range(len(plain) - size + 1)} if plain else set()


@given(TEXTS, TEXTS, st.integers(1, 5))
def test_jaccard_is_that_of_the_sets_of_n_grams(a: str, b: str, size: int) -> None:
    one, other = grams(a, size), grams(b, size)
    expected = len(one & other) / max(len(one | other), 1)
    assert jaccard(shingles(a, "char", size), shingles(b, "char", size)) == expected


def test_word_shingles_are_runs_of_words() -> None:
    assert len(shingles("one two three four", "word", 2)) == 3
    assert jaccard(shingles("One, two three", "word", 2), shingles("two three four", "word", 2)) == 1 / 3
    assert len(shingles(" . ", "word", 2)) == 0
    assert np.array_equal(shingles("ab", "word", 3), shingles("AB", "word", 3))


def test_signatures_are_datasketchs() -> None:
    sets = [shingles(text, "char", 3) for text in ("a shopping cart", "x", "a shopping card")]
    ours = signatures(sets, 64, seed=7)
    for each, found in zip(sets, ours, strict=True):
        theirs = MinHash(num_perm=64, seed=7, hashfunc=int, scheme="affine32")
        theirs.update_batch([int(value) % 2**32 for value in each])
        assert np.array_equal(found, theirs.hashvalues)
    assert signatures([], 64, seed=7).shape == (0, 64)


@pytest.mark.parametrize(("threshold", "unit"), [(0.5, "char"), (0.8, "char"), (0.95, "word")])
def test_banding_keeps_its_promise_with_the_fewest_candidates(threshold: float, unit: Unit) -> None:
    bands, rows = banding(threshold, 128, 0.99)
    assert bands * rows <= 128
    assert 1 - (1 - threshold**rows) ** bands >= 0.99
    more = rows + 1
    assert 1 - (1 - threshold**more) ** (128 // more) < 0.99


def test_band_keys_are_equal_where_all_rows_of_a_band_are() -> None:
    signature = np.array([[1, 2, 3, 4], [1, 2, 9, 4], [3, 4, 1, 2]], np.uint32)
    keys = band_keys(signature, 2, 2)
    assert keys[0, 0] == keys[1, 0]
    assert keys[0, 1] != keys[1, 1]
    assert not set(keys[:, 0].tolist()) & set(keys[:, 1].tolist())
