"""Where corpora come from: the demo drawings, a folder of images, somebody's Parquet."""

import io
import json
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rayemb.config import ConfigError, from_mapping
from rayemb.data import CorpusConfig
from rayemb.data.sources import Columns, DemoSource, FolderSource, ParquetSource, RawRow, SourceError
from rayemb.data.sources.base import split_by_concept, uniform
from tests.data.corpora import png

# -- splits ----------------------------------------------------------------------------------------------------


@given(st.text(), st.integers(0, 2**32), st.floats(0, 0.5), st.floats(0, 0.49))
def test_a_split_is_a_function_of_concept_and_seed(concept: str, seed: int, test: float, val: float) -> None:
    split = split_by_concept(concept, seed, test, val)
    assert split == split_by_concept(concept, seed, test, val)
    position = uniform(concept, seed)
    assert 0 <= position < 1
    assert (split == "zero_shot") == (position < test)
    assert (split == "train") == (position >= test + val)


def test_splits_have_the_sizes_they_were_asked_for_and_depend_on_the_seed() -> None:
    splits = [split_by_concept(str(i), 0, 0.2, 0.1) for i in range(5000)]
    share = {name: count / 5000 for name, count in Counter(splits).items()}
    assert abs(share["zero_shot"] - 0.2) < 0.03
    assert abs(share["val"] - 0.1) < 0.03
    assert splits != [split_by_concept(str(i), 1, 0.2, 0.1) for i in range(5000)]


def test_the_source_is_chosen_by_name() -> None:
    assert isinstance(from_mapping(CorpusConfig, {"source": {"name": "folder", "uri": "x"}}).source, FolderSource)
    with pytest.raises(
        ConfigError, match="'demo', 'folder', 'parquet', 'webdataset', 'jsonl', 'csv', 'lance', 'datasets'"
    ):
        from_mapping(CorpusConfig, {"source": {"name": "laion"}})
    with pytest.raises(ConfigError, match="must be below 1"):
        from_mapping(CorpusConfig, {"test_fraction": 0.6, "val_fraction": 0.5})


# -- demo ------------------------------------------------------------------------------------------------------

Glyph = tuple[str, str, str, str]


def plan(source: DemoSource, seed: int) -> list[Glyph]:
    return [glyph for unit in source.units(seed) for glyph in unit]


@pytest.fixture(scope="module")
def demo() -> list[Glyph]:
    return plan(DemoSource(), 0)


def test_the_demo_has_its_pairs(demo: list[Glyph]) -> None:
    assert len(demo) >= 20_000
    assert len({(style, characters) for style, characters, _, _ in demo}) == len(demo)
    assert {split for *_, split in demo} == {"train", "val", "zero_shot", "style_held_out", "zero_shot_style"}


def test_no_zero_shot_concept_occurs_in_training(demo: list[Glyph]) -> None:
    concepts: dict[str, set[str]] = {}
    for _, _, concept, split in demo:
        concepts.setdefault(split, set()).add(concept)
    for split in ("zero_shot", "zero_shot_style"):
        assert not concepts[split] & concepts["train"]
        assert not concepts[split] & concepts["val"]
    assert not concepts["val"] & concepts["train"]
    assert concepts["style_held_out"] <= concepts["train"]


def test_training_never_sees_the_held_out_style(demo: list[Glyph]) -> None:
    styles: dict[str, set[str]] = {}
    for style, _, _, split in demo:
        styles.setdefault(split, set()).add(style)
    assert styles["style_held_out"] == styles["zero_shot_style"] == {"remix"}
    for split in ("train", "val", "zero_shot"):
        assert "remix" not in styles[split]
    assert len(styles["train"]) == 10


def test_the_demo_is_a_function_of_its_seed(demo: list[Glyph]) -> None:
    assert plan(DemoSource(), 0) == demo
    assert plan(DemoSource(), 1) != demo


def test_units_hold_one_split_and_a_bounded_number_of_rows() -> None:
    for unit in DemoSource(rows_per_unit=500).units(0):
        assert len({split for *_, split in unit}) == 1
        assert 1 <= len(unit) <= 500
        assert len(pickle.dumps(unit)) < 100_000


def test_the_limit_keeps_whole_concepts_and_the_rules(demo: list[Glyph]) -> None:
    glyphs = plan(DemoSource(limit=300), 0)
    assert 250 <= len(glyphs) <= 600
    count = Counter(concept for _, _, concept, _ in demo)
    assert all(n >= count[concept] for concept, n in Counter(c for _, _, c, _ in glyphs).items())
    train = {concept for *_, concept, split in glyphs if split == "train"}
    assert not train & {concept for *_, concept, split in glyphs if split.startswith("zero_shot")}


