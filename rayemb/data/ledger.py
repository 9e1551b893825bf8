"""What a run of embedding has finished, kept beside its table so that another run goes on from there.

<table>.parts/<fingerprint>/<shard>.json     the record of a finished shard, written last
<table>.parts/<fingerprint>/writing/         data files that are being written
<table>.quarantine/<fingerprint>/            rows that were set aside, a Parquet file per shard
<table>/data/<name>-<fingerprint>.lance      the data file of a shard, in no table before the commit
"""

import json
import logging
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from rayemb import storage
from rayemb.data.embeddings import EmbeddingsError
from rayemb.data.encode import BadRows, Span

logger = logging.getLogger(__name__)

MOST_DEATHS = 4
REQUESTS_AT_ONCE = 16  # most of the time of a small request to S3 is waiting
QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("source", pa.string(), nullable=False),  # the file
        pa.field("row_group", pa.int64()),  # null: all of the file
        pa.field("row", pa.int64()),  # in its row group; null: all of the row group
        pa.field("rows", pa.int64(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("id", pa.string()),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("what", pa.string(), nullable=False),
    ]
)


@dataclass(frozen=True)
class Shard:
    """Consecutive row groups of one split: what is embedded at once, and done again whole if interrupted."""

    index: int
    split: str
    spans: tuple[Span, ...]

    @property
    def rows(self) -> int:
        """Rows, good and bad."""
        return sum(span.rows for span in self.spans)

    @property
    def name(self) -> str:
        """The place in the table and a digest of the content: a record under it is of these very row groups."""
        return f"{self.index:06d}-{storage.sha256_bytes(self.to_json().encode())[:12]}"

    def to_json(self) -> str:
        """The shard as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Shard":
        """The shard that `to_json` wrote."""
        content = json.loads(text)
        return cls(content["index"], content["split"], tuple(Span(**span) for span in content["spans"]))


@dataclass(frozen=True)
class Record:
    """A finished shard: `rows` in its data files (as Lance describes them), and the rows set aside by reason."""

    shard: str
    rows: int
    bad: dict[str, int]
    fragments: list[dict[str, Any]]
    seconds: float

    def to_json(self) -> str:
        """The record as one line of JSON."""
        return json.dumps(asdict(self))

    @property
    def files(self) -> dict[str, int | None]:
        """Bytes of each data file, None where Lance does not say."""
        return {file["path"]: file.get("file_size_bytes") for part in self.fragments for file in part["files"]}


class Ledger:
    """The records of one job (corpus, model and settings: its fingerprint) for the table at `table_uri`."""

    def __init__(self, table_uri: str, fingerprint: str) -> None:
        self.table_uri, self.mark = table_uri, fingerprint[:16]
        self.parts = f"{table_uri}.parts"
        self.folder = storage.join(self.parts, self.mark)
        self.quarantine = f"{table_uri}.quarantine"

    # -- by the encoders -----------------------------------------------------------------------------------

    def begin(self, shard: Shard, run: str) -> None:
        """Notes that an encoder of `run` sets to work on the shard. Raises EmbeddingsError if several have died of it.

        Ray starts a dead encoder again without limit, and gives it the same shard.
        """
        folder = storage.join(self.folder, "begun", run, shard.name)
        if (deaths := len(storage.list_files(folder))) >= MOST_DEATHS:
            files = ", ".join(span.file for span in shard.spans)
            raise EmbeddingsError(
                f"{deaths} encoders died while they worked on it (shard {shard.index}, {shard.rows} rows)",
                where=files,
                fix="lower embed.batch_size if memory ran out; look for what is wrong with these rows; run it again",
            )
        storage.write_bytes(storage.join(folder, uuid.uuid4().hex), b"")

    def write_data(self, tables: Iterator[pa.Table], schema: pa.Schema) -> tuple[int, list[dict[str, Any]]]:
        """Streams the tables into data files; gives their rows and what a commit must know of the files.

        The files are written elsewhere and moved in when they are whole, under a name that says whose they are:
        what a killed writer leaves behind can be told from anybody else's file.
        """
        first = next(tables, None)
        if first is None:
            return 0, []
        base = storage.join(self.folder, "writing", uuid.uuid4().hex)
        errors: list[BaseException] = []

        def batches() -> Iterator[pa.RecordBatch]:
            try:
                yield from first.to_batches()
                for table in tables:
                    yield from table.to_batches()
            except BaseException as error:
                errors.append(error)
                raise

        from lance.fragment import write_fragments

        reader = pa.RecordBatchReader.from_batches(schema, batches())
        options = storage.lance_options(base)
        try:
            written = write_fragments(reader, base, schema=schema, mode="overwrite", storage_options=options)
        except Exception as error:
            if errors:  # Lance makes an OSError of it, and text of ours
                raise errors[0] from error
            raise
        fragments = [fragment.to_json() for fragment in written]
        for file in (file for fragment in fragments for file in fragment["files"]):
            name = f"{file['path'].removesuffix('.lance')}-{self.mark}.lance"
            _move(storage.join(base, "data", file["path"]), storage.join(self.table_uri, "data", name))
            file["path"] = name
        storage.delete(base)
        return sum(fragment["physical_rows"] for fragment in fragments), fragments

    def write_bad(self, shard: Shard, bad: list[BadRows]) -> None:
        """Writes the rows that were set aside, in the order of their place."""
        if not bad:
            return
        ordered = sorted(bad, key=lambda each: (each.source, each.row_group or 0, each.row or 0))
        rows = [{**asdict(each), "split": shard.split} for each in ordered]
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows, schema=QUARANTINE_SCHEMA), sink, compression="zstd")
        name = f"{shard.name}.parquet"
        storage.write_bytes(storage.join(self.quarantine, self.mark, name), bytes(sink.getvalue()))

    def write(self, record: Record) -> None:
        """Makes the shard count as finished. Comes after its data and its bad rows."""
        storage.write_bytes(storage.join(self.folder, f"{record.shard}.json"), record.to_json().encode())

    # -- by the driver -------------------------------------------------------------------------------------

    def read(self, shards: Iterable[Shard]) -> dict[str, Record]:
        """The records of `shards`, by name: one listing, then the records that are there.

        A record whose data files are gone or of another size does not count.
        """
        files = storage.list_files(self.folder, ".json")
        there = {file.rsplit("/", 1)[-1].removesuffix(".json") for file in files}
        names = [shard.name for shard in shards if shard.name in there]
        if not names:
            return {}
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            contents = pool.map(lambda name: storage.read_json(storage.join(self.folder, f"{name}.json")), names)
            records = [Record(**content) for content in contents]
        sizes = self._data_files()
        return {record.shard: record for record in records if not _missing(record, sizes)}

    def missing(self, records: Iterable[Record]) -> list[str]:
        """The data files of `records` that are not there whole."""
        sizes = self._data_files()
        return [name for record in records for name in _missing(record, sizes)]

    def commit(self, records: Iterable[Record], schema: pa.Schema) -> None:
        """Makes the shards, in this order, the content of the table, as a new version and in one step."""
        import lance
        from lance.fragment import FragmentMetadata

        fragments = [FragmentMetadata.from_json(json.dumps(part)) for each in records for part in each.fragments]
        options = storage.lance_options(self.table_uri)
        lance.LanceDataset.commit(
            self.table_uri, lance.LanceOperation.Overwrite(schema, fragments), storage_options=options
        )

    def tidy(self) -> None:
        """Removes all ledgers of the table, the data files of their jobs that no version of it holds, and the
        quarantines of other jobs. Call after a commit: the table is then what its last job made it.

        Files that no such job wrote are left alone, whoever's they are.
        """
        marks = {file.removeprefix(f"{self.parts}/").split("/")[0] for file in storage.list_files(self.parts)}
        ours = tuple(f"-{mark}.lance" for mark in marks)
        orphans = {name for name in self._data_files() if name.endswith(ours)} if marks else set()
        if orphans:
            orphans -= self._committed()
        with ThreadPoolExecutor(REQUESTS_AT_ONCE) as pool:
            list(pool.map(lambda name: storage.delete(storage.join(self.table_uri, "data", name)), orphans))
        if orphans:
            logger.info("%s: removed %d data files that no version holds", self.table_uri, len(orphans))
        storage.delete(self.parts)
        quarantined = storage.list_files(self.quarantine)
        for mark in {file.removeprefix(f"{self.quarantine}/").split("/")[0] for file in quarantined} - {self.mark}:
            storage.delete(storage.join(self.quarantine, mark))

    def _data_files(self) -> dict[str, int]:
        folder = storage.join(self.table_uri, "data")
        fs, path = storage.filesystem(folder)
        try:
            infos = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
        except OSError as error:
            raise storage.storage_error(error, folder, "list", storage.attempts()) from error
        return {info.base_name: info.size for info in infos if info.type == pafs.FileType.File}

    def _committed(self) -> set[str]:
        import lance

        options = storage.lance_options(self.table_uri)
        newest = lance.dataset(self.table_uri, storage_options=options)
        held: set[str] = set()
        for version in newest.versions():
            dataset = lance.dataset(self.table_uri, version=version["version"], storage_options=options)
            held.update(file.path for fragment in dataset.get_fragments() for file in fragment.data_files())
        return held


def _missing(record: Record, sizes: dict[str, int]) -> list[str]:
    return [
        name for name, size in record.files.items() if name not in sizes or (size is not None and sizes[name] != size)
    ]


def _move(source: str, target: str) -> None:
    fs, path = storage.filesystem(source)
    _, to = storage.filesystem(target)
    try:
        if isinstance(fs, pafs.LocalFileSystem):  # a store has no folders, and would get an empty object
            fs.create_dir(to.rsplit("/", 1)[0])
        fs.move(path, to)
    except OSError as error:
        raise storage.storage_error(error, target, "write", storage.attempts()) from error
