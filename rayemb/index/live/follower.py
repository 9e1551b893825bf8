"""The log in the memory of a reader: what is new beside an index, and what of the index is gone."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import ArrayLike

from rayemb.data.embeddings import ID, IMAGE, EmbeddingsTable
from rayemb.index.errors import QueryError, UpdatesFullError
from rayemb.index.lexical import LexicalShard
from rayemb.index.live import items
from rayemb.index.live.config import LiveConfig
from rayemb.index.live.delta import Delta
from rayemb.index.live.log import DELETED, UpdateLog, Write
from rayemb.index.live.tombstones import Tombstones
from rayemb.index.manifest import Manifest
from rayemb.index.selection import Selection
from rayemb.index.shard import Shard


class State:
    """The updates at one version of the log; nothing in it changes.

    `alive`: of each shard of the index, the rows that are there (None: all); `parts`: the new rows, as shards.
    """

    def __init__(self, follower: "Follower", version: int, alive: list[Selection | None], delta: Delta) -> None:
        self.version, self.alive, self._follower, self._delta = version, alive, follower, delta
        self.rows = delta.rows
        self.parts = delta.parts(version)

    def key(self, row_id: str) -> int | None:
        """The key of the row with this id, if it is there."""
        return self._follower.key(row_id, self.version, self.rows)

    def touched(self, row_id: str) -> bool:
        """Whether an item with this id was written or removed since the index was built."""
        return self._follower.touched(row_id, self.version)


class Follower:
    """Follows the log from the version that the index holds on. Threads may share it.

    Args:
        shards: the shards of the index that are here: all of them, those whose tombstones are wanted, or none.
        rows: whether the new rows are held too, or the tombstones alone.
    """

    def __init__(
        self,
        manifest: Manifest,
        embeddings: EmbeddingsTable,
        shards: Sequence[Shard],
        config: LiveConfig | None = None,
        *,
        lexical: LexicalShard | None = None,
        rows: bool = True,
    ) -> None:
        """`lexical`: the lexical half of a shard of the index; default: of the first one here.

        Reads what there is. Raises IndexArtefactError if the log does not belong to the embeddings, StorageError."""
        self.config = config or LiveConfig()
        self.log = UpdateLog(embeddings)
        self.since = self._version = manifest.updates
        self._shards = list(shards)
        self._tombstones = [Tombstones(shard.rows) for shard in shards]
        names = [name for name in self.log.schema.names if name != IMAGE]
        self._names, self._holds_rows = names if rows else [ID, DELETED], rows
        lexical = self._shards[0].lexical if self._shards else lexical
        words = (manifest.words.column, lexical) if manifest.words and lexical else None
        self._delta = Delta(embeddings, manifest.embeddings.rows, manifest.effort, words)
        self._first_key = manifest.embeddings.rows
        # The numbers in the delta of every id that was written, in order, and the version that first named it.
        self._numbers: dict[str, list[int]] = {}
        self._first: dict[str, int] = {}
        self._addresses: list[int] = []
        self._updates = 0
        self._state: State | None = None
        self._lock = threading.Lock()  # of what is in memory
        self._io = threading.Lock()  # of the log
        self.refresh()

    @property
    def version(self) -> int:
        """The version of the log that searches see."""
        return self._version

    @property
    def updates(self) -> int:
        """Upserts and deletes since the index was built: what `LiveConfig.max_rows` bounds."""
        return self._updates

    def refresh(self, at_least: int | None = None) -> int:
        """Takes in what is new in the log; the version that searches see from now on.

        With `at_least`, does nothing where that version is here already.

        Raises:
            QueryError: the log has no version `at_least`.
            IndexArtefactError: a compaction removed what was to be read: open the index again.
            StorageError: the log cannot be read.
        """
        if at_least is not None and at_least <= self._version:
            return self._version
        with self._io:
            writes = self.log.read(self._version, self._names)
            with self._lock:
                for write in writes:
                    self._apply(write)
        if at_least is not None and at_least > self._version:
            raise QueryError(f"the updates have no version {at_least}; the newest is {self._version}", where="at_least")
        return self._version

    def state(self) -> State:
        """What searches see now."""
        state = self._state
        if state is not None:
            return state
        with self._lock:
            if self._state is None:
                alive = [each.alive(self._version) for each in self._tombstones]
                self._state = State(self, self._version, alive, self._delta)
            return self._state

    def alive(self, number: int, version: int) -> Selection | None:
        """The rows of shard `number` that are there at `version` of the log, which was seen; None: all."""
        return self._tombstones[number].alive(version)

    def upsert(
        self,
        ids: Sequence[str],
        vectors: ArrayLike,
        payload: Sequence[Mapping[str, Any]] | None = None,
        images: Sequence[bytes | None] | None = None,
    ) -> int:
        """As `Index.upsert`."""
        return self._write(items.upserts(self.log.schema, ids, vectors, payload, images, self.log.required))

    def delete(self, ids: Sequence[str]) -> int:
        """As `Index.delete`."""
        return self._write(items.deletes(self.log.schema, ids))

    def key(self, row_id: str, version: int, rows: int) -> int | None:
        """The key of the row with this id at `version`, when the delta had `rows` rows; None if there is none."""
        numbers = [number for number in self._numbers.get(row_id, []) if number < rows]
        if numbers and not self._delta.gone(numbers[-1], version):
            return self._first_key + numbers[-1]
        for shard, tombstones in zip(self._shards, self._tombstones, strict=True):
            position = shard.payload.position(row_id)
            if position is not None and not tombstones.gone(position, version):
                return shard.key(row_id)
        return None

    def touched(self, row_id: str, version: int) -> bool:
        """Whether an item with this id was written or removed since the index was built, up to `version`."""
        return self._first.get(row_id, version + 1) <= version

    def image(self, key: int) -> bytes | None:
        """The image of a row of the delta. Raises StorageError."""
        with self._io:
            return self.log.image(self._addresses[key - self._first_key])

    def _write(self, rows: pa.Table) -> int:
        if self._updates + rows.num_rows > self.config.max_rows:
            raise UpdatesFullError(
                f"{self._updates:,} updates wait to be compacted, and {self.config.max_rows:,} may",
                where="live.max_rows",
                fix="run `rayemb index compact`",
            )
        with self._io:
            version = self.log.append(rows)
        self.refresh(version)
        return version

    def _apply(self, write: Write) -> None:
        rows, version = write.rows, write.version
        ids, deleted = rows.column(ID).to_pylist(), rows.column(DELETED).to_pylist()
        kept = self._delta.rows
        for row_id, is_deleted, address in zip(ids, deleted, write.addresses.tolist(), strict=True):
            numbers = self._numbers.get(row_id)
            if numbers is None:
                numbers = self._numbers[row_id] = []
                self._first[row_id] = version
                for shard, tombstones in zip(self._shards, self._tombstones, strict=True):
                    position = shard.payload.position(row_id)
                    if position is not None:
                        tombstones.add(position, version)
            if numbers:
                self._delta.remove(numbers[-1], version)
            if not is_deleted and self._holds_rows:
                numbers.append(kept)
                self._addresses.append(address)
                kept += 1
        if kept > self._delta.rows:
            live = rows.drop_columns(DELETED)
            self._delta.add(live.filter(pc.invert(rows.column(DELETED))) if any(deleted) else live)
        self._updates += rows.num_rows
        self._version, self._state = version, None
