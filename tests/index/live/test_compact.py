"""Compaction: nothing is lost or doubled, whatever is written meanwhile and wherever it stops."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pytest

from rayemb.data.embeddings import EmbeddingsTable
from rayemb.index import Index, IndexArtefactError, IndexConfig, Manifest, compact_index, load_manifest
from rayemb.index.live import compact
from rayemb.index.live.compact import fold
from rayemb.index.live.log import UpdateLog, log_uri, updates_in
from rayemb.index.manifest import publish_manifest
from tests.index.tables import DIGEST, build_here, exact_vectors, random_vectors, write_table

VECTORS = exact_vectors(300, seed=3)
CONFIG = IndexConfig(factory="Flat", shards=2, recall_queries=0)
Answer = list[tuple[Any, float]]


def start(folder: Path, config: IndexConfig = CONFIG, rows: int = 40) -> str:
    table = write_table(folder / "e.lance", VECTORS[:rows], {"size": list(range(rows))})
    build_here(table, folder / "i", config)
    return str(folder / "i")


def rebuild(index_uri: str, table: EmbeddingsTable) -> Manifest:
    """What `build_index` publishes of that table, without a cluster."""
    manifest = build_here(table.uri, index_uri, CONFIG)
    manifest = manifest.model_copy(update={"updates": updates_in(table)})
    return publish_manifest(index_uri, manifest)


def answers(index: Index, k: int = 60) -> Answer:
    hits = index.search(VECTORS[:5], k)
    return list(zip(index.ids(hits.keys).to_pylist(), hits.scores.reshape(-1).tolist(), strict=True))


def write_some(index: Index) -> None:
    index.upsert(["item-3", "new-1", "new-2"], VECTORS[100:103], [{"size": 100}, {"size": 101}, {}])
    index.delete(["item-5", "new-1", "nobody"])
    index.upsert(["new-3", "item-5"], VECTORS[103:105], [{"size": 103}, {"size": 104}])
    index.delete(["item-9"])


def test_a_folded_table_answers_as_table_and_log_did(tmp_path: Path) -> None:
    uri = start(tmp_path)
    with Index.open(uri, live=True) as index:
        write_some(index)
        before, ids = answers(index), ["item-5", "item-9", "new-1", "new-2"]
        found = [index.key(each) is not None for each in ids]
    table = fold(EmbeddingsTable.open(str(tmp_path / "e.lance")))
    assert (table.rows, updates_in(table), table.model_digest) == (41, 4, DIGEST)
    manifest = rebuild(uri, table)
    with Index.open(uri, live=True) as index:
        assert (index.live.updates, index.view().updates, index.rows) == (0, 4, 41)
        assert answers(index) == before
        assert [index.key(each) is not None for each in ids] == found == [True, False, False, True]
        index.upsert(["later"], VECTORS[110:111])
        assert index.view().updates == 5
    again = fold(table)
    assert again.rows == 42
    assert manifest.updates == 4


@pytest.mark.parametrize("stops_at", [0, 1, 2])
def test_a_fold_that_stopped_anywhere_leaves_readers_and_the_next_fold_right(
    stops_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = start(tmp_path)
    with Index.open(uri, live=True) as index:
        write_some(index)
        before = answers(index)
    table = EmbeddingsTable.open(str(tmp_path / "e.lance"))
    step, steps = compact._Table.step, iter(range(3))

    def stopping(self: Any, change: Callable[[Any], object]) -> None:
        if next(steps) == stops_at:
            raise KeyboardInterrupt
        step(self, change)

    monkeypatch.setattr(compact._Table, "step", stopping)
    with pytest.raises(KeyboardInterrupt):
        fold(table)
    monkeypatch.undo()
    with Index.open(uri, live=True) as index:
        assert answers(index) == before
    # An index of what the fold left behind takes the updates from the log as before.
    newest = EmbeddingsTable.open(table.uri)
    assert newest.version == table.version + stops_at
    rebuild(str(tmp_path / "other"), newest)
    with Index.open(str(tmp_path / "other"), live=True) as index:
        assert set(answers(index)) == set(before)
    folded = fold(newest)
    assert sorted(folded.dataset.to_table().column("id").to_pylist()) == sorted(
        {row_id for row_id, _ in before} - {None}
    )
    rebuild(uri, folded)
    with Index.open(uri, live=True) as index:
        assert answers(index) == before


def test_two_folds_at_once_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = start(tmp_path)
    with Index.open(uri, live=True) as index:
        index.upsert(["new"], VECTORS[100:101])
    table = EmbeddingsTable.open(str(tmp_path / "e.lance"))
    step, first = compact._Table.step, [True]

    def disturbed(self: Any, change: Callable[[Any], object]) -> None:
        if first.pop() if first else False:
            fold(EmbeddingsTable.open(table.uri))
        step(self, change)

    monkeypatch.setattr(compact._Table, "step", disturbed)
    with pytest.raises(IndexArtefactError, match="somebody else writes to the embeddings"):
        fold(table)
    monkeypatch.undo()
    # Whatever the two of them left, the stamp of the first is there, and each row once.
    newest = EmbeddingsTable.open(table.uri)
    assert updates_in(newest) == 1
    assert newest.dataset.to_table().column("id").to_pylist().count("new") == 1


def test_all_rows_deleted_is_no_index(tmp_path: Path) -> None:
    uri = start(tmp_path, rows=4)
    with Index.open(uri, live=True) as index:
        index.delete([f"item-{i}" for i in range(4)])
        assert (index.rows, answers(index, 3)[0][0]) == (0, None)
    with pytest.raises(IndexArtefactError, match="all rows are deleted"):
        fold(EmbeddingsTable.open(str(tmp_path / "e.lance")))
    with Index.open(uri, live=True) as index:
        index.upsert(["back"], VECTORS[:1])
        assert index.rows == 1
    assert fold(EmbeddingsTable.open(str(tmp_path / "e.lance"))).rows == 1


def test_images_and_many_blocks_are_folded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rayemb.index.live import log

    monkeypatch.setattr(log, "_BLOCK", 7)
    table = write_table(tmp_path / "e.lance", VECTORS[:20], images=[f"old {i}".encode() for i in range(20)])
    build_here(table, tmp_path / "i", IndexConfig(factory="Flat"))
    with Index.open(str(tmp_path / "i"), live=True) as index:
        for start_at in range(0, 50, 5):
            ids = [f"item-{i}" for i in range(start_at, start_at + 5)]
            index.upsert(ids, VECTORS[start_at + 100 : start_at + 105], images=[each.encode() for each in ids])
    rows = fold(EmbeddingsTable.open(table)).dataset.to_table()
    assert rows.column("id").to_pylist() == [f"item-{i}" for i in range(50)]
    assert rows.column("image").to_pylist() == [f"item-{i}".encode() for i in range(50)]
    assert np.array(rows.column("vector").to_pylist(), np.float32).tolist() == VECTORS[100:150].tolist()


def test_a_trimmed_log_keeps_its_numbers_and_says_what_is_gone(tmp_path: Path) -> None:
    uri = start(tmp_path)
    with Index.open(uri, live=True) as index:
        for i in range(5):
            index.upsert([f"new-{i}"], VECTORS[100 + i : 101 + i])
        log = UpdateLog(index.embeddings)
        log.trim(2)
        assert (log.version, log.start) == (5, 2)
        assert index.upsert(["more"], VECTORS[120:121]) == 6
        log.trim(6)
        assert (log.version, log.start) == (6, 5)
        assert index.upsert(["and more"], VECTORS[121:122]) == 7
        assert index.refresh() == 7
        assert len(log.read(5)) == 2
        with pytest.raises(IndexArtefactError, match="the updates after version 0 were compacted into a newer index"):
            log.read(0)
    with pytest.raises(IndexArtefactError, match="open the index again"):
        Index.open(uri, live=True)


def test_a_log_of_another_model_is_refused(tmp_path: Path) -> None:
    uri = start(tmp_path)
    with Index.open(uri, live=True) as index:
        index.upsert(["new"], VECTORS[:1])
    path = log_uri(str(tmp_path / "e.lance"))
    assert path == str(tmp_path / "e.updates.lance")
    dataset = lance.dataset(path)
    metadata = {key.decode(): value.decode() for key, value in dataset.schema.metadata.items()}
    dataset.replace_schema_metadata(metadata | {"rayemb.model_digest": "f" * 64})
    with pytest.raises(IndexArtefactError, match="the updates are of model ffffffffffff"):
        Index.open(uri, live=True)
    Index.open(uri).close()


def test_a_compaction_keeps_the_quantiser_and_what_is_written_meanwhile(ray_cluster: str, tmp_path: Path) -> None:
    vectors = random_vectors(600, 16, seed=4)
    table = write_table(tmp_path / "e.lance", vectors[:500], {"size": list(range(500))})
    config = IndexConfig(factory="IVF8,Flat", shards=2, by="hash", nprobe=8, recall_queries=20)
    uri = str(tmp_path / "i")
    first = build_here(table, uri, config)
    with Index.open(uri, live=True) as index:
        index.upsert([f"item-{i}" for i in range(490, 510)], vectors[490:510])
        index.delete(["item-0"])

        def meanwhile(line: str) -> None:
            if line.startswith("shard-00000"):
                index.upsert(["meanwhile"], vectors[550:551])

        second = compact_index(uri, config, progress=meanwhile)
        assert (second.updates, second.embeddings.rows) == (2, 509)
        assert second.trained.sha256 == first.trained.sha256
        assert second.recall is not None
        with Index.open(uri, live=True) as new:
            assert (new.live.updates, new.rows, index.rows) == (1, 510, 510)
            old_hits, new_hits = index.search(vectors[:50], 5), new.search(vectors[:50], 5)
            assert new.ids(new_hits.keys).to_pylist() == index.ids(old_hits.keys).to_pylist()
            assert new.key("item-0") is None
        # The old reader goes on until the compaction after next.
        index.upsert(["more"], vectors[551:552])
        third = compact_index(uri, config)
        assert (third.updates, UpdateLog(index.embeddings).start) == (4, 2)
        assert compact_index(uri, config).version == load_manifest(uri).version == third.version
