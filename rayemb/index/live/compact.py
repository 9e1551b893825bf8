"""Compaction: the log goes into the embeddings, and the index is built anew from them, as a new version.

The embeddings say which version of the log they hold, and so does an index built from them; readers of that index take
the updates after it from the log. What a compaction that was killed leaves behind is therefore right at any moment: the
log still has all that no published index has, and the next compaction does again what was not finished.
"""

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from rayemb import storage
from rayemb.data.embeddings import ID, EmbeddingsTable
from rayemb.index.build import build_index
from rayemb.index.config import IndexConfig
from rayemb.index.errors import IndexArtefactError
from rayemb.index.live.log import DELETED, UPDATES_KEY, UpdateLog, updates_in
from rayemb.index.manifest import Manifest, load_manifest

logger = logging.getLogger(__name__)

Progress = Callable[[str], None]


def compact_index(index_uri: str, config: IndexConfig | None = None, *, progress: Progress | None = None) -> Manifest:
    """Publishes the index with its updates in it, and gives its manifest; as it is, if there are none.

    Of the type, sharding and effort of the published index, with the same trained quantiser (`rayemb index build`
    trains a new one); of `config` only what measures recall is read. Searches and writes go on meanwhile: what is
    written during the build stays beside the new index. A compaction that was killed is finished by the next one, which
    keeps the shards that are there. Log entries are removed once the manifest before last does not need them either,
    so that a reader has until the next compaction to open the new index. Needs a connected Ray.

    Raises IndexArtefactError if there is no index, if nothing would be left, or if another compaction runs.
    """
    say = progress or logger.info
    published = load_manifest(index_uri)
    embeddings = EmbeddingsTable.open(published.embeddings.uri)
    if updates_in(embeddings) <= published.updates:
        embeddings = fold(embeddings, say)
        if updates_in(embeddings) <= published.updates:
            say("there are no updates")
            return published
    else:
        say(f"the embeddings hold the updates up to version {updates_in(embeddings)} from an earlier run")
    settings = {
        "factory": published.factory,
        "prefix": published.prefix,
        "shards": min(len(published.shards), embeddings.rows),
        "by": published.sharding.by,
        "words": published.words.column if published.words else None,
        "nprobe": published.effort.nprobe,
        "ef_search": published.effort.ef_search,
        "rerank": published.effort.rerank,
    }
    manifest = build_index(
        embeddings.uri,
        index_uri,
        (config or IndexConfig()).model_copy(update=settings),
        model_digest=published.model_digest,
        version=embeddings.version,
        compacted=published,
        progress=progress,
    )
    UpdateLog(embeddings).trim(published.updates)
    return manifest


def fold(embeddings: EmbeddingsTable, say: Progress = logger.info) -> EmbeddingsTable:
    """The newest version of the table with all updates in it: rows that stay in their order, then those written since.

    Each step may be repeated: what is folded in twice is the same. Memory: the ids of the updates and a block of rows.
    Raises IndexArtefactError if nothing would be left, or if somebody else writes to the table; StorageError.
    """
    log = UpdateLog(embeddings)
    since, until = updates_in(embeddings), log.version
    last: dict[str, int] = {}
    for write in log.walk(since, until, [ID, DELETED]):
        marks = zip(
            write.rows.column(ID).to_pylist(),
            write.rows.column(DELETED).to_pylist(),
            write.addresses.tolist(),
            strict=True,
        )
        for row_id, deleted, address in marks:
            last[row_id] = -1 if deleted else address
    if not last:
        return embeddings
    kept = np.array(sorted(address for address in last.values() if address >= 0), np.int64)
    ids = pa.table({ID: pa.array(list(last), pa.string())})
    table = _Table(embeddings)
    table.step(lambda dataset: dataset.merge_insert(ID).when_matched_delete().execute(ids))
    if not len(kept) and not table.dataset.count_rows():
        raise IndexArtefactError(
            "all rows are deleted, and an index has one at least", where=embeddings.uri, fix="add rows first"
        )
    if len(kept):
        rows = _live_rows(log, since, until, kept, embeddings.dataset.schema)
        table.step(lambda dataset: _append(dataset, rows, embeddings))
    metadata = embeddings.metadata | {UPDATES_KEY: str(until)}
    table.step(lambda dataset: dataset.replace_schema_metadata(metadata))
    say(f"{len(kept):,} rows written and {len(last) - len(kept):,} removed, up to version {until} of the updates")
    return EmbeddingsTable.open(embeddings.uri, table.dataset.version)


class _Table:
    """The newest version of a table, to which nobody else may write meanwhile."""

    def __init__(self, embeddings: EmbeddingsTable) -> None:
        self.uri, self.dataset = embeddings.uri, embeddings.dataset

    def step(self, change: Callable[[Any], object]) -> None:
        """Makes a change of one commit at most. Raises IndexArtefactError if there were others."""
        import lance

        before = self.dataset.version
        try:
            change(self.dataset)
            self.dataset = lance.dataset(self.uri, storage_options=storage.lance_options(self.uri))
        except (OSError, RuntimeError) as error:
            if "conflict" in str(error).lower():
                raise self._disturbed() from error
            raise storage.storage_error(error, self.uri, "write", storage.attempts()) from error
        if self.dataset.version > before + 1:
            raise self._disturbed()

    def _disturbed(self) -> IndexArtefactError:
        return IndexArtefactError(
            "somebody else writes to the embeddings", where=self.uri, fix="compact again when that is done"
        )


def _live_rows(
    log: UpdateLog, since: int, until: int, kept: np.ndarray[Any, np.dtype[np.int64]], schema: pa.Schema
) -> Iterator[pa.RecordBatch]:
    names = [name for name in log.schema.names if name != DELETED]
    for write in log.walk(since, until, names):
        live = write.rows.filter(pa.array(np.isin(write.addresses, kept)))
        yield from live.select(schema.names).cast(schema).to_batches()


def _append(dataset: Any, rows: Iterator[pa.RecordBatch], embeddings: EmbeddingsTable) -> None:
    import lance

    reader = pa.RecordBatchReader.from_batches(embeddings.dataset.schema, rows)
    options = storage.lance_options(embeddings.uri)
    lance.write_dataset(reader, embeddings.uri, mode="append", storage_options=options)
