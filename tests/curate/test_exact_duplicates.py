"""Planted copies are found, all of them and nothing else; the first row stays."""

from pathlib import Path

import pytest

from rayemb.curate import CurationError, ExactDuplicates, Rows
from rayemb.curate.exact_duplicates import What
from tests.curate.noise import corpus_of, drawings, dropped, pair

pytestmark = pytest.mark.usefixtures("ray_cluster")


def naive(contents: list[object]) -> dict[int, int]:
    """Each repeat with the first of its kind."""
    return {n: contents.index(content) for n, content in enumerate(contents) if contents.index(content) != n}


def test_repeats_of_images_texts_and_pairs_are_what_a_loop_finds(tmp_path: Path) -> None:
    real = drawings(500)[:40]
    rows = [pair(n, str(row.text), row.image or b"") for n, row in enumerate(real)]
    # Other text, other image, both equal (but for case and spaces), out of order and more than once.
    rows += [pair(f"i{n}", f"another {n}", rows[n].image or b"") for n in (3, 7, 3)]
    rows += [pair(f"t{n}", str(rows[n].text).upper() + "  ", rows[n + 1].image or b"") for n in (11, 12)]
    rows += [pair(f"p{n}", f" {rows[n].text}", rows[n].image or b"") for n in (5, 0, 20, 5)]
    corpus = corpus_of(tmp_path / "a", {"train": rows, "val": rows[:5]}, shard_rows=9, group_rows=4)
    texts = [" ".join(str(row.text).casefold().split()) for row in rows]
    expected: dict[What, list[object]] = {
        "image": [row.image for row in rows],
        "text": list(texts),
        "pair": [(row.image, text) for row, text in zip(rows, texts, strict=True)],
    }
    for of, contents in expected.items():
        found = dropped(ExactDuplicates(of=of), corpus)
        assert {row: verdict["partner"] for row, verdict in found.items()} == naive(contents), of
        assert {verdict["reason"] for verdict in found.values()} == {f"same_{of}"}
    # Two splits judged at once: the one that comes first in the corpus keeps its rows.
    found = dropped(ExactDuplicates(of="pair", splits=["train", "val"]), corpus)
    assert {row for row in found if row >= len(rows)} == set(range(len(rows), len(rows) + 5))


def test_queries_of_text_pairs(tmp_path: Path) -> None:
    rows = [pair(n, f"answer {n}", query=query) for n, query in enumerate(["a b", "c", "A  B", "c d"])]
    corpus = corpus_of(tmp_path / "a", {"train": rows}, kind="text_pair")
    assert set(dropped(ExactDuplicates(of="query"), corpus)) == {2}
    with pytest.raises(CurationError, match=r"curate.exact_duplicates.of: a corpus of kind text_pair has no image"):
        ExactDuplicates(of="image").judge(Rows.of(corpus))
