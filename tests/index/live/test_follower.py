"""What a live index answers, against an index built from scratch of the rows that are left."""

from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from rayemb.index import Effort, Fusion, Index, IndexConfig, LiveConfig, Query, QueryError, UpdatesFullError
from rayemb.index.faiss_index import load_index, probed_lists
from rayemb.index.live import delta
from rayemb.index.shard import verified_path
from tests.index.tables import build_here, exact_vectors, random_vectors, write_table

ROWS, DIM = 60, 8
VECTORS = exact_vectors(4000, DIM, seed=1)
QUERIES = exact_vectors(6, DIM, seed=2)
FILTERS: list[dict[str, Any] | None] = [None, {"group": "g1"}, {"size": {"gte": 3}}, {"group": None}]


def payload_of(number: int) -> dict[str, Any]:
    return {"group": f"g{number % 3}" if number % 5 else None, "size": number % 7}


class Rows:
    """The rows that should be there, in the order of a rebuilt table: of the base first, then as last written."""

    def __init__(self, count: int) -> None:
        self.rows = {f"item-{i}": (VECTORS[i], payload_of(i)) for i in range(count)}

    def upsert(self, row_id: str, number: int) -> None:
        self.rows.pop(row_id, None)
        self.rows[row_id] = (VECTORS[number], payload_of(number))

    def write(self, folder: Path) -> str:
        payload = {name: [row[1][name] for row in self.rows.values()] for name in ("group", "size")}
        vectors = np.stack([vector for vector, _ in self.rows.values()])
        return write_table(folder, vectors, payload, ids=list(self.rows))


def found(index: Index, k: int, filter: dict[str, Any] | None) -> list[list[tuple[str, float]]]:
    hits = index.search(QUERIES, k, filter)
    ids = index.ids(hits.keys).to_pylist()
    pairs = list(zip(ids, hits.scores.reshape(-1).tolist(), strict=True))
    return [[pair for pair in pairs[i : i + k] if pair[0] is not None] for i in range(0, len(pairs), k)]


