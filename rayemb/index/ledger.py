"""What a build has finished, kept in its folder so that another run goes on from there.

<index>/v-<when>-<fingerprint>/trained.faiss, shard-*.faiss, shard-*.keys, words-*.arrow, terms.arrow
<index>/v-<when>-<fingerprint>/ledger/*.json    a record of each, written last
"""

import os
import re
from datetime import UTC, datetime, timedelta
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from rayemb import storage
from rayemb.index.config import IndexConfig
from rayemb.index.manifest import File, ShardFile

T = TypeVar("T", bound=BaseModel)
_STAMP = "%Y%m%dT%H%M%S"
_FOLDER = re.compile(r"^v-(\d{8}T\d{6})-([0-9a-f]{8})$")


class Trained(File):
    """The record of the trained index."""


class Placed(BaseModel):
    """The record of the placement: the keys of each shard, and the shard of each cell."""

    trained: str
    rows: tuple[int, ...]
    keys: tuple[File, ...]
    cells: tuple[int, ...]


class Written(BaseModel):
    """The record of a shard: what the manifest will say, and of which trained index it is."""

    trained: str
    shard: ShardFile


class Worded(BaseModel):
    """The record of a shard's words; the trained index decides which rows those of a cell are."""

    trained: str
    file: File


class Terms(File):
    """The record of the terms: the words of all rows together are counted in `length`."""

    length: int


class Ledger:
    """The records of one build in `folder` of the index."""

    def __init__(self, index_uri: str, folder: str) -> None:
        self.index_uri, self.folder = index_uri, folder
        self._records = storage.join(index_uri, folder, "ledger")

    @classmethod
    def open(cls, index_uri: str, fingerprint: str, published: set[str]) -> "Ledger":
        """The ledger of the last unfinished build of this fingerprint, or a new one."""
        mine = [name for name in folders(index_uri) if name.endswith(f"-{fingerprint[:8]}") and name not in published]
        fresh = f"v-{datetime.now(UTC).strftime(_STAMP)}-{fingerprint[:8]}"
        while not mine and fresh in published:  # the same again, within a second
            fresh = f"v-{(started(fresh) + timedelta(seconds=1)).strftime(_STAMP)}-{fingerprint[:8]}"
        return cls(index_uri, max(mine) if mine else fresh)

    def write(self, name: str, record: BaseModel) -> None:
        """Makes `name` count as finished. Comes after its files."""
        storage.write_bytes(storage.join(self._records, f"{name}.json"), record.model_dump_json().encode())

    def read(self, name: str, kind: type[T]) -> T | None:
        """The record of `name`; None where there is none, or a file of it is gone or of another size."""
        uri = storage.join(self._records, f"{name}.json")
        if not storage.exists(uri):
            return None
        try:
            record = kind.model_validate(storage.read_json(uri))
        except (ValidationError, storage.StorageError):
            return None
        return record if all(self._whole(file) for file in _files_of(record)) else None

    def close(self) -> None:
        """Removes the records, since the manifest says all of it, and what killed writers left half done."""
        storage.delete(self._records)
        for file in storage.list_files(storage.join(self.index_uri, self.folder), ".tmp"):
            storage.delete(file)

    def _whole(self, file: File) -> bool:
        fs, path = storage.filesystem(storage.join(self.index_uri, file.file))
        return bool(fs.get_file_info(path).size == file.bytes)


def file_of(file: str, path: str) -> File:
    """What a manifest says about `file` of the index, which was written at the local `path`."""
    return File(file=file, bytes=os.path.getsize(path), sha256=storage.sha256_file(path))


def fingerprint(uri: str, version: int, config: IndexConfig, faiss_version: str) -> str:
    """What the shards of a build depend on, in hex: table, version, and the settings that shape files."""
    shaping = ("factory", "prefix", "shards", "by", "words", "train_rows", "seed")
    about: dict[str, Any] = {name: getattr(config, name) for name in shaping}
    return storage.sha256_bytes(repr((uri, version, faiss_version, sorted(about.items()))).encode())


def folders(index_uri: str) -> list[str]:
    """The folders of builds below an index, oldest first."""
    prefix = storage.normalise(index_uri) + "/"
    names = {file.removeprefix(prefix).split("/")[0] for file in storage.list_files(index_uri)}
    return sorted(name for name in names if _FOLDER.match(name))


def started(folder: str) -> datetime:
    """When the build of `folder` began."""
    found = _FOLDER.match(folder)
    assert found is not None
    return datetime.strptime(found[1], _STAMP).replace(tzinfo=UTC)


def _files_of(record: BaseModel) -> list[File]:
    if isinstance(record, Written):
        return [record.shard, *([record.shard.keys] if record.shard.keys else [])]
    if isinstance(record, Placed):
        return list(record.keys)
    if isinstance(record, Worded):
        return [record.file]
    return [record] if isinstance(record, File) else []
