"""Hashes as ImageHash has them; slices that miss no pair within the radius."""

import itertools

import imagehash
import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rayemb.curate.perceptual import band_keys, differing_bits, image_hash
from tests.curate.noise import drawings, picture

HASHES = st.integers(0, 2**64 - 1)


def test_hashes_are_imagehashs() -> None:
    images = [picture(row.image or b"") for row in drawings(400)[:20]]
    for method, theirs in (("phash", imagehash.phash), ("dhash", imagehash.dhash)):
        ours = np.array([image_hash(image, method) for image in images])  # type: ignore[arg-type]
        assert [f"{value:016x}" for value in ours.tolist()] == [str(theirs(image)) for image in images]
        bits = differing_bits(ours[:-1], ours[1:]).tolist()
        assert bits == [theirs(a) - theirs(b) for a, b in itertools.pairwise(images)]


@given(HASHES, st.sets(st.integers(0, 63), max_size=16), st.integers(0, 16))
def test_within_the_radius_a_slice_is_equal(value: int, flipped: set[int], radius: int) -> None:
    other = value ^ sum(1 << bit for bit in flipped)
    keys = band_keys(np.array([value, other], np.uint64), radius)
    assert keys.shape == (2, radius + 1)
    assert len(set(keys[0].tolist())) == radius + 1
    if len(flipped) <= radius:
        assert (keys[0] == keys[1]).any()
