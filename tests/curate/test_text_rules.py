"""Boiler-plate, URLs, repeated characters; shared texts and rare words against counts made by hand."""

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from rayemb.config import ConfigError, from_mapping
from rayemb.curate import TextRules
from tests.curate.noise import corpus_of, drawings, dropped, pair

pytestmark = pytest.mark.usefixtures("ray_cluster")

SAYS = {
    "IMG_2041.JPG": "boiler_plate",
    "dsc 0042": "boiler_plate",
    "2041": "boiler_plate",
    "holiday.png": "boiler_plate",
    "Click here for more": "boiler_plate",
    "© 2019, all rights reserved": "boiler_plate",
    "see https://example.org/x": "url",
    "from www.example.org": "url",
    "by photos.example.com": "url",
    "sooooooooo cute": "repeated_character",
    "========": "repeated_character",
    "a picture of 2 cats": None,
    "image": None,
    "file folder": None,
    "soooo cute": None,
    "version 2.0 of the map": None,
    "the year 1984": None,
}


def test_each_rule_says_what_it_saw() -> None:
    table = pa.table({"row": range(len(SAYS)), "text": list(SAYS)})
    found = {row["row"]: row for row in TextRules()._judge(table, None).to_pylist()}
    assert {text: found[n]["reason"] if n in found else None for n, text in enumerate(SAYS)} == SAYS
    assert found[6]["what"] == "has 'https://example.org/x'"
    off = TextRules(urls=False, boiler_plate=[], max_repeat=None)
    assert off._judge(table, None).num_rows == 0


def test_real_names_pass() -> None:
    names = [str(row.text) for row in drawings(6000)]
    table = pa.table({"row": range(len(names)), "text": names})
    assert TextRules()._judge(table, None).num_rows <= 0.002 * len(names)


def test_texts_of_many_images_go_and_rare_words_with_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    words = ["cat", "dog", "sun", "sea", "sky", "tree", "zebra", "yak"]
    weights = np.array([30, 20, 15, 10, 10, 10, 4, 1]) / 100
    texts = [" ".join(rng.choice(words, size=3, p=weights)) for _ in range(150)]
    rows = [pair(n, text, bytes([rng.integers(20)])) for n, text in enumerate(texts)]
    corpus = corpus_of(tmp_path / "a", {"train": rows}, shard_rows=40)

    images: dict[str, set[bytes | None]] = {}
    for row in rows:
        images.setdefault(str(row.text), set()).add(row.image)
    shared = {n for n, text in enumerate(texts) if len(images[text]) > 2}
    counts: Counter[str] = Counter()
    for text in texts:
        split = text.split()
        counts.update(split)
        counts.update(f"{a} {b}" for a, b in itertools.pairwise(split))
    # At most 30 n-grams, without those that tie with the 31st.
    ranked = sorted(counts.values(), reverse=True)
    frequent = {gram for gram, count in counts.items() if count > ranked[30]}
    rare = {
        n
        for n, text in enumerate(texts)
        if {*text.split(), *(f"{a} {b}" for a, b in itertools.pairwise(text.split()))} - frequent
    }
    assert 0 < len(shared) < 150
    assert 0 < len(rare) < 150

    facts: dict[str, object] = {}
    found = dropped(TextRules(max_images=2, vocabulary=30), corpus, facts=facts)
    assert set(found) == shared | rare
    assert {row for row, verdict in found.items() if verdict["reason"] == "rare_word"} == rare
    assert facts["vocabulary"] == f"n-grams that occur {min(counts[gram] for gram in frequent)} times or more"
    assert set(dropped(TextRules(max_images=2), corpus)) == shared
    single = {n for n, text in enumerate(texts) if "yak" in text.split()}
    assert set(dropped(TextRules(max_images=None, vocabulary=7, ngram=1), corpus)) == single


def test_a_pattern_that_is_none_is_named() -> None:
    with pytest.raises(ConfigError, match="is not a regular expression"):
        from_mapping(TextRules, {"boiler_plate": ["(open"]})
