"""Sub-captions: sentences in several languages, clauses, and what is left out."""

from pathlib import Path

import pytest

from rayemb.curate import Rows, SubCaptions
from rayemb.curate.sentences import clauses, sentences, sub_captions, tokens
from tests.curate.digits import corpus_of, digit_rows, judged


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A red heart", ["A red heart"]),
        ("A dog runs. It is fast! Is it? Yes.", ["A dog runs.", "It is fast!", "Is it?", "Yes."]),
        ("Dr. Smith sees a cat. It weighs 3.5 kg.", ["Dr. Smith sees a cat.", "It weighs 3.5 kg."]),
        ("J. S. Bach plays no. 7 in St. Petersburg.", ["J. S. Bach plays no. 7 in St. Petersburg."]),
        ('She said no. Then "Stop." He left...', ["She said no.", 'Then "Stop."', "He left..."]),
        ("Signs, e.g. arrows, i.e. lines. Two of them.", ["Signs, e.g. arrows, i.e. lines.", "Two of them."]),
        ("Am 3. Mai sitzt z.B. ein Hund im Gras. Er bellt.", ["Am 3. Mai sitzt z.B. ein Hund im Gras.", "Er bellt."]),
        ("1. A cat\n2. A dog", ["1. A cat", "2. A dog"]),
        ("¿Qué es? Es un gato. Duerme.", ["¿Qué es?", "Es un gato.", "Duerme."]),
        ("一只猫坐在垫子上。它很可爱！狗在睡觉", ["一只猫坐在垫子上。", "它很可爱！", "狗在睡觉"]),
        ("「猫です。」と言った。犬もいる。", ["「猫です。」", "と言った。", "犬もいる。"]),
        ("यह एक बिल्ली है। वह सोती है।", ["यह एक बिल्ली है।", "वह सोती है।"]),
        ("ما هذا؟ هذه قطة.", ["ما هذا؟", "هذه قطة."]),
        ("Это кошка. Она спит, ей 3 г. от роду.", ["Это кошка.", "Она спит, ей 3 г. от роду."]),
        ("", []),
        (" \n . ", ["."]),
    ],
)
def test_sentences(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


def test_no_letter_is_lost() -> None:
    text = "One. Two!Three? «Vier.» 5.5 and vs. six... 七。八 (Nine.) no. 10"
    assert "".join("".join(sentences(text)).split()) == "".join(text.split())


def test_clauses_keep_their_least_words_and_numbers() -> None:
    long = "He paid 1,000 dollars, and then, after a long walk, he went home; the dog was there"
    assert clauses(long, 3) == [
        "He paid 1,000 dollars",
        "and then, after a long walk",
        "he went home",
        "the dog was there",
    ]
    assert clauses("a red, round ball", 3) == ["a red, round ball"]
    assert clauses("一只猫坐在垫子上，狗在睡觉", 3) == ["一只猫坐在垫子上", "狗在睡觉"]


def test_repeats_and_scraps_are_left_out_and_the_limit_holds() -> None:
    text = "A black cat sits on a mat. On a mat sits a black cat! Wow. A dog sleeps beside it. Rain falls on the roof."
    parts = sub_captions(text, limit=6, min_words=3, by_clause=False, max_overlap=0.8)
    assert parts == ["A black cat sits on a mat.", "A dog sleeps beside it.", "Rain falls on the roof."]
    assert sub_captions(text, limit=2, min_words=3, by_clause=False, max_overlap=0.8) == parts[:2]
    every = sub_captions(text, limit=9, min_words=1, by_clause=False, max_overlap=1)
    assert len(every) == 5


def test_tokens_are_words_or_letters_where_words_are_not_spaced() -> None:
    assert tokens("The Cat’s №5 Straße") == ["the", "cat", "s", "no5", "strasse"]
    assert tokens("猫がいる") == ["猫", "が", "い", "る"]


@pytest.mark.usefixtures("ray_cluster")
def test_the_step_adds_to_the_captions_of_long_texts_alone(tmp_path: Path) -> None:
    texts = ["a heart", "A black cat sits on a mat. A dog sleeps beside it.", "One long sentence, and only one of it."]
    rows = digit_rows(3, text=texts)
    rows[1]["texts"] = ["un chat noir", texts[1]]
    corpus = corpus_of(tmp_path, rows)
    found = judged(SubCaptions(), Rows.of(corpus))
    assert set(found) == {1}
    assert not found[1]["drop"]
    assert found[1]["new_texts"] == [
        texts[1],
        "un chat noir",
        "A black cat sits on a mat.",
        "A dog sleeps beside it.",
    ]
    assert found[1]["new_text"] is None
    by_clause = judged(SubCaptions(unit="clause"), Rows.of(corpus))
    assert by_clause[2]["new_texts"][1:] == [texts[2], "One long sentence", "and only one of it."][1:]
