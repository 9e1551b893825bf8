"""Rows of a plan as arrays: what belongs together stays together, and the bad ones are told of."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayemb.data import Corpus, CorpusError
from rayemb.data.augment import AugmentConfig, augmented, draws
from rayemb.data.corpus import SCHEMA
from rayemb.data.decode import ColumnReader, Decoder, DecodeSettings, Member, Piece, merged
from rayemb.data.keys import keys_of, text_keys
from rayemb.data.mix import CorpusEntry
from rayemb.models import PromptsConfig, TextTokenizer, TokenizerConfig
from rayemb.parallel import NO_KEY
from tests.data.corpora import corrupt, png, write_corpus

TOKENIZER = TextTokenizer.train(["text texte текст query wrong 0 1 2 3 4 5 6 7 8 9"], TokenizerConfig(vocab_size=600))
ROWS = 60


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("decode") / "images", {"train": [37, 23]}, concepts=40)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return write_corpus(tmp_path_factory.mktemp("decode") / "pairs", {"train": [30, 30]}, pairs=True)


def decoder(*corpora: Corpus, augment: AugmentConfig | None = None, cache: int = 1 << 20, **entry: Any) -> Decoder:
    members = [Member(CorpusEntry(**entry), c.kind, c.row_groups("train"), c.image_limits) for c in corpora]
    settings = DecodeSettings(TOKENIZER, 8, 3, augment or AugmentConfig(), cache)
    return Decoder(members, settings)


def decode(decoder: Decoder, rows: Any, step: int = 0) -> dict[str, Any]:
    arrays, bad = decoder(Piece(step, ((0, np.asarray(rows)),)))
    assert bad == []
    return arrays


def numbers(arrays: dict[str, Any]) -> list[int]:
    """Which row of the corpus each picture is, from its colour."""
    return [int(p[0, 0, 0]) + 256 * int(p[1, 0, 0]) for p in arrays["pixels"]]


def same(tokens: np.ndarray, text: str) -> bool:
    return bool(tokens[tokens != -1].tolist() == TOKENIZER([text])[0].tolist())


def test_what_belongs_to_a_row_lies_at_its_place(images: Corpus) -> None:
    arrays = decode(decoder(images), range(ROWS))
    assert arrays["pixels"].shape == (ROWS, 3, 8, 8)
    assert arrays["pixels"].dtype == np.uint8
    assert arrays["row"].tolist() == numbers(arrays) == list(range(ROWS))
    for n, tokens, keys in zip(range(ROWS), arrays["tokens"], arrays["keys"], strict=True):
        (caption,) = [text for text in (f"text {n}", f"texte {n}", f"текст {n}") if same(tokens, text)]
        expected = [*keys_of([png(n)]), *text_keys([caption]), *keys_of([f"concept {n % 40}"])]
        assert keys.tolist() == expected


@pytest.mark.parametrize(("main_caption", "expected"), [(0.0, 1 / 3), (0.5, 2 / 3), (1.0, 1.0)])
def test_captions_are_drawn_anew_each_step_the_main_one_more_often(
    images: Corpus, main_caption: float, expected: float
) -> None:
    decoding = decoder(images, main_caption=main_caption)
    steps = [decode(decoding, range(ROWS), step)["tokens"] for step in range(20)]
    main = np.mean([same(tokens, f"text {n}") for step in steps for n, tokens in enumerate(step)])
    assert main == pytest.approx(expected, abs=3 * 0.5 / (20 * ROWS) ** 0.5)
    assert np.array_equal(decode(decoding, range(ROWS), 7)["tokens"], steps[7])


def test_a_row_is_the_same_whatever_comes_with_it(images: Corpus) -> None:
    augment = AugmentConfig(crop=(0.3, 1.0), flip=0.5, jitter=0.4, grey=0.2, blur=0.5)
    whole = decode(decoder(images, augment=augment), range(ROWS), 5)
    part = decode(decoder(images, augment=augment, cache=1), [3, 17, 18, 44], 5)
    for name in ("pixels", "keys"):
        assert np.array_equal(part[name], whole[name][[3, 17, 18, 44]])
    again = decode(decoder(images, augment=augment), range(ROWS), 6)
    assert not np.array_equal(again["pixels"], whole["pixels"])


def test_pairs_of_texts_with_instructions_and_hard_negatives(pairs: Corpus) -> None:
    decoding = decoder(pairs, query_prefix="query: ", text_prefix="text: ", main_caption=1.0, hard_negatives=2)
    arrays = decode(decoding, range(ROWS))
    assert "pixels" not in arrays
    counts = [min(2, n % 4) for n in range(ROWS)]
    assert arrays["negative_counts"].tolist() == counts
    assert all(same(tokens, f"query: query {n}") for n, tokens in enumerate(arrays["query_tokens"]))
    assert all(same(tokens, f"text: text {n}") for n, tokens in enumerate(arrays["tokens"]))
    start = 0
    for n, count in enumerate(counts):
        found = []
        for tokens, keys in zip(
            *(arrays[f"negative_{x}"][start : start + count] for x in ("tokens", "keys")), strict=True
        ):
            (one,) = [i for i in range(n % 4) if same(tokens, f"text: wrong {n} {i}")]
            assert keys.tolist() == [NO_KEY, text_keys([f"wrong {n} {one}"])[0], NO_KEY]
            found.append(one)
        assert len(set(found)) == count
        start += count
    assert start == len(arrays["negative_tokens"])


@pytest.mark.parametrize("pooled", [True, False])
def test_the_models_prompts_stand_before_texts_of_corpora_without_prefixes(pairs: Corpus, pooled: bool) -> None:
    prompts = PromptsConfig(query="query: ", text="text: ", pooled=pooled)
    settings = DecodeSettings(TOKENIZER, 8, 3, AugmentConfig(), prompts=prompts)
    entry = CorpusEntry(text_prefix="wrong ", main_caption=1.0, hard_negatives=2)
    members = [Member(entry, pairs.kind, pairs.row_groups("train"), pairs.image_limits)]
    arrays = decode(Decoder(members, settings), range(ROWS))
    assert all(same(tokens, f"query: query {n}") for n, tokens in enumerate(arrays["query_tokens"]))
    assert all(same(tokens, f"wrong text {n}") for n, tokens in enumerate(arrays["tokens"]))
    skips = {name: values for name, values in arrays.items() if name.endswith("skips")}
    if pooled:
        assert not skips
        return
    of_query, of_text = (len(TOKENIZER([prompt])[0]) for prompt in ("query:", "wrong"))
    assert skips["query_skips"].tolist() == [of_query] * ROWS
    assert skips["skips"].tolist() == [of_text] * ROWS
    assert skips["negative_skips"].tolist() == [of_text] * len(arrays["negative_tokens"])
    # The tokenizer says what is left of a text behind its prompt: the same as without, its special token apart.
    for n, (tokens, skip) in enumerate(zip(arrays["query_tokens"], skips["query_skips"], strict=True)):
        real = tokens[tokens != -1]
        assert real[skip:].tolist() == TOKENIZER([f"query {n}"])[0][1:].tolist()


def test_labels_are_places_among_the_classes(images: Corpus) -> None:
    members = [Member(CorpusEntry(), images.kind, images.row_groups("train"), images.image_limits)]
    classes = np.unique(keys_of([f"concept {n}" for n in range(40)]))
    arrays, _ = Decoder(members, DecodeSettings(TOKENIZER, 8, 0, AugmentConfig(), classes=classes))(
        Piece(0, ((0, np.arange(ROWS)),))
    )
    assert len(set(arrays["labels"][:40])) == 40
    assert arrays["labels"][:20].tolist() == arrays["labels"][40:].tolist()


def test_corpora_of_one_kind_in_one_piece(images: Corpus, tmp_path: Path) -> None:
    other = write_corpus(tmp_path / "other", {"train": [10]})
    arrays, bad = decoder(images, other)(Piece(0, ((0, np.array([5, 50])), (1, np.array([2, 4, 9])))))
    assert not bad
    assert arrays["task"].tolist() == [0, 0, 1, 1, 1]
    assert arrays["row"].tolist() == numbers(arrays) == [5, 50, 2, 4, 9]


def test_no_rows_at_all(images: Corpus, pairs: Corpus) -> None:
    none = np.zeros(0, dtype=np.int64)
    assert decode(decoder(images), none)["pixels"].shape == (0, 3, 8, 8)
    arrays = decode(decoder(pairs, hard_negatives=1), none)
    assert arrays["query_tokens"].shape[0] == arrays["negative_tokens"].shape[0] == 0
    assert arrays["keys"].shape == arrays["negative_keys"].shape == (0, 3)
    assert arrays["keys"].dtype == np.int64


def test_pieces_are_merged_and_padded() -> None:
    parts = [
        {"tokens": np.array([[1, 2]]), "row": np.array([7])},
        {"tokens": np.array([[3, 4, 5], [6, -1, -1]]), "row": np.array([8, 9])},
    ]
    found = merged(parts)
    assert found["tokens"].tolist() == [[1, 2, -1], [3, 4, 5], [6, -1, -1]]
    assert found["row"].tolist() == [7, 8, 9]


def test_a_corrupt_row_group_costs_its_rows_and_is_named(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", {"train": [20]})
    corrupt(tmp_path / "corpus/split=train/shard-00000.parquet", 2)
    arrays, bad = decoder(corpus)(Piece(0, ((0, np.array([1, 9, 10, 12, 15])),)))
    assert arrays["row"].tolist() == numbers(arrays) == [1, 9, 15]
    assert [row.reason for row in bad] == ["corrupt_file"] * 2
    assert [row.source.rsplit("/", 1)[-1] for row in bad] == [
        "shard-00000.parquet row group 2 row 0",
        "shard-00000.parquet row group 2 row 2",
    ]


def test_an_image_that_does_not_decode_costs_its_row_and_is_named(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    corpus = write_corpus(tmp_path / "corpus", {"train": [20]})
    shard = tmp_path / "corpus/split=train/shard-00000.parquet"
    rows = pq.read_table(shard, partitioning=None).to_pylist()
    rows[7]["image"], rows[8]["image"] = b"no picture", png(8, size=64)[:80]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCHEMA), shard, row_group_size=5)
    arrays, bad = decoder(corpus)(Piece(0, ((0, np.arange(5, 11)),)))
    assert arrays["row"].tolist() == numbers(arrays) == [5, 6, 9, 10]
    assert len(arrays["tokens"]) == len(arrays["keys"]) == 4
    assert [(row.id, row.reason) for row in bad] == [("row-7", "unreadable"), ("row-8", "truncated")]
    assert bad[0].source.endswith("shard-00000.parquet row group 1 row 2")


def test_row_groups_are_read_once_while_they_fit(images: Corpus) -> None:
    large, small = decoder(images), decoder(images, cache=1)
    for step in range(4):
        for decoding in (large, small):
            decode(decoding, range(step, ROWS, 4), step)
    assert large._cache.reads == len(images.row_groups("train"))
    assert small._cache.reads > 3 * len(images.row_groups("train"))  # the last group of a step may be the next's first
    assert len(small._cache._groups) == 1


def test_columns_for_planning(pairs: Corpus) -> None:
    groups = [pairs.row_groups("train")[i] for i in (7, 2)]
    entry = CorpusEntry(query_prefix="query: query: ")
    read = ColumnReader(Member(entry, pairs.kind, pairs.row_groups("train"), pairs.image_limits), TOKENIZER)
    rows = [*range(35, 40), *range(10, 15)]
    assert read(groups, "text").tolist() == text_keys([f"text {n}" for n in rows]).tolist()
    assert read(groups, "query").tolist() == text_keys([f"query {n}" for n in rows]).tolist()
    assert read(groups, "concept").tolist() == keys_of([f"concept {n}" for n in rows]).tolist()
    assert read(groups, "id").tolist() == keys_of([f"row-{n}" for n in rows]).tolist()
    # The query with its prefix is longer than the text.
    lengths = [len(TOKENIZER([f"query: query: query {n}"])[0]) for n in rows]
    assert read(groups, "length").tolist() == lengths
    assert min(lengths) > len(TOKENIZER(["text 35"])[0])
    with pytest.raises(CorpusError, match="no column 'cluster'"):
        read(groups, "cluster")


def test_draws_are_uniform_and_a_rows_own() -> None:
    u = draws([3, 5], np.arange(20_000), 4)
    assert u.min() >= 0
    assert u.max() < 1
    assert u.mean(0) == pytest.approx(0.5, abs=4 * 12**-0.5 / 20_000**0.5)
    assert np.abs(np.corrcoef(u.T) - np.eye(4)).max() < 4 / 20_000**0.5
    assert np.array_equal(draws([3, 5], np.array([77]), 4)[0], u[77])
    assert not np.array_equal(draws([3, 6], np.arange(20_000), 4), u)
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 4 / 20_000**0.5


def test_each_augmentation_does_what_it_says() -> None:
    from PIL import Image, ImageOps

    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8))
    u = np.full(11, 0.5)
    assert augmented(picture, AugmentConfig(), 8, u) is picture
    assert augmented(picture, AugmentConfig(flip=0.6), 8, u) == ImageOps.mirror(picture)
    assert augmented(picture, AugmentConfig(flip=0.4), 8, u) == picture
    grey = np.asarray(augmented(picture, AugmentConfig(grey=1.0), 8, u))
    assert np.array_equal(grey[..., 0], grey[..., 1])
    # u = 1/2 is the middle of every range: a jitter that leaves the image, a centred square crop of half the area.
    assert augmented(picture, AugmentConfig(jitter=0.4), 8, u) == picture
    side = (0.5 * 600) ** 0.5
    box = ((30 - side) / 2, (20 - side) / 2, (30 + side) / 2, (20 + side) / 2)
    assert augmented(picture, AugmentConfig(crop=(0.5, 0.5)), 8, u) == picture.resize(
        (8, 8), Image.Resampling.BICUBIC, box=box
    )
    whole = augmented(picture, AugmentConfig(crop=(1.0, 1.0)), 8, np.zeros(11))
    assert whole.size == (8, 8)
    assert np.asarray(augmented(picture, AugmentConfig(blur=1.0), 8, u)).std() < np.asarray(picture).std() / 2
