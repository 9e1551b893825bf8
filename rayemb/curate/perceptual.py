"""Perceptual hashes of images, 64 bits each, the bands by which near ones are found, and thumbnails. Knows no Ray.

`phash` compares the 64 lowest frequencies of a 32 x 32 thumbnail with their median, `dhash` neighbouring pixels of a
9 x 8 one (both as ImageHash computes them).
"""

import itertools
from typing import Literal

import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from rayemb.curate.minhash import mixed

Method = Literal["phash", "dhash"]
BITS = 64
SIDE = 12  # of a thumbnail, in pixels
_AT_ONCE = 1 << 16  # pairs of thumbnails that are compared at once


def image_hash(image: Image.Image, method: Method) -> np.uint64:
    """The hash of an image; images that look alike differ in few bits."""
    bits = (imagehash.phash if method == "phash" else imagehash.dhash)(image, hash_size=8).hash
    return np.uint64(int.from_bytes(np.packbits(bits.ravel()).tobytes(), "big"))


def band_keys(hashes: NDArray[np.uint64], radius: int) -> NDArray[np.int64]:
    """A key `(N, radius + 1)` for each of `radius + 1` slices of the bits.

    Two hashes that differ in at most `radius` bits agree in one slice at least (pigeonhole): nothing is missed.
    """
    edges = np.linspace(0, BITS, radius + 2).round().astype(int)
    keys = np.empty((len(hashes), radius + 1), np.uint64)
    for band, (low, high) in enumerate(itertools.pairwise(edges)):
        part = (hashes >> np.uint64(low)) & np.uint64(2 ** int(high - low) - 1)
        keys[:, band] = mixed(mixed(part) + np.uint64(band))
    return keys.view(np.int64)


def differing_bits(a: NDArray[np.uint64], b: NDArray[np.uint64]) -> NDArray[np.int64]:
    """In how many bits two hashes differ, elementwise."""
    return np.asarray(np.bitwise_count(a ^ b), np.int64)


def thumbnail(image: Image.Image) -> bytes:
    """The image squeezed into 12 x 12 RGB pixels."""
    return image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS).tobytes()


def differences(thumbs: NDArray[np.uint8], i: NDArray[np.int64], j: NDArray[np.int64]) -> NDArray[np.float64]:
    """Root mean squared differences (0 to 255) of the thumbnails `(N, 432)` at places i with those at places j."""
    out = np.empty(len(i))
    for at in range(0, len(i), _AT_ONCE):
        part = slice(at, at + _AT_ONCE)
        apart = thumbs[i[part]].astype(np.float32) - thumbs[j[part]]
        out[part] = np.sqrt(np.square(apart).mean(axis=1))
    return out
