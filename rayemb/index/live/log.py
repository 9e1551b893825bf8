"""The log of updates: a Lance table beside the embeddings, appended to and never changed.

`<embeddings>.updates.lance`: id, deleted, vector (null where deleted), image if the embeddings keep them, payload
columns of the embeddings' types. One write is one commit and one fragment, which Lance numbers 0, 1, 2, ... whatever
writers there are; the *version* of the log is the number of writes so far, and a row's place is its write and its row
therein. A write is acknowledged once it is committed: what was acknowledged survives any process.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayemb import storage
from rayemb.data.embeddings import DIM_KEY, ID, IMAGE, MODEL_KEY, VECTOR, EmbeddingsTable
from rayemb.errors import RayembError
from rayemb.index.errors import IndexArtefactError

DELETED = "deleted"
# In the metadata of embeddings: the version of the log whose updates they hold.
UPDATES_KEY = "rayemb.updates"
# Rows that are read at a time where not all are wanted at once.
_BLOCK = 4096
# Every commit leaves a list of all writes: the old ones go from time to time.
_CLEANUP: Any = {"interval": 50, "older_than_seconds": 300}


@dataclass(frozen=True)
class Write:
    """One write: its rows, in order, and the version of the log that it made."""

    version: int
    rows: pa.Table

    @property
    def addresses(self) -> NDArray[np.int64]:
        """Where Lance finds each row, `(R,)`; for `UpdateLog.image`."""
        return ((self.version - 1) << 32) + np.arange(self.rows.num_rows, dtype=np.int64)


class UpdateLog:
    """The log of one embeddings table. It comes into being with the first write. Not for several threads at once."""

    def __init__(self, embeddings: EmbeddingsTable) -> None:
        """Raises IndexArtefactError if there is a log that does not fit the table."""
        self.uri = log_uri(embeddings.uri)
        self.schema = _schema(embeddings)
        # Columns of the embeddings that take no null.
        payload = embeddings.dataset.schema
        self.required = {name for name in embeddings.payload_columns if not payload.field(name).nullable}
        self._dataset: Any = None
        self._open()

    def append(self, rows: pa.Table) -> int:
        """Commits `rows` (of `schema`, not empty) as one write; the version of the log with it.

        Raises StorageError if it could not be committed.
        """
        import lance

        # Lance makes a table anew where there is none any more, and would acknowledge a write to it.
        self._renew()
        with _named(self.uri, "write"):
            if self._dataset is None:
                try:
                    self._dataset = lance.write_dataset(
                        rows,
                        self.uri,
                        mode="create",
                        storage_options=storage.lance_options(self.uri),
                        auto_cleanup_options=_CLEANUP,
                    )
                    return _version(self._dataset)
                except OSError as error:
                    if "already exists" not in str(error):
                        raise
                    self._open()  # another writer was first
            self._dataset = lance.write_dataset(rows, self._dataset, mode="append")
        return _version(self._dataset)

    def read(self, since: int, columns: list[str] | None = None) -> list[Write]:
        """The writes after version `since`, in order; those of the newest version that there is.

        Raises IndexArtefactError if some of them were removed after a compaction, StorageError.
        """
        return list(self.walk(since, self.version, columns))

    def walk(self, since: int, until: int, columns: list[str] | None = None) -> Iterator[Write]:
        """The writes after version `since` up to `until`, which was seen, in order. Raises as `read`."""
        if self._dataset is None or until <= since:
            return
        fragments = {each.fragment_id: each for each in self._dataset.get_fragments()}
        wanted = list(range(since, until))
        if not all(number in fragments for number in wanted):
            raise IndexArtefactError(
                f"the updates after version {since} were compacted into a newer index",
                where=self.uri,
                fix="open the index again",
            )
        while wanted:
            rows = np.cumsum([fragments[number].count_rows() for number in wanted[:_BLOCK]])
            count = max(1, int(np.searchsorted(rows, _BLOCK, "right")))
            yield from self._block([fragments[number] for number in wanted[:count]], columns)
            wanted = wanted[count:]

    def _block(self, fragments: list[Any], columns: list[str] | None) -> list[Write]:
        with _named(self.uri, "read"):
            scanner = self._dataset.scanner(
                columns=columns or self.schema.names, fragments=fragments, with_row_address=True, scan_in_order=True
            )
            rows = scanner.to_table()
        at = rows.column("_rowaddr").to_numpy().astype(np.int64)
        order = np.argsort(at, kind="stable")
        ordered, numbers = rows.drop_columns("_rowaddr").take(order), at[order] >> 32
        wanted = [each.fragment_id for each in fragments]
        starts = np.searchsorted(numbers, wanted)
        lengths = np.diff([*starts, len(numbers)])
        found = zip(wanted, starts.tolist(), lengths.tolist(), strict=True)
        return [Write(number + 1, ordered.slice(start, length)) for number, start, length in found]

    @property
    def version(self) -> int:
        """The newest version: the number of writes."""
        self._renew()
        return 0 if self._dataset is None else _version(self._dataset)

    @property
    def start(self) -> int:
        """The version that the oldest write still there came after."""
        self._renew()
        return 0 if self._dataset is None else min(each.fragment_id for each in self._dataset.get_fragments())

    def image(self, address: int) -> bytes | None:
        """The image of the row at a `Write.addresses`. Raises StorageError."""
        with _named(self.uri, "read"):
            rows = self._dataset.get_fragment(address >> 32).take([address & 0xFFFFFFFF], columns=[IMAGE])
        found: bytes | None = rows.column(0)[0].as_py()
        return found

    def trim(self, version: int) -> None:
        """Removes the writes up to `version`, but for the last of all. Raises StorageError."""
        import lance

        self._renew()
        if self._dataset is None:
            return
        # The last one stays: the version of the log is its number.
        numbers = [each.fragment_id for each in self._dataset.get_fragments()][:-1]
        old = [number for number in numbers if number < version]
        if not old:
            return
        with _named(self.uri, "trim"):
            operation = lance.LanceOperation.Delete(updated_fragments=[], deleted_fragment_ids=old, predicate="true")
            options = storage.lance_options(self.uri)
            lance.LanceDataset.commit(
                self.uri, operation, read_version=self._dataset.version, storage_options=options or None
            )

    def _open(self) -> None:
        import lance

        try:
            self._dataset = lance.dataset(self.uri, storage_options=storage.lance_options(self.uri))
        except (ValueError, OSError) as error:
            if "not found" not in str(error).lower():
                raise storage.storage_error(error, self.uri, "read") from error
            return
        found = self._dataset.schema
        model = (found.metadata or {}).get(MODEL_KEY.encode(), b"").decode()
        own = self.schema.metadata[MODEL_KEY.encode()].decode()
        if model != own:
            raise IndexArtefactError(
                f"the updates are of model {model[:12] or 'none'} and the embeddings of model {own[:12]}",
                where=self.uri,
                fix="remove the log, and write its items again with the new model",
            )
        if not found.remove_metadata().equals(self.schema.remove_metadata()):
            raise IndexArtefactError(
                "the updates have other columns than the embeddings",
                where=self.uri,
                fix="remove the log, and write its items again",
            )

    def _renew(self) -> None:
        if self._dataset is None:
            self._open()
            return
        with _named(self.uri, "read"):
            self._dataset.checkout_latest()


def log_uri(embeddings_uri: str) -> str:
    """Where the log of an embeddings table lies."""
    return storage.normalise(embeddings_uri).removesuffix(".lance") + ".updates.lance"


def updates_in(embeddings: EmbeddingsTable) -> int:
    """The version of the log whose updates a table holds: readers need those after it.

    Of a table that was embedded anew since, all that is still in the log comes after it.
    """
    stamp = embeddings.metadata.get(UPDATES_KEY)
    return UpdateLog(embeddings).start if stamp is None else int(stamp)


def _schema(embeddings: EmbeddingsTable) -> pa.Schema:
    fields = [
        pa.field(ID, pa.string(), nullable=False),
        pa.field(DELETED, pa.bool_(), nullable=False),
        pa.field(VECTOR, pa.list_(pa.float32(), embeddings.dim)),
    ]
    if embeddings.has_images:
        fields.append(pa.field(IMAGE, pa.binary()))
    payload = embeddings.dataset.schema
    fields += [pa.field(name, payload.field(name).type) for name in embeddings.payload_columns]
    return pa.schema(fields, metadata={MODEL_KEY: embeddings.model_digest, DIM_KEY: str(embeddings.dim)})


def _version(dataset: Any) -> int:
    return int(dataset.get_fragments()[-1].fragment_id) + 1


@contextlib.contextmanager
def _named(uri: str, doing: str) -> Iterator[None]:
    """Turns Lance's errors into a StorageError that names the log."""
    try:
        yield
    except RayembError:
        raise
    except (OSError, ValueError, RuntimeError) as error:
        raise storage.storage_error(error, uri, doing, storage.attempts()) from error
