"""Texts to ids: the same everywhere, in every language."""

import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayemb.config import ConfigError, from_mapping
from rayemb.models import TextTokenizer, TokenizerConfig

CORPUS = ["a red heart", "un cœur rouge", "красное сердце", "赤いハート", "قلب أحمر", "빨간 하트", "kırmızı kalp"] * 5
CONFIG = TokenizerConfig(vocab_size=600, max_length=16)
TOKENIZER = TextTokenizer.train(CORPUS, CONFIG)


def test_the_same_texts_give_the_same_tokenizer() -> None:
    assert TextTokenizer.train(CORPUS, CONFIG).to_json() == TOKENIZER.to_json()


def test_the_same_texts_give_the_same_tokenizer_in_another_process() -> None:
    code = (
        "import sys; from tests.models.test_tokenizer import TOKENIZER;"
        "sys.stdout.buffer.write(TOKENIZER.to_json().encode())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert run.stdout.decode() == TOKENIZER.to_json()


def test_padding_is_no_token() -> None:
    ids = TOKENIZER(["a red heart and then some more", "a", ""])
    assert ids.dtype == np.int64
    lengths = (ids != -1).sum(1)
    assert lengths.max() == ids.shape[1]
    assert lengths[2] == 1  # [CLS] alone: no row is all padding
    for row, length in zip(ids, lengths, strict=True):
        assert (row[:length] != -1).all()
        assert (row[length:] == -1).all()
    assert len(set(ids[:, 0])) == 1


def test_a_row_does_not_depend_on_its_batch() -> None:
    alone = TOKENIZER(["a red heart"])[0]
    in_batch = TOKENIZER(["x", "a red heart", "a much longer text beside it"])[1]
    assert (in_batch[: len(alone)] == alone).all()
    assert (in_batch[len(alone) :] == -1).all()


def test_pad_to() -> None:
    ids = TOKENIZER(["a", "a red heart"], pad_to=16)
    assert ids.shape == (2, 16)
    assert (ids[:, : TOKENIZER(["a red heart"]).shape[1]] == TOKENIZER(["a", "a red heart"])).all()


def test_long_texts_are_cut_from_their_end() -> None:
    short, long = TOKENIZER(["word " * 3])[0], TOKENIZER(["word " * 500])
    assert long.shape == (1, CONFIG.max_length)
    assert (long[0, : len(short) - 1] == short[:-1]).all()


def test_no_texts() -> None:
    assert TOKENIZER([]).shape[0] == 0


def test_case_and_compatibility_forms_do_not_matter() -> None:
    ids = TOKENIZER(["Straße ﬁn", "STRAßE fin", "straße ｆｉｎ"])
    assert (ids[0] == ids[1]).all()
    assert (ids[0] == ids[2]).all()


@given(st.text(max_size=30))
def test_every_text_survives_the_round_trip(text: str) -> None:
    tokenizer = TextTokenizer.from_json(TOKENIZER.to_json(), 500)
    ids = [int(i) for i in tokenizer([text])[0] if i]
    back = tokenizer.tokenizer.decode(ids)
    normalised = tokenizer.tokenizer.normalizer.normalize_str(text)
    assert back.removeprefix(" ") == normalised.removeprefix(" ")
    assert max(ids) < tokenizer.vocab_size


@pytest.mark.parametrize("text", ["[PAD]", "[CLS] [PAD] cat", "x [UNK]"])
def test_a_text_cannot_write_control_tokens(text: str) -> None:
    ids = TOKENIZER([text])[0]
    assert (ids[1:] > 2).all()


def test_json_and_pickle_give_the_same_ids() -> None:
    texts = [*CORPUS, "never seen 漢字", "[PAD]", "word " * 50]
    for again in (pickle.loads(pickle.dumps(TOKENIZER)), TextTokenizer.from_json(TOKENIZER.to_json(), 16)):
        assert (again(texts) == TOKENIZER(texts)).all()
        assert again.vocab_size == TOKENIZER.vocab_size
        assert again.to_json() == TOKENIZER.to_json()


def test_the_vocabulary_is_bounded_and_its_file_is_the_open_format() -> None:
    assert TOKENIZER.vocab_size <= CONFIG.vocab_size
    assert json.loads(TOKENIZER.to_json())["model"]["type"] == "BPE"


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(ConfigError, match="vocab_size"):
        from_mapping(TokenizerConfig, {"vocab_size": 256})