@pytest.mark.parametrize("factory", ["Flat", "SQ8,RFlat", "HNSW8"])
@settings(max_examples=12)
@given(data=st.data())
def test_updates_and_a_rebuilt_index_answer_alike_ties_included(
    factory: str, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("live")
    rows = Rows(ROWS)
    config = IndexConfig(factory=factory, shards=2, by=data.draw(st.sampled_from(["rows", "hash"])))
    effort = Effort(ef_search=400, rerank=100)
    manifest = build_here(rows.write(folder / "e"), folder / "i", config.model_copy(update={"ef_search": 400}))
    assert manifest.factory == factory
    steps = data.draw(st.lists(st.sampled_from(["upsert", "delete", "search"]), min_size=1, max_size=20))
    fresh = iter(range(ROWS, len(VECTORS)))
    ids = st.sampled_from([f"item-{i}" for i in range(ROWS + 15)])
    uri = str(folder / "i")
    with patch.object(delta, "_SEALED", 4), Index.open(uri, live=True) as index, Index.open(uri, live=True) as other:
        index.search(QUERIES, 2)
        for step in steps:
            if step == "search":
                found(index, 3, data.draw(st.sampled_from(FILTERS)))
            elif step == "delete":
                gone = data.draw(st.lists(ids, min_size=1, max_size=20))
                index.delete(gone)
                for row_id in gone:
                    rows.rows.pop(row_id, None)
            else:
                some = data.draw(st.lists(ids, min_size=1, max_size=6))
                numbers = [next(fresh) for _ in some]
                index.upsert(some, VECTORS[numbers], [payload_of(number) for number in numbers])
                for row_id, number in zip(some, numbers, strict=True):
                    rows.upsert(row_id, number)
        if not rows.rows:
            assert index.search(QUERIES, 3).keys.max() == -1
            return
        build_here(rows.write(folder / "e2"), folder / "i2", config.model_copy(update={"shards": 1}))
        other.refresh()
        with Index.open(str(folder / "i2")) as rebuilt:
            assert index.rows == other.rows == rebuilt.rows
            for filter in FILTERS:
                for k in (1, 7, ROWS + 40):
                    expected = rebuilt.search(QUERIES, k, filter, effort=effort)
                    scores = index.search(QUERIES, k, filter, effort=effort).scores
                    assert scores.tolist() == expected.scores.tolist()
                    if factory == "Flat":
                        assert found(index, k, filter) == found(rebuilt, k, filter) == found(other, k, filter)
            for row_id in ("item-3", "item-70"):
                key = index.key(row_id)
                assert (key is None) == (row_id not in rows.rows)
                if key is not None:
                    assert index.vectors([key])[0].tolist() == rows.rows[row_id][0].tolist()
                    assert index.payload([key]) == [{"id": row_id, **rows.rows[row_id][1]}]


def test_an_ivf_index_looks_into_the_same_lists_with_updates_as_without(tmp_path: Path) -> None:
    vectors = random_vectors(400, 16)
    manifest = build_here(
        write_table(tmp_path / "e", vectors), tmp_path / "i", IndexConfig(factory="IVF16,Flat", shards=2, nprobe=3)
    )
    queries, new = random_vectors(20, 16, seed=5), random_vectors(30, 16, seed=6)
    trained = load_index(verified_path(str(tmp_path / "i"), manifest.trained))
    lists = probed_lists(trained, vectors, 1)[:, 0]
    probed = probed_lists(trained, queries, 3)
    gone = np.random.default_rng(0).choice(400, 250, replace=False)
    for count in (5, 60, 250):
        with Index.open(str(tmp_path / "i"), live=True) as index:
            index.delete([f"item-{i}" for i in gone[:count]])
            index.upsert([f"new-{i}" for i in range(30)], new)
            hits = index.search(queries, 10)
            ids = np.array(index.ids(hits.keys).to_pylist()).reshape(20, 10)
            there = np.setdiff1d(np.arange(400), gone[:count])
            for row in range(20):
                seen = there[np.isin(lists[there], probed[row])]
                names = [f"item-{i}" for i in seen] + [f"new-{i}" for i in range(30)]
                scores = np.concatenate([vectors[seen], new]) @ queries[row]
                best = np.argsort(-scores, kind="stable")[:10]
                assert ids[row].tolist() == [names[i] for i in best]


def test_a_view_does_not_change_and_keys_stay_what_they_were(tmp_path: Path) -> None:
    build_here(Rows(ROWS).write(tmp_path / "e"), tmp_path / "i", IndexConfig(factory="Flat", shards=2))
    with Index.open(str(tmp_path / "i"), live=True) as index:
        assert (index.view().updates, index.rows) == (0, ROWS)
        before = index.view()
        first = index.upsert(["item-3", "new"], VECTORS[[100, 101]], [{"size": 1}, {}])
        middle, key = index.view(), index.key("item-3")
        assert (first, middle.updates, middle.rows) == (1, 1, ROWS + 1)
        index.delete(["item-3"])
        for view, there in ((before, 3), (middle, key), (index.view(), None)):
            assert view.key("item-3") == there
            assert (there in view.search(VECTORS[100:101], ROWS + 2).keys) == (there is not None)
        assert (before.key("new"), before.rows, index.rows) == (None, ROWS, ROWS)
        assert key is not None
        assert index.payload([key, 3]) == [
            {"id": "item-3", "group": None, "size": 1},
            {"id": "item-3", **payload_of(3)},
        ]
        assert index.query(VECTORS[100], Query(3)).updates == index.search(QUERIES, 1).updates == 2


def test_other_readers_see_a_write_when_they_ask_for_its_version(tmp_path: Path) -> None:
    uri = str(tmp_path / "i")
    build_here(Rows(ROWS).write(tmp_path / "e"), uri, IndexConfig(factory="Flat"))
    with Index.open(uri, live=True) as writer, Index.open(uri, live=True) as reader:
        version = writer.upsert(["new"], VECTORS[100:101])
        assert reader.key("new") is None
        assert reader.refresh(at_least=version) == version
        assert reader.key("new") == ROWS
        with pytest.raises(QueryError, match="no version 2; the newest is 1"):
            reader.refresh(at_least=2)


def test_the_same_write_twice_is_one_row(tmp_path: Path) -> None:
    uri = str(tmp_path / "i")
    build_here(Rows(ROWS).write(tmp_path / "e"), uri, IndexConfig(factory="Flat"))
    with Index.open(uri, live=True) as index:
        for _ in range(3):
            index.upsert(["a", "b", "a"], VECTORS[[100, 101, 102]], [{"size": 1}, {"size": 2}, {"size": 3}])
        assert index.rows == ROWS + 2
        key = index.key("a")
        assert key is not None
        assert index.payload([key])[0]["size"] == 3
        for _ in range(2):
            index.delete(["a", "nobody"])
        assert index.rows == ROWS + 1


def test_more_updates_than_may_wait_are_refused_and_reads_go_on(tmp_path: Path) -> None:
    uri = str(tmp_path / "i")
    build_here(Rows(ROWS).write(tmp_path / "e"), uri, IndexConfig(factory="Flat"))
    with Index.open(uri, live=LiveConfig(max_rows=3)) as index:
        index.upsert(["a", "b"], VECTORS[100:102])
        with pytest.raises(UpdatesFullError, match=r"2 updates wait to be compacted, and 3 may.*rayemb index compact"):
            index.upsert(["c", "d"], VECTORS[100:102])
        index.delete(["a"])
        assert (index.live.updates, index.rows) == (3, ROWS + 1)


def test_words_groups_and_examples_reach_new_rows(tmp_path: Path) -> None:
    texts = [f"red fox {i}" if i % 2 else f"blue bird {i}" for i in range(40)]
    table = write_table(tmp_path / "e", VECTORS[:40], {"text": texts, "group": [f"g{i % 4}" for i in range(40)]})
    build_here(table, tmp_path / "i", IndexConfig(factory="Flat", shards=2, words="text"))
    with Index.open(str(tmp_path / "i"), live=True) as index:
        index.upsert(["a", "b"], VECTORS[[50, 51]], [{"text": "a Red axolotl", "group": "new"}, {"text": None}])
        index.delete(["item-1"])

        def ids(keys: NDArray[np.int64]) -> list[str]:
            return [row["id"] for row in index.payload(keys[keys >= 0])]

        assert ids(index.words("axolotl", 5).keys) == ["a"]
        red = ids(index.words("red", 60).keys)
        assert set(red) == {"a"} | {f"item-{i}" for i in range(3, 40, 2)}
        assert ids(index.words("red", 60, {"group": "new"}).keys) == ["a"]
        assert ids(index.query(VECTORS[50], Query(1, fusion=Fusion("axolotl"))).keys) == ["a"]
        assert "a" in ids(index.query(VECTORS[50], Query(5, group_by="group")).keys)
        alike = ids(index.query(None, Query(45, positive=("a",))).keys)
        assert len(alike) == 40
        assert "a" not in alike
        assert "item-1" not in alike
        with pytest.raises(QueryError, match="no item 'item-1'"):
            index.query(None, Query(5, positive=("item-1",)))


def test_images_of_new_rows_are_read_from_the_log(tmp_path: Path) -> None:
    table = write_table(tmp_path / "e", VECTORS[:20], images=[b"old"] * 20)
    build_here(table, tmp_path / "i", IndexConfig(factory="Flat"))
    with Index.open(str(tmp_path / "i"), live=True) as index:
        index.upsert(["item-0", "a", "b"], VECTORS[50:53], images=[b"new", None, b"third"])
        index.delete(["item-2"])
        ids = ["item-0", "item-1", "item-2", "a", "b"]
        assert [index.image(each) for each in ids] == [b"new", b"old", None, None, b"third"]
    with Index.open(str(tmp_path / "i"), live=True) as again:
        assert [again.image(each) for each in ids] == [b"new", b"old", None, None, b"third"]
