"""Reading a corpus: what is on disk is what the manifest says, or it is refused by name."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayemb.data import Corpus, CorpusError
from rayemb.data.corpus import read_row_group
from rayemb.data.keys import keys_of
from tests.data.corpora import corrupt, png, rows, write_corpus


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return write_corpus(tmp_path / "corpus", {"train": [12, 7], "val": [3]})


def shard(corpus: Corpus, number: int = 0, split: str = "train") -> Path:
    return Path(corpus.uri) / f"split={split}" / f"shard-{number:05d}.parquet"


def test_counts_and_row_groups(corpus: Corpus) -> None:
    assert corpus.splits == {"train": 19, "val": 3}
    assert corpus.rows("train") == 19
    groups = corpus.row_groups("train")
    assert [(Path(g.file).name, g.index, g.rows) for g in groups] == [
        ("shard-00000.parquet", 0, 5),
        ("shard-00000.parquet", 1, 5),
        ("shard-00000.parquet", 2, 2),
        ("shard-00001.parquet", 0, 5),
        ("shard-00001.parquet", 1, 2),
    ]


def test_row_groups_in_order_are_the_split(corpus: Corpus) -> None:
    tables = [read_row_group(group, ["id", "image"]) for group in corpus.row_groups("train")]
    table = pa.concat_tables(tables)
    assert table["id"].to_pylist() == [f"row-{n}" for n in range(19)] == corpus.column("train", "id")
    assert table["image"].to_pylist() == [png(n) for n in range(19)]
    assert corpus.column("val", "text") == ["text 19", "text 20", "text 21"]


def test_an_unknown_split_lists_the_known_ones(corpus: Corpus) -> None:
    for read in (corpus.rows, corpus.row_groups):
        with pytest.raises(CorpusError, match="there is no split 'test'") as caught:
            read("test")
        assert "train, val" in caught.value.fix


def test_a_place_without_a_corpus(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no corpus here"):
        Corpus.open(str(tmp_path))


def test_a_manifest_that_is_cut_short_is_not_taken_for_an_empty_place(corpus: Corpus) -> None:
    path = Path(corpus.uri) / "_corpus.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(CorpusError, match=r"corpus\.json: not a JSON document"):
        Corpus.open(corpus.uri)


@pytest.mark.parametrize("document", [[], {}, {"format": 99}])
def test_a_manifest_of_another_format(corpus: Corpus, document: object) -> None:
    (Path(corpus.uri) / "_corpus.json").write_text(json.dumps(document))
    with pytest.raises(CorpusError, match="not of format 2"):
        Corpus.open(corpus.uri)


def test_a_whole_corpus_verifies(corpus: Corpus) -> None:
    corpus.verify()


@pytest.mark.parametrize("number", [0, 1])
def test_verify_finds_a_flipped_byte(corpus: Corpus, number: int) -> None:
    content = bytearray(shard(corpus, number).read_bytes())
    content[len(content) // 2] ^= 1
    shard(corpus, number).write_bytes(content)
    with pytest.raises(CorpusError, match="checksum of the shard differs") as caught:
        corpus.verify()
    assert caught.value.where == str(shard(corpus, number))


def test_reading_finds_a_flipped_byte_by_the_pages_checksum(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus", {"train": [8]}, group_rows=4)
    groups = corpus.row_groups("train")
    corrupt(shard(corpus), 1)
    read_row_group(groups[0], ["id", "image"])  # the damage is in the other one
    with pytest.raises(CorpusError, match="row group 1 is corrupt") as caught:
        read_row_group(groups[1], ["id", "image"])
    assert caught.value.where == str(shard(corpus))


def test_a_missing_shard_is_named(corpus: Corpus) -> None:
    groups = corpus.row_groups("train")
    shard(corpus, 1).unlink()
    for read in (corpus.verify, lambda: corpus.row_groups("train"), lambda: read_row_group(groups[-1], ["id"])):
        with pytest.raises(CorpusError, match="the shard is missing") as caught:
            read()
        assert caught.value.where == str(shard(corpus, 1))


def test_a_truncated_shard_is_named(corpus: Corpus) -> None:
    shard(corpus).write_bytes(shard(corpus).read_bytes()[:-20])
    with pytest.raises(CorpusError, match="not a readable Parquet file") as caught:
        corpus.row_groups("train")
    assert caught.value.where == str(shard(corpus))


def test_a_shard_of_another_schema_is_named(corpus: Corpus) -> None:
    pq.write_table(pa.table({"id": ["a"]}), shard(corpus))
    with pytest.raises(CorpusError, match=r"has the schema \['id'\]"):
        corpus.row_groups("train")


def test_a_shard_with_other_rows_is_named(corpus: Corpus) -> None:
    schema = pq.read_schema(shard(corpus))
    pq.write_table(pa.Table.from_pylist(rows(0, 3), schema), shard(corpus))
    with pytest.raises(CorpusError, match="has 3 rows, its manifest says 12"):
        corpus.row_groups("train")


@given(st.lists(st.text(), max_size=20))
def test_keys_are_equal_where_concepts_are(concepts: list[str]) -> None:
    ids = keys_of(concepts)
    assert ids.dtype == np.int64
    assert len(ids) == len(concepts)
    assert (ids >= 0).all()
    assert len(set(ids.tolist())) == len(set(concepts))


def test_keys_are_the_same_in_every_process() -> None:
    # Fixed numbers: a model's training must not depend on Python's hash seed.
    expected = int.from_bytes(hashlib.blake2b(b"cat", digest_size=8).digest(), "little") >> 1
    assert keys_of(["cat"]).tolist() == [expected]
