"""Hamming search against all pairs by brute force; planted re-encodes, resizes and crops of real drawings."""

from pathlib import Path

import imagehash
import numpy as np
import pytest
from PIL import Image

from rayemb.curate import CurationError, NearDuplicateImages, Rows
from rayemb.curate.perceptual import Method
from tests.curate.noise import corpus_of, cropped, drawings, dropped, jpeg, pair, picture, resized

pytestmark = pytest.mark.usefixtures("ray_cluster")


def hashes(images: list[bytes], method: Method) -> np.ndarray:
    take = imagehash.phash if method == "phash" else imagehash.dhash
    return np.array([take(picture(image)).hash.ravel() for image in images])


def groups(near: np.ndarray) -> dict[int, int]:
    """The first row of each repeat's group, from all pairs."""
    first = np.arange(len(near))
    while True:
        smallest = np.where(near, first[None], len(near)).min(1)
        if (smallest == first).all():
            return {row: int(one) for row, one in enumerate(first) if one != row}
        first = smallest


@pytest.mark.parametrize(("method", "radius", "levels"), [("phash", 4, None), ("dhash", 2, None), ("dhash", 6, 20.0)])
def test_groups_are_exactly_those_of_all_pairs(
    tmp_path: Path, method: Method, radius: int, levels: float | None
) -> None:
    images = [row.image or b"" for row in drawings(1500, 32, "material6")[:300]]
    corpus = corpus_of(tmp_path / "a", {"train": [pair(n, f"{n}", image) for n, image in enumerate(images)]})
    found = dropped(NearDuplicateImages(method=method, radius=radius, max_difference=levels), corpus)
    bits = hashes(images, method)
    apart = (bits[:, None] != bits[None]).sum(-1)
    near = apart <= radius
    if levels:
        small = [np.asarray(picture(image).resize((12, 12), Image.Resampling.LANCZOS), float) for image in images]
        near &= np.array([[np.sqrt(((a - b) ** 2).mean()) <= levels for b in small] for a in small])
    expected = groups(near)
    assert expected
    assert {row: verdict["partner"] for row, verdict in found.items()} == expected
    for row, verdict in found.items():
        others = np.delete(apart[row][None], row)[np.delete(near[row], row)]
        assert verdict["score"] == pytest.approx(1 - others.min() / 64)
        assert verdict["what"].startswith(f"{others.min()} of 64 bits")


def test_planted_copies_of_real_drawings_are_found_and_hardly_anything_else(tmp_path: Path) -> None:
    clean = [row.image or b"" for row in drawings(6000)[:200]]
    kinds = {
        "jpeg 90": [jpeg(image, 90) for image in clean],
        "jpeg 50": [jpeg(image, 50) for image in clean],
        "half": [resized(image, 32) for image in clean],
        "double": [resized(image, 128) for image in clean],
        "crop": [cropped(image, 1) for image in clean],
    }
    images = [*clean, *(copy for kind in kinds.values() for copy in kind)]
    rows = [pair(n, "x", image) for n, image in enumerate(images)]
    size = len(clean)
    corpus = corpus_of(tmp_path / "a", {"train": rows}, shard_rows=400)
    found = dropped(NearDuplicateImages(), corpus)
    recall = {name: np.mean([size * (n + 1) + at in found for at in range(size)]) for n, name in enumerate(kinds)}
    assert min(recall[name] for name in ("jpeg 90", "jpeg 50", "half", "double")) >= 0.95, recall
    right = [found[row]["partner"] == row % size for row in found if row >= size]
    assert np.mean(right) >= 0.95
    # Emoji of one look, of which there are some: flags of one pattern, a heart in two hues.
    assert sum(row < size for row in found) <= 0.05 * size


def test_a_corpus_without_images_is_refused(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "a", {"train": [pair(0, "x")]}, kind="text")
    with pytest.raises(CurationError, match="a corpus of kind text has no image"):
        NearDuplicateImages().judge(Rows.of(corpus))
