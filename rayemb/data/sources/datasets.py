"""What `save_to_disk` of the library `datasets` writes, read without the library."""

from collections.abc import Iterator
from typing import Any, Literal

import pyarrow as pa
import pyarrow.ipc

from rayemb import storage
from rayemb.data.sources.arrow import batch_records, batch_rows
from rayemb.data.sources.base import SourceError
from rayemb.data.sources.columns import check_schema
from rayemb.data.sources.files import (
    DamageError,
    FileSource,
    Piece,
    Record,
    find_folders,
    open_seekable,
    reading,
)

_DICT, _STATE = "dataset_dict.json", "state.json"
_FILE_MAGIC = b"ARROW1"
_END = b"\xff\xff\xff\xff\0\0\0\0"  # how a stream ends; without it a file cut between two batches looks whole


class DatasetsSource(FileSource):
    """Folders written by `Dataset.save_to_disk` or `DatasetDict.save_to_disk`, whose splits are kept.

    A unit is an Arrow file. For data on the Hugging Face hub: load it with `datasets`, save it to disk, read it here.
    """

    name: Literal["datasets"] = "datasets"

    def _find(self) -> list[tuple[str, str]]:
        files = []
        for folder in find_folders(self.uri, "*.json"):
            if storage.exists(storage.join(folder, _DICT)):
                for split in _listed(folder, _DICT, "splits"):
                    files += [(file, str(split)) for file in _arrow_files(storage.join(folder, str(split)))]
            else:
                files += [(file, "") for file in _arrow_files(folder)]
        return files

    def _plan(self, file: str) -> list[Piece]:
        with open_seekable(file) as raw, reading(file):
            check_schema(self.columns, _reader(raw).schema, file, self.image_root)
        return [Piece(file)]

    def _records(self, piece: Piece) -> Iterator[Record]:
        row, step = 0, batch_rows(self.columns)
        with open_seekable(piece.file) as raw:
            with reading(piece.file):
                reader = _reader(raw)
                batches = iter(reader)
            while True:
                with reading(piece.file):
                    batch = next(batches, None)
                if batch is None:
                    break
                for start in range(0, batch.num_rows, step):
                    part = batch.slice(start, step)
                    yield from batch_records(part, self.columns, row)
                    row += part.num_rows
            if isinstance(reader, pa.ipc.RecordBatchStreamReader):
                with reading(piece.file):
                    raw.seek(max(0, raw.size() - len(_END)))
                    if raw.read(len(_END)) != _END:
                        raise DamageError("the stream is cut short")


def _reader(raw: pa.NativeFile) -> Any:
    magic = raw.read(len(_FILE_MAGIC))
    raw.seek(0)
    if magic == _FILE_MAGIC:
        file = pa.ipc.open_file(raw)
        return _FileBatches(file)
    return pa.ipc.open_stream(raw)


class _FileBatches:
    """An IPC file (Feather) that is gone through like a stream."""

    def __init__(self, file: Any) -> None:
        self.schema, self._file = file.schema, file

    def __iter__(self) -> Iterator[pa.RecordBatch]:
        return (self._file.get_batch(i) for i in range(self._file.num_record_batches))


def _arrow_files(folder: str) -> list[str]:
    names = [entry.get("filename") for entry in _listed(folder, _STATE, "_data_files") if isinstance(entry, dict)]
    if not all(isinstance(name, str) for name in names):
        raise SourceError(f"{_STATE} does not name its files", where=folder, fix="save the dataset again")
    return [storage.join(folder, str(name)) for name in names]


def _listed(folder: str, file: str, key: str) -> list[Any]:
    try:
        document = storage.read_json(storage.join(folder, file))
    except storage.MissingError as error:
        raise SourceError(
            f"no {file}: not a folder that `save_to_disk` wrote", where=f"corpus.source.uri={folder}"
        ) from error
    except storage.StorageError as error:
        if storage.is_store_failure(error.__cause__ or error):
            raise
        raise SourceError(f"{file}: {error.what}", where=folder, fix="save the dataset again") from error
    entries = document.get(key) if isinstance(document, dict) else None
    if not isinstance(entries, list):
        raise SourceError(f"{file} has no list {key!r}", where=folder, fix="save the dataset again")
    return entries
