"""What steps are given: rows that are alive, with the edits of earlier steps; the tables of verdicts they make."""

import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st

from rayemb.curate import Rows, base, together, verdicts
from rayemb.curate.base import VERDICT, Edited, apply_edits, is_alive, joined, runs
from rayemb.data.corpus import CorpusError
from rayemb.data.keys import keys_of, text_keys
from tests.curate.noise import corpus_of, pair


@given(st.lists(st.booleans(), max_size=50), st.data())
def test_bits_are_read_from_any_place(bits: list[bool], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(bits)))
    count = data.draw(st.integers(0, len(bits) - first))
    assert is_alive(np.packbits(np.array(bits, bool)), first, count).tolist() == bits[first : first + count]


@given(st.lists(st.integers(0, 3), max_size=12).map(sorted))
def test_runs_are_groups_of_equal_neighbours(values: list[int]) -> None:
    bounds = runs(np.array(values))
    parts = [values[a:b] for a, b in itertools.pairwise(bounds)]
    assert parts == [[value] * values.count(value) for value in sorted(set(values))]


def test_verdicts_fill_in_what_is_not_said() -> None:
    table = verdicts(row=[3, 1], reason="short", score=pa.chunked_array([[0.5], [1.5]]), new_texts=[["a"], None])
    assert table.schema == VERDICT
    assert table.to_pylist()[0] == {
        **dict.fromkeys(VERDICT.names),
        "row": 3,
        "drop": True,
        "reason": "short",
        "score": 0.5,
        "new_texts": ["a"],
    }
    assert verdicts(row=[]).num_rows == 0
    with pytest.raises(TypeError, match="no column"):
        verdicts(row=[1], colour="red")


@pytest.mark.parametrize("kind", ["image_text", "text"])
def test_edits_change_their_cells_and_the_keys_of_them(kind: str) -> None:
    keys = ("query_key", "text_key", "concept_key")
    columns = {"text": ["a", "b", "c"], "texts": [["a"]] * 3, "concept": ["x"] * 3, **{key: [1, 2, 3] for key in keys}}
    # Row 99 is another part's; rows 11 and 12 are ours.
    edits = verdicts(row=[11, 12, 99], drop=False, new_text=["B", None, "Z"], new_concept=[None, "y", "z"])
    table = apply_edits(pa.table(columns), np.array([10, 11, 12]), edits, kind)  # type: ignore[arg-type]
    assert table["text"].to_pylist() == ["a", "B", "c"]
    assert table["concept"].to_pylist() == ["x", "x", "y"]
    assert table["texts"].to_pylist() == [["a"]] * 3
    text, concept = int(text_keys(["B"])[0]), int(keys_of(["y"])[0])
    assert table["text_key"].to_pylist() == [1, text, 3]
    assert table["concept_key"].to_pylist() == [1, 2, concept]
    assert table["query_key"].to_pylist() == ([1, text, 3] if kind == "text" else [1, 2, 3])


@pytest.mark.usefixtures("ray_cluster")
def test_a_step_sees_what_is_alive_as_it_was_edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "READ_ROWS", 5)
    train = [pair(n, f"text {n}", score=n / 10) for n in range(23)]
    corpus = corpus_of(
        tmp_path / "a", {"train": train, "val": [pair(f"v{n}", "v") for n in range(4)]}, shard_rows=9, group_rows=2
    )
    mask = np.ones(27, bool)
    mask[[0, 7, 8, 9, 22, 24]] = False
    part = str(tmp_path / "part.parquet")
    pa.parquet.write_table(verdicts(row=[10, 12], drop=False, new_text=["new", None], new_score=[None, 9.0]), part)
    edited = Edited({"split=train/shard-00001.parquet": [part]})
    rows = Rows.of(corpus, ["train"], alive=ray.put(np.packbits(mask)), edited=edited)
    seen = {row["row"]: row for row in rows.dataset(["text", "split", "text_key", "score"]).take_all()}
    assert sorted(seen) == [n for n in range(23) if mask[n]]
    assert [seen[row]["text"] for row in (10, 12, 13)] == ["new", "text 12", "text 13"]
    assert seen[10]["text_key"] == text_keys(["new"])[0]
    assert seen[12]["score"] == 9.0
    assert {row["split"] for row in seen.values()} == {"train"}
    assert sorted(row["row"] for row in rows.only("val").dataset().take_all()) == [23, 25, 26]
    taken = rows.take([26, 3, 0, 3], ["id", "text"])
    assert taken == {26: {"id": "row-v3", "text": "v"}} | {n: {"id": f"row-{n}", "text": f"text {n}"} for n in (0, 3)}
    with pytest.raises(CorpusError, match="no split 'test'"):
        rows.only("test")


@pytest.mark.usefixtures("ray_cluster")
def test_equal_keys_stand_together_in_order_however_many_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "BUCKET_ROWS", 10)
    rng = np.random.default_rng(0)
    keys = rng.integers(-(2**62), 2**62, 30)[rng.integers(30, size=200)]
    tables = [pa.table({"key": keys[part], "row": part}) for part in np.array_split(rng.permutation(200), 12)]

    def judge(table: pa.Table) -> pa.Table:
        found, order = np.asarray(table["key"]), np.asarray(table["row"])
        assert (np.diff(found) >= 0).all()
        assert all((np.diff(order[found == key]) > 0).all() for key in set(found.tolist()))
        return pa.table({"key": np.unique(found), "count": np.unique(found, return_counts=True)[1]})

    counted = together(joined([ray.data.from_arrow(tables)]), "key", judge, rows=200).take_all()
    expected = dict(zip(*(part.tolist() for part in np.unique(keys, return_counts=True)), strict=True))
    assert len(counted) == len(expected)
    assert {row["key"]: row["count"] for row in counted} == expected
    empty = ray.data.from_arrow(pa.table({"key": pa.array([], pa.int64()), "row": pa.array([], pa.int64())}))
    assert together(joined([empty, empty]), "key", judge, rows=0).count() == 0
