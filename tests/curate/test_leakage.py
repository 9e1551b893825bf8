"""Planted leaks of evaluation rows into training are dropped from training, whatever they are near to and in."""

from pathlib import Path

import numpy as np
import pytest

from rayemb.curate import CurationError, Leakage, Rows
from rayemb.curate.leakage import EvaluationSet
from rayemb.curate.near_duplicate_images import ImageLikeness
from rayemb.curate.near_duplicate_texts import TextLikeness
from tests.curate.noise import corpus_of, drawings, dropped, jpeg, pair, resized, sentence, typo

pytestmark = pytest.mark.usefixtures("ray_cluster")


def test_planted_leaks_are_found_in_every_set(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    real = drawings(6000)
    # Far from each other: the first of every four, so that skin tones and flags do not stand on both sides.
    rows = [pair(n, sentence(str(row.text), n), row.image or b"") for n, row in enumerate(real[::4][:90])]
    train, held_out, elsewhere = rows[:50], rows[50:70], rows[70:90]
    leaks = {
        "pair": pair("a", str(held_out[3].text).upper(), held_out[3].image or b""),
        "jpeg": pair("b", "some other text", jpeg(held_out[4].image or b"", 60)),
        "half": pair("c", "another text still", resized(elsewhere[5].image or b"", 32)),
        "typo": pair("d", typo(str(elsewhere[6].text), rng), train[0].image or b""),
    }
    both = train + list(leaks.values())
    corpus = corpus_of(tmp_path / "a", {"train": both, "val": held_out}, shard_rows=20)
    other = corpus_of(tmp_path / "b", {"test": elsewhere}, shard_rows=7)
    step = Leakage(
        against=[EvaluationSet(split="val"), EvaluationSet(split="test", corpus=other.uri)],
        equal=["pair"],
        near_texts=TextLikeness(threshold=0.7),
        near_images=ImageLikeness(),
    )
    found = dropped(step, corpus)
    planted = {50 + n: name for n, name in enumerate(leaks)}
    assert set(planted) <= set(found)
    assert len(set(found) - set(planted)) <= 2
    said = {
        name: (found[row]["reason"], found[row]["partner"], found[row]["partner_corpus"])
        for row, name in planted.items()
    }
    assert said == {
        "pair": ("near_image", 54 + 3, None),
        "jpeg": ("near_image", 54 + 4, None),
        "half": ("near_image", 5, other.uri),
        "typo": ("near_text", 6, other.uri),
    }
    assert found[50]["what"] == "similarity 1.00 to a row of val"
    assert other.uri in found[53]["what"]


def test_equal_texts_images_and_pairs_are_those_of_a_loop(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [row.image or b"" for row in drawings(500)[:6]]
    rows = [pair(n, f"text {rng.integers(12)}", images[rng.integers(6)]) for n in range(40)]
    train, val = rows[:30], rows[30:]
    corpus = corpus_of(tmp_path / "a", {"train": train, "val": val}, shard_rows=8)
    for of, content in {
        "text": lambda row: row.text,
        "image": lambda row: row.image,
        "pair": lambda row: (row.image, row.text),
    }.items():
        step = Leakage(against=[EvaluationSet(split="val")], equal=[of], near_images=None)  # type: ignore[list-item]
        expected = {
            n: 30 + [content(other) for other in val].index(content(row))
            for n, row in enumerate(train)
            if content(row) in [content(other) for other in val]
        }
        assert expected
        assert {row: verdict["partner"] for row, verdict in dropped(step, corpus).items()} == expected


def test_a_thousand_copies_of_one_caption_are_no_million_pairs(tmp_path: Path) -> None:
    boiler = "all our pictures are protected, please do ask before you use them anywhere"
    rows = [pair(n, boiler if n % 2 else sentence("cat", n)) for n in range(2000)]
    corpus = corpus_of(tmp_path / "a", {"train": rows[:1600], "val": rows[1600:]}, shard_rows=400, kind="text")
    step = Leakage(
        against=[EvaluationSet(split="val")], equal=[], near_texts=TextLikeness(threshold=0.9), near_images=None
    )
    found = dropped(step, corpus)
    assert {row for row in found if row % 2} == set(range(1, 1600, 2))
    assert {found[row]["partner"] for row in range(1, 1600, 2)} == {1601}


def test_what_makes_no_sense_is_named(tmp_path: Path) -> None:
    corpus = corpus_of(tmp_path / "a", {"train": [pair(0, "x")], "val": [pair(1, "y")]}, kind="text")
    rows = Rows.of(corpus, ["train"])
    nothing = Leakage(against=[EvaluationSet(split="val")], equal=[], near_images=None)
    with pytest.raises(CurationError, match="nothing is compared"):
        nothing.judge(rows)
    with pytest.raises(CurationError, match=r"against.0.split: 'train' is among the splits to judge"):
        Leakage(against=[EvaluationSet(split="train")]).judge(rows)
    with pytest.raises(CurationError, match="has no image in its rows"):
        Leakage(against=[EvaluationSet(split="val")], equal=["image"]).judge(rows)
