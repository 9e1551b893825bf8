"""Limits of words and characters, each at its edge."""

from typing import Any

import pyarrow as pa
import pytest

from rayemb.config import ConfigError, from_mapping
from rayemb.curate import Length

TEXTS = ["one", "one two", "one two three", "w " * 20, "w " * 21, "猫の写真", "", None]


def reasons(texts: list[Any], **settings: Any) -> list[str | None]:
    table = pa.table({"row": range(len(texts)), "text": pa.array(texts, pa.string())})
    found = Length(**settings)._judge(table).to_pylist()
    assert [verdict["row"] for verdict in found] == list(range(len(texts)))
    assert all(verdict["drop"] == (verdict["reason"] is not None) == (verdict["what"] is not None) for verdict in found)
    return [verdict["reason"] for verdict in found]


def test_the_default_is_aligns_3_to_20_words() -> None:
    few, many = "few_words", "many_words"
    assert reasons(TEXTS) == [few, few, None, None, many, None, few, few]


def test_characters_count_letters_and_spaces_of_any_script() -> None:
    limits = {"min_words": None, "max_words": None, "min_chars": 4, "max_chars": 7}
    few, many = "few_characters", "many_characters"
    assert reasons(TEXTS, **limits) == [few, None, many, many, many, None, few, few]


def test_the_score_is_the_number_of_words_and_the_sentence_says_it() -> None:
    table = pa.table({"row": [7], "text": ["one two"]})
    (verdict,) = Length()._judge(table).to_pylist()
    assert verdict["score"] == 2
    assert verdict["what"] == "2 words, under 3"


def test_filtering_twice_is_filtering_once() -> None:
    kept = [text for text, reason in zip(TEXTS, reasons(TEXTS), strict=True) if reason is None]
    assert reasons(kept) == [None] * len(kept)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"min_words": 5, "max_words": 4}, "nothing would stay"), ({"min_words": None, "max_words": None}, "one limit")],
)
def test_limits_that_make_no_sense_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        from_mapping(Length, settings)
