"""Size and shape at their edges; images that too many texts go with, against a loop."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rayemb.curate import ImageRules
from tests.curate.noise import corpus_of, dropped, judged, pair, png

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_images_are_measured(tmp_path: Path) -> None:
    sizes = [(200, 200), (199, 400), (600, 200), (601, 200), (200, 601), (250, 250)]
    rows = [pair(n, f"{n}", png(Image.new("RGB", size))) for n, size in enumerate(sizes)]
    corpus = corpus_of(tmp_path / "a", {"train": rows}, shard_rows=4, group_rows=2)
    found = judged(ImageRules(min_pixels=50_000), corpus)
    reasons = {row: verdict["reason"] for row, verdict in found.items()}
    assert reasons == {0: "few_pixels", 1: "small_side", 2: None, 3: "elongated", 4: "elongated", 5: None}
    assert [found[row]["score"] for row in range(6)] == [200, 199, 200, 200, 200, 250]
    assert found[3]["what"] == "601 x 200 pixels: 3.0 times as long as wide"
    assert dropped(ImageRules(min_side=None, max_aspect=None, max_texts=None), corpus) == {}


def test_images_with_more_texts_than_allowed_go_with_all_their_rows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [png(Image.new("RGB", (4, 4), (n, 0, 0))) for n in range(12)]
    rows = [pair(n, f"text {rng.integers(9)}", images[rng.integers(12)]) for n in range(80)]
    corpus = corpus_of(tmp_path / "a", {"train": rows}, shard_rows=16)
    texts: dict[bytes, set[str]] = {}
    for row in rows:
        texts.setdefault(row.image or b"", set()).add(str(row.text))
    expected = {n for n, row in enumerate(rows) if len(texts[row.image or b""]) > 5}
    assert 0 < len(expected) < 80
    found = dropped(ImageRules(min_side=None, max_aspect=None, max_texts=5), corpus)
    assert set(found) == expected
    assert {verdict["what"] for verdict in found.values()} <= {
        f"{n} texts go with the image, over 5" for n in (6, 7, 8, 9)
    }
