"""Shingles of texts and their MinHash signatures, a batch at a time (Broder, 1997). Knows no Ray.

The signatures are datasketch's (scheme `affine32`), so that they compare with those of other tools.
"""

import unicodedata
import zlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rayemb.curate.sentences import tokens

Unit = Literal["char", "word"]
_BASE = np.uint64(0x9E3779B97F4A7C15)


def shingles(text: str, unit: Unit, size: int) -> NDArray[np.uint64]:
    """The set of `size`-grams of a text's characters or words as sorted 64-bit hashes; a shorter text is one shingle.

    Case, Unicode form and white space make no difference. A text without any character (or word) gives none.
    """
    if unit == "char":
        plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
        parts = np.frombuffer(plain.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    else:
        # Two 32-bit checksums: one would confuse words in a corpus of millions of them.
        words = [word.encode() for word in tokens(text)]
        parts = np.array([zlib.crc32(word) << 32 | zlib.adler32(word) for word in words], np.uint64)
    if not len(parts):
        return np.zeros(0, np.uint64)
    size = min(size, len(parts))
    total = np.full(len(parts) - size + 1, size, np.uint64)
    for at in range(size):
        total = mixed(total * _BASE + parts[at : len(parts) - size + 1 + at])
    return np.unique(total)


def mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A bijection of 64 bits in which every bit depends on every other (MurmurHash3's finaliser)."""
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ (x >> np.uint64(33))


def signatures(sets: Sequence[NDArray[np.uint64]], permutations: int, seed: int) -> NDArray[np.uint32]:
    """MinHash signatures `(N, permutations)` of non-empty sets, equal to datasketch's of the hashes' low 32 bits."""
    out = np.empty((len(sets), permutations), np.uint32)
    if not len(sets):
        return out
    starts = np.cumsum([0, *map(len, sets)])[:-1]
    x = np.concatenate(sets).astype(np.uint32)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    x ^= x >> np.uint32(16)
    from datasketch import MinHash  # with scipy's integration, a fifth of a second

    a, b = MinHash(num_perm=permutations, seed=seed, scheme="affine32").permutations
    for number in range(permutations):
        out[:, number] = np.minimum.reduceat(a[number] * x + b[number], starts)
    return out


def banding(threshold: float, permutations: int, recall: float) -> tuple[int, int]:
    """(bands, rows a band): the fewest candidates with which a pair at the threshold is one with chance `recall`.

    A pair of Jaccard similarity s agrees in at least one band with probability 1 - (1 - s^rows)^bands.
    """
    for rows in range(permutations, 1, -1):
        bands = permutations // rows
        if 1 - (1 - threshold**rows) ** bands >= recall:
            return bands, rows
    return permutations, 1


def band_keys(signature: NDArray[np.uint32], bands: int, rows: int) -> NDArray[np.int64]:
    """A key `(N, bands)` for each band: equal in two texts if all of its rows are."""
    keys = np.empty((len(signature), bands), np.uint64)
    for band in range(bands):
        total = np.full(len(signature), band, np.uint64)
        for at in range(band * rows, (band + 1) * rows):
            total = mixed(total * _BASE + signature[:, at])
        keys[:, band] = total
    return keys.view(np.int64)


def jaccard(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> float:
    """Size of the intersection over size of the union of two sorted sets; 0 for two empty ones."""
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / max(len(a) + len(b) - common, 1)
