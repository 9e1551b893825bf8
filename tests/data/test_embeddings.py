"""The embeddings table: ranges and rows by offset, versions, and what is no such table."""

from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pytest

from rayemb.data import EmbeddingsError, EmbeddingsTable
from rayemb.data.embeddings import embeddings_schema

DIM, ROWS = 4, 23
VECTORS = np.random.default_rng(0).standard_normal((ROWS, DIM)).astype(np.float32)


def write(uri: Path, vectors: Any = VECTORS, digest: str = "d1", images: bool = False, mode: str = "create") -> None:
    schema = embeddings_schema([pa.field("text", pa.string())], DIM, digest, images=images)
    columns = {
        "id": [f"row-{n}" for n in range(len(vectors))],
        "vector": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), DIM),
        "text": [f"text {n}" for n in range(len(vectors))],
        **({"image": [b"x"] * len(vectors)} if images else {}),
    }
    table = pa.table({name: columns[name] for name in schema.names}, schema=schema)
    lance.write_dataset(table, str(uri), mode=mode, max_rows_per_file=7)


@pytest.fixture
def table(tmp_path: Path) -> EmbeddingsTable:
    write(tmp_path / "table.lance")
    return EmbeddingsTable.open(str(tmp_path / "table.lance"))


def test_it_names_its_model(table: EmbeddingsTable, tmp_path: Path) -> None:
    assert (table.model_digest, table.dim, table.rows, table.version) == ("d1", DIM, ROWS, 1)
    assert table.uri == str(tmp_path / "table.lance")
    assert table.payload_columns == ["text"]
    assert not table.has_images


@pytest.mark.parametrize(("start", "stop"), [(0, ROWS), (0, 1), (5, 9), (6, 8), (22, 23), (3, 3)])
def test_ranges(table: EmbeddingsTable, start: int, stop: int) -> None:
    vectors = table.vectors(start, stop)
    assert vectors.shape == (stop - start, DIM)
    assert np.array_equal(vectors, VECTORS[start:stop])
    assert table.columns(start, stop, ["id"])["id"].to_pylist() == [f"row-{n}" for n in range(start, stop)]


@pytest.mark.parametrize("offsets", [[], [0], [22, 0, 7], [5, 5, 5], [8, 2, 8]])
def test_rows_by_offset_keep_order_and_repeats(table: EmbeddingsTable, offsets: list[int]) -> None:
    rows = table.take(offsets, ["id", "text"])
    assert rows == [{"id": f"row-{n}", "text": f"text {n}"} for n in offsets]


def test_images_are_not_payload(tmp_path: Path) -> None:
    write(tmp_path / "t", images=True)
    table = EmbeddingsTable.open(str(tmp_path / "t"))
    assert table.has_images
    assert table.payload_columns == ["text"]


def test_versions(tmp_path: Path) -> None:
    write(tmp_path / "t")
    write(tmp_path / "t", vectors=VECTORS[:5], digest="d2", mode="overwrite")
    newest, first = EmbeddingsTable.open(str(tmp_path / "t")), EmbeddingsTable.open(str(tmp_path / "t"), 1)
    assert (newest.version, newest.rows, newest.model_digest) == (2, 5, "d2")
    assert (first.version, first.rows, first.model_digest) == (1, ROWS, "d1")
    assert np.array_equal(first.vectors(0, ROWS), VECTORS)


def test_a_version_that_is_not_there(table: EmbeddingsTable) -> None:
    with pytest.raises(EmbeddingsError, match="no version 9") as caught:
        EmbeddingsTable.open(table.uri, 9)
    assert caught.value.where == table.uri


def test_a_place_without_a_table(tmp_path: Path) -> None:
    for place in (tmp_path / "none", tmp_path):
        with pytest.raises(EmbeddingsError, match="no such embeddings table") as caught:
            EmbeddingsTable.open(str(place))
        assert caught.value.where == str(place)


def test_a_table_that_rayemb_did_not_write(tmp_path: Path) -> None:
    lance.write_dataset(pa.table({"id": ["a"]}), str(tmp_path / "t"))
    with pytest.raises(EmbeddingsError, match="does not name its model"):
        EmbeddingsTable.open(str(tmp_path / "t"))


def test_a_broken_table_is_not_taken_for_an_empty_place(table: EmbeddingsTable) -> None:
    for manifest in (Path(table.uri) / "_versions").glob("*.manifest"):
        manifest.write_bytes(manifest.read_bytes()[:30])
    with pytest.raises(EmbeddingsError, match="cannot be opened") as caught:
        EmbeddingsTable.open(table.uri)
    assert caught.value.where == table.uri