def test_the_drawings_are_pictures_with_their_names() -> None:
    source = DemoSource(limit=200, image_size=32)
    drawn: list[RawRow] = [row for unit in source.units(0) for row in source.read(unit)]
    assert len(drawn) > 150
    for row in drawn:
        assert row.image is not None
        pixels = np.asarray(Image.open(io.BytesIO(row.image)))
        assert pixels.shape == (32, 32, 3)
        assert pixels.min() < 200  # something is drawn
        assert row.text
        assert row.concept == row.text
        assert row.license
        assert row.split
    assert len({row.id for row in drawn}) == len(drawn)
    emoji = [row for row in drawn if row.style == "openmoji"]
    assert emoji
    assert all(len(row.texts) > 5 and row.texts[0] == row.text for row in emoji)
    again = [row for unit in source.units(0) for row in source.read(unit)]
    assert again == drawn


def test_an_unknown_style_lists_the_known_ones() -> None:
    with pytest.raises(SourceError, match="codicon") as caught:
        DemoSource(held_out_style="comic").units(0)
    assert caught.value.where == "corpus.source.held_out_style"


# -- folder ----------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "my pictures"
    for name in ("red_heart.png", "deep/er/blue-star.2.PNG", "a.jpeg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(png(len(name)))
    (root / "notes.txt").write_text("no image")
    return root


def read_all(source: FolderSource | ParquetSource, seed: int = 0) -> dict[str, RawRow]:
    rows = [row for unit in source.units(seed) for row in source.read(unit)]
    assert len({row.source for row in rows}) == len(rows)
    return {row.id: row for row in rows}


@pytest.mark.parametrize("form", ["path", "uri", "trailing slash"])
def test_captions_from_file_names(folder: Path, form: str) -> None:
    uri = {"path": str(folder), "uri": folder.as_uri(), "trailing slash": f"{folder}/"}[form]
    rows = read_all(FolderSource(uri=uri))
    assert {id_: row.text for id_, row in rows.items()} == {
        "red_heart.png": "red heart",
        "deep/er/blue-star.2.PNG": "blue star 2",
        "a.jpeg": "a",
    }
    assert rows["a.jpeg"].image == (folder / "a.jpeg").read_bytes()


CAPTIONS: list[tuple[str | None, str | None]] = [
    ("red_heart.png", 'a "red" heart, über alles'),
    ("deep/er/blue-star.2.PNG", "two\nlines"),
    ("a.jpeg", "007"),
    ("none.png", "there is no such file"),
    ("../outside.png", "climbs out"),
    ("a.jpeg", None),
    (None, "no file"),
]


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_captions_from_a_table(folder: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "outside.png").write_bytes(png(1))
    table = tmp_path / f"captions.{kind}"
    if kind == "csv":
        cells = [",".join('"{}"'.format((cell or "").replace('"', '""')) for cell in pair) for pair in CAPTIONS]
        table.write_text("\ufeffphoto,words\n" + "\n".join(cells), encoding="utf-8")
    else:
        table.write_text("\n".join(json.dumps({"photo": file, "words": text}) for file, text in CAPTIONS))
    source = FolderSource(uri=str(folder), captions=str(table), file_column="photo", text_column="words")
    rows = [row for unit in source.units(0) for row in source.read(unit)]
    found = sorted((row.id, row.text or "") for row in rows)
    assert found == sorted((file or "", text or "") for file, text in CAPTIONS)
    images = {row.id: row.image for row in rows}
    assert images["a.jpeg"] == (folder / "a.jpeg").read_bytes()
    assert images["none.png"] is None
    assert images["../outside.png"] is None  # never read
    assert images[""] is None


def test_the_order_is_a_function_of_the_seed(tmp_path: Path) -> None:
    for n in range(30):
        (tmp_path / f"{n}.png").write_bytes(b"x")
    source = FolderSource(uri=str(tmp_path), rows_per_unit=7)
    units = source.units(3)
    assert [len(unit) for unit in units] == [7, 7, 7, 7, 2]
    assert source.units(3) == units
    assert source.units(4) != units
    assert sorted(pair for unit in source.units(4) for pair in unit) == sorted(pair for unit in units for pair in unit)


def test_a_folder_that_is_not_there_or_empty(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no such folder"):
        FolderSource(uri=str(tmp_path / "none")).units(0)
    with pytest.raises(SourceError, match=r"no images below.*\.png"):
        FolderSource(uri=str(tmp_path)).units(0)


def test_captions_without_the_column_list_what_there_is(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "captions.csv").write_text("image,caption\na.jpeg,x\n")
    source = FolderSource(uri=str(folder), captions=str(tmp_path / "captions.csv"), file_column="image")
    with pytest.raises(SourceError, match="no column 'text'") as caught:
        source.units(0)
    assert caught.value.where == "corpus.source.text_column"
    assert "image, caption" in caught.value.fix


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", b"{"), ("a.csv", b""), ("a.csv", b"file,text\na,b,c\n")])
def test_captions_that_cannot_be_read(folder: Path, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=r"corpus\.source\.captions=.*cannot read it"):
        FolderSource(uri=str(folder), captions=str(tmp_path / name)).units(0)
    with pytest.raises(SourceError, match="cannot read it"):
        FolderSource(uri=str(folder), captions=str(tmp_path / "none.csv")).units(0)


# -- parquet ---------------------------------------------------------------------------------------------------


def table(**columns: Any) -> pa.Table:
    base = {"id": ["a", "b", "c"], "image": [png(0), png(1), png(2)], "text": ["one", "two", "three"]}
    return pa.table({**base, **columns})


def test_rows_come_with_their_place(tmp_path: Path) -> None:
    pq.write_table(table(), tmp_path / "one.parquet", row_group_size=2)
    source = ParquetSource(uri=str(tmp_path))
    assert len(source.units(0)) == 2
    rows = read_all(source)
    assert rows["c"] == RawRow(id="c", image=png(2), text="three", source=f"{tmp_path}/one.parquet row 2")


def test_one_file_a_folder_and_a_folder_that_is_called_like_a_file(tmp_path: Path) -> None:
    spark = tmp_path / "data.parquet"
    spark.mkdir()
    pq.write_table(table(), spark / "part-0.parquet")
    pq.write_table(table(id=["d", "e", "f"]), spark / "part-1.parquet")
    assert set(read_all(ParquetSource(uri=str(spark / "part-0.parquet")))) == {"a", "b", "c"}
    assert set(read_all(ParquetSource(uri=str(spark)))) == set("abcdef")
    assert set(read_all(ParquetSource(uri=spark.as_uri()))) == set("abcdef")


def test_names_with_an_underscore_are_no_data(tmp_path: Path) -> None:
    pq.write_table(table(), tmp_path / "part.parquet")
    for name in ("_quarantine/x.parquet", ".hidden/x.parquet", "_x.parquet"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        pq.write_table(pa.table({"other": [1]}), tmp_path / name)
    assert set(read_all(ParquetSource(uri=str(tmp_path)))) == {"a", "b", "c"}


def test_a_column_mapping(tmp_path: Path) -> None:
    renamed = table(kind=["x", None, "x"], part=["train", "val", None], by=[1, 2, 3]).rename_columns(
        ["key", "picture", "caption", "kind", "part", "by"]
    )
    pq.write_table(renamed, tmp_path / "x.parquet")
    columns = Columns(id="key", image="picture", text="caption", concept="kind", split="part", license="by")
    rows = read_all(ParquetSource(uri=str(tmp_path), columns=columns))
    assert [(rows[k].concept, rows[k].split, rows[k].license) for k in "abc"] == [
        ("x", "train", "1"),
        ("", "val", "2"),
        ("x", "", "3"),
    ]


def test_images_as_structs_and_ids_as_numbers(tmp_path: Path) -> None:
    structs = [{"bytes": png(n), "path": f"{n}.png"} for n in range(2)]
    pq.write_table(table(id=[1, 2, 3], image=[*structs, None]), tmp_path / "x.parquet")
    rows = read_all(ParquetSource(uri=str(tmp_path)))
    assert [rows[k].image for k in "123"] == [png(0), png(1), None]


def test_nulls_are_left_to_the_builder(tmp_path: Path) -> None:
    pq.write_table(table(id=["a", "b", None], text=["x", None, "z"]), tmp_path / "x.parquet")
    rows = read_all(ParquetSource(uri=str(tmp_path)))
    assert rows["b"].text is None
    assert rows[""].text == "z"


@pytest.mark.parametrize("key", ["id", "image", "text"])
def test_a_missing_column_names_the_key_and_lists_what_there_is(tmp_path: Path, key: str) -> None:
    pq.write_table(table().drop_columns([key]).append_column("other", pa.array([1, 2, 3])), tmp_path / "x.parquet")
    with pytest.raises(SourceError, match=f"no column '{key}'") as caught:
        ParquetSource(uri=str(tmp_path)).units(0)
    assert caught.value.where == f"corpus.source.columns.{key}"
    assert "other" in caught.value.fix


@pytest.mark.parametrize(
    ("key", "values", "wanted"),
    [
        ("image", [1, 2, 3], "binary, a struct with `bytes`, or text"),
        ("image", [{"x": "x"}] * 3, "binary, a struct with `bytes`, or text"),
        ("text", [1, 2, 3], "text"),
        ("text", [["a"], ["b"], ["c"]], "text"),
        ("id", [0.5, 1.5, 2.5], "text or integer"),
    ],
)
def test_a_column_of_the_wrong_type_names_the_key(tmp_path: Path, key: str, values: list[Any], wanted: str) -> None:
    pq.write_table(table(**{key: values}), tmp_path / "x.parquet")
    with pytest.raises(SourceError, match=f"expected {wanted}") as caught:
        ParquetSource(uri=str(tmp_path)).units(0)
    assert caught.value.where == f"corpus.source.columns.{key}"


def test_every_file_is_checked_before_work_starts(tmp_path: Path) -> None:
    pq.write_table(table(), tmp_path / "a.parquet")
    pq.write_table(table().drop_columns(["text"]), tmp_path / "b.parquet")
    with pytest.raises(SourceError, match=r"b\.parquet has no column 'text'"):
        ParquetSource(uri=str(tmp_path)).units(0)


def test_a_place_without_parquet(tmp_path: Path) -> None:
    for uri in (tmp_path, tmp_path / "none", tmp_path / "none.parquet"):
        with pytest.raises(SourceError, match=r"there are no files that end in \.parquet"):
            ParquetSource(uri=str(uri)).units(0)
