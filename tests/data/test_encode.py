"""Rows to vectors in one process: order, batches over row groups, padding, and what cannot be encoded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from rayemb.data import CorpusError, EmbedConfig
from rayemb.data.encode import BadRows, RowEncoder, Span, by_length, encode_rows
from rayemb.models import ImageLimits, Model
from tests.data.corpora import corrupt, write_corpus
from tests.models.tiny import CONFIG, tiny_model

ROWS = 23


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("encode")
    write_corpus(root / "corpus", {"train": [13, 10]}, group_rows=4)
    tiny_model().save(str(root / "model"))
    return root


def shards(place: Path) -> list[str]:
    return [str(place / f"corpus/split=train/shard-{n:05d}.parquet") for n in range(2)]


def encoder(place: Path, what: Any = "image", model: str = "model", **config: Any) -> RowEncoder:
    settings = EmbedConfig(**{"batch_size": 6, **config})
    return RowEncoder([str(place / model)], settings, what=what, image_size=16, limits=ImageLimits())


@pytest.mark.parametrize("what", ["image", "text"])
@pytest.mark.parametrize("cpus", [1.0, 3.0])
def test_batches_go_over_row_groups_and_files(place: Path, what: str, cpus: float) -> None:
    first, second = shards(place)
    bad: list[BadRows] = []
    spans = [Span(first, 1, 4, 9), Span(second, 0, 3, 10)]  # without the first row group: 4 .. 22
    tables = list(encoder(place, what, cpus_per_worker=cpus).encode(spans, ["id", what], bad.append))
    if what == "image":
        assert [len(table) for table in tables] == [6, 6, 6, 1]
    table = pa.concat_tables(tables)
    assert table.column_names == ["id", what, "vector"]
    assert table["id"].to_pylist() == [f"row-{n}" for n in range(4, ROWS)]
    model = Model.load(str(place / "model"))
    values = table[what].to_pylist()
    expected = model.embed_images(values) if what == "image" else model.embed_texts(values)
    np.testing.assert_allclose(np.array(table["vector"].to_pylist()), expected, atol=2e-6)
    assert not bad


def test_a_vector_that_is_not_finite_is_set_aside(place: Path) -> None:
    model = tiny_model()
    # Byte-level tokens, and no word with a digit among those that it learned from: "9" is a token of its own.
    nine = int(model.tokenizer(["text 9"])[0][-1])
    model.network.text.tokens.weight.data[nine] = float("nan")
    model.save(str(place / "poisoned"))
    bad: list[BadRows] = []
    first, second = shards(place)
    spans = [Span(first, 0, 4, 13), Span(second, 0, 3, 10)]
    table = pa.concat_tables(encoder(place, "text", "poisoned").encode(spans, ["id"], bad.append))
    assert table["id"].to_pylist() == [f"row-{n}" for n in range(ROWS) if n not in (9, 19)]
    assert np.isfinite(np.array(table["vector"].to_pylist())).all()
    assert bad == [
        BadRows(first, 2, 1, 1, "row-9", "not_finite", "its vector is not finite"),
        BadRows(second, 1, 2, 1, "row-19", "not_finite", "its vector is not finite"),
    ]


def test_damage_is_set_aside_and_other_trouble_is_raised(place: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", {"train": [8, 8]}, group_rows=4)
    first, second = shards(tmp_path)
    corrupt(Path(first), 0)
    Path(second).write_bytes(Path(second).read_bytes()[:200])
    bad: list[BadRows] = []
    spans = [Span(first, 0, 2, 8), Span(second, 0, 2, 8)]
    table = pa.concat_tables(encoder(place).encode(spans, ["id"], bad.append))
    assert table["id"].to_pylist() == ["row-4", "row-5", "row-6", "row-7"]
    assert [(each.source, each.row_group, each.rows, each.reason) for each in bad] == [
        (first, 0, 4, "corrupt_row_group"),
        (second, None, 8, "corrupt_file"),
    ]
    Path(second).unlink()
    with pytest.raises(CorpusError, match="the shard is missing"):
        list(encoder(place).encode(spans, ["id"], bad.append))


def failing_on(*rows: int) -> Callable[[list[int]], NDArray[np.float32]]:
    def encode(inputs: list[int]) -> NDArray[np.float32]:
        if found := [each for each in inputs if each in rows]:
            raise RuntimeError(f"cannot take {found[0]}")
        return np.array([[each, each + 0.5] for each in inputs], np.float32)

    return encode


@pytest.mark.parametrize("bad", [(), (0,), (6,), (2, 3), (0, 1, 2, 3, 4, 5)])
def test_the_rows_that_an_encoder_refuses_are_found(bad: tuple[int, ...]) -> None:
    vectors, refused = encode_rows(failing_on(*bad), list(range(7)))
    assert set(refused) == set(bad)
    for row in range(7):
        if row in bad:
            assert refused[row] == ("not_encodable", f"the encoder refuses it (cannot take {row})")
        else:
            assert vectors[row].tolist() == [row, row + 0.5]


def test_an_encoder_that_refuses_everything_is_at_fault_itself() -> None:
    with pytest.raises(RuntimeError, match="cannot take 0"):
        encode_rows(failing_on(*range(5)), list(range(5)))
    assert set(encode_rows(failing_on(0), [0])[1]) == {0}


@given(st.lists(st.text(max_size=30), max_size=40))
def test_every_text_has_one_place_in_the_order_of_length(texts: list[str]) -> None:
    order = by_length(texts)
    assert sorted(order.tolist()) == list(range(len(texts)))
    assert [len(texts[i]) for i in order] == sorted(len(text) for text in texts)


def test_sorted_texts_need_little_padding() -> None:
    tokenizer = tiny_model().tokenizer
    lengths = np.random.default_rng(0).integers(1, 9, 256)
    texts = ["star " * n for n in lengths]

    def padding(ordered: list[str]) -> float:
        batches = [tokenizer(ordered[at : at + 16]) for at in range(0, len(ordered), 16)]
        return 1 - sum((ids != -1).sum() for ids in batches) / sum(ids.size for ids in batches)

    assert tokenizer.max_length == CONFIG.tokenizer.max_length
    assert padding([texts[i] for i in by_length(texts)]) < 0.1 * padding(texts)
