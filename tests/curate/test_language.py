"""Real names of emoji in fourteen languages: what is kept is of the language, short texts follow their policy."""

import json

import pyarrow as pa
import pytest

from rayemb.config import ConfigError, from_mapping
from rayemb.curate import Language
from rayemb.data.sources.demo import _package

SENTENCES = {
    "en": "The quick brown fox jumps over the lazy dog near the river bank.",
    "de": "Der schnelle braune Fuchs springt über den faulen Hund am Flussufer.",
    "fr": "Le renard brun saute par-dessus le chien paresseux au bord de la rivière.",
    "ru": "Быстрая коричневая лиса прыгает через ленивую собаку у берега реки.",
    "ja": "素早い茶色の狐がのろまな犬を飛び越えて川岸へ走っていきました。",
}


def judge(step: Language, texts: list[str | None]) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = step._judge(pa.table({"row": range(len(texts)), "text": texts})).to_pylist()
    return rows


def test_whole_sentences_are_told_apart() -> None:
    for language, text in SENTENCES.items():
        others = [name for name in SENTENCES if name != language]
        (kept,) = judge(Language(keep=[language]), [text])
        (gone,) = judge(Language(keep=others), [text])
        assert not kept["drop"], kept
        assert gone["drop"]
        assert gone["reason"] == language
        assert float(str(kept["score"])) > 0.5 > float(str(gone["score"]))


def test_english_names_of_emoji_stay_and_those_in_other_languages_go() -> None:
    folder = _package("emoji") / "unicode_codes"
    step = Language(keep=["en"], short="judge")
    for language in ("en", "de", "fr", "es", "ru", "ja", "zh"):
        file = folder / ("emoji.json" if language == "en" else f"emoji_{language}.json")
        names = [name["en"] if language == "en" else name for name in json.loads(file.read_text("utf-8")).values()]
        least = 12 if language in ("ja", "zh") else 32
        names = [name.strip(":").replace("_", " ") for name in names if len(name) > least][:500]
        gone = sum(verdict["drop"] is True for verdict in judge(step, list(names))) / len(names)
        assert gone <= 0.01 if language == "en" else gone >= 0.97, (language, gone)


def test_short_texts_follow_their_policy() -> None:
    texts = ["Katze", "", None, "123 456 789 123 456 789 123"]
    assert not any(verdict["drop"] for verdict in judge(Language(), texts))
    assert {verdict["reason"] for verdict in judge(Language(short="drop"), texts)} == {"short_text"}
    assert [verdict["score"] for verdict in judge(Language(), texts)] == [None] * 4
    scored = judge(Language(short="judge"), texts)
    assert all(verdict["score"] is not None for verdict in scored)


def test_a_language_that_nobody_knows_is_refused_by_its_key() -> None:
    with pytest.raises(ConfigError, match=r"keep.*unknown language english"):
        from_mapping(Language, {"keep": ["en", "english"]})
