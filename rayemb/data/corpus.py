"""The corpus artefact: Parquet shards under `split=<name>/`, named with their checksums in `_corpus.json`."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from rayemb import storage
from rayemb.errors import RayembError
from rayemb.models import ImageLimits

Kind = Literal["image_text", "text_pair", "text"]
FORMAT = 2
FOOTERS_AT_ONCE = 16  # most of the time of a small read from S3 is waiting
MANIFEST = "_corpus.json"  # readers of Parquet folders skip names with a leading underscore
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("image", pa.binary()),
        pa.field("query", pa.string()),
        pa.field("text", pa.string(), nullable=False),
        pa.field("texts", pa.list_(pa.string())),
        pa.field("negatives", pa.list_(pa.string())),
        pa.field("concept", pa.string(), nullable=False),
        pa.field("score", pa.float32()),
        pa.field("style", pa.string()),
        pa.field("license", pa.string()),
        # Of the image's bytes (or the query), the text and the concept: see `keys`. Planning reads these alone.
        pa.field("query_key", pa.int64(), nullable=False),
        pa.field("text_key", pa.int64(), nullable=False),
        pa.field("concept_key", pa.int64(), nullable=False),
    ]
)
_LONG = {"image", "query", "text", "texts", "negatives"}
KEYS = ("query_key", "text_key", "concept_key")
PAYLOAD = [SCHEMA.field(name) for name in ("text", "concept", "style", "license")] + [pa.field("split", pa.string())]


class CorpusError(RayembError):
    """A corpus that is missing, incomplete, or not what its manifest says."""


@dataclass(frozen=True)
class RowGroup:
    """One Parquet row group: the smallest piece that is read by itself."""

    file: str
    index: int
    rows: int
    first: int = 0  # ordinal of its first row within the split


class Corpus:
    """A published corpus. Opening reads `_corpus.json` alone; row groups are listed from the files' footers."""

    def __init__(self, uri: str, manifest: dict[str, Any]) -> None:
        self.uri, self.manifest = uri, manifest

    @classmethod
    def open(cls, uri: str) -> "Corpus":
        """The corpus at `uri`. Raises CorpusError if there is none."""
        uri = storage.normalise(uri)
        try:
            manifest = storage.read_json(storage.join(uri, MANIFEST))
        except storage.MissingError as error:
            raise CorpusError(f"no {MANIFEST}: no corpus here", where=uri, fix="run `rayemb data build`") from error
        except storage.StorageError as error:
            raise CorpusError(f"{MANIFEST}: {error.what}", where=uri) from error
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise CorpusError(f"{MANIFEST} is not of format {FORMAT}", where=uri, fix="build the corpus again")
        return cls(uri, manifest)

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over the checksums of all shards."""
        return str(self.manifest["digest"])

    @property
    def splits(self) -> dict[str, int]:
        """Rows per split."""
        return {name: split["rows"] for name, split in self.manifest["splits"].items()}

    @property
    def kind(self) -> Kind:
        """What a row pairs: an image with a text, a query with a text, or nothing (a text alone)."""
        kind: Kind = self.manifest.get("kind", "image_text")
        return kind

    @property
    def image_limits(self) -> ImageLimits:
        """The limits that the corpus was built under; what it holds has passed them."""
        return ImageLimits.model_validate(self.manifest.get("config", {}).get("image_limits", {}))

    def rows(self, split: str) -> int:
        """Rows of `split`. Raises CorpusError naming the splits there are."""
        self._files(split)
        return self.splits[split]

    def row_groups(self, split: str) -> list[RowGroup]:
        """Every row group of `split`, in file order. Reads footers only, O(files).

        Raises CorpusError for a file that is missing, unreadable or of another schema.
        """
        entries = self._files(split)
        files = [storage.join(self.uri, entry["file"]) for entry in entries]
        groups: list[RowGroup] = []
        first = 0
        with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
            for file, entry, sizes in zip(files, entries, pool.map(_group_rows, files), strict=True):
                if sum(sizes) != entry["rows"]:
                    raise CorpusError(f"has {sum(sizes)} rows, its manifest says {entry['rows']}", where=file)
                for index, rows in enumerate(sizes):
                    groups.append(RowGroup(file, index, rows, first))
                    first += rows
        return groups

    def column(self, split: str, name: str) -> list[Any]:
        """One column of a split as a list. For small columns of small splits: all of it comes into memory."""
        values: list[Any] = []
        for entry in self._files(split):
            values += open_shard(storage.join(self.uri, entry["file"])).read(columns=[name]).column(0).to_pylist()
        return values

    def verify(self) -> None:
        """Compares every shard with its checksum. Raises CorpusError naming the first that differs."""
        for split in self.splits:
            for entry in self._files(split):
                file = storage.join(self.uri, entry["file"])
                if not storage.exists(file):
                    raise CorpusError("the shard is missing", where=file, fix="build the corpus again")
                if storage.sha256_file(file) != entry["sha256"]:
                    raise CorpusError("the checksum of the shard differs", where=file, fix="build the corpus again")

    def _files(self, split: str) -> list[dict[str, Any]]:
        splits = self.manifest["splits"]
        if split not in splits:
            known = ", ".join(splits) or "none"
            raise CorpusError(f"there is no split {split!r}", where=self.uri, fix=f"splits there: {known}")
        files: list[dict[str, Any]] = splits[split]["files"]
        return files


def parquet_bytes(table: pa.Table, row_group_rows: int) -> bytes:
    """A table as a Parquet file: page checksums, so that a flipped bit is an error and not a wrong row."""
    sink = pa.BufferOutputStream()
    # Of long values, statistics are copies: every reader would carry images about in the footers.
    statistics = [name for name in table.column_names if name not in _LONG]
    pq.write_table(
        table,
        sink,
        row_group_size=row_group_rows,
        compression="zstd",
        write_page_checksum=True,
        write_statistics=statistics,
    )
    return bytes(sink.getvalue())


def read_row_group(group: RowGroup, columns: Sequence[str], shard: pq.ParquetFile | None = None) -> pa.Table:
    """The columns of one row group, page checksums verified (pyarrow reads a flipped bit silently otherwise).

    `shard`: the file, opened before by `open_shard`. Raises CorpusError if the row group is corrupt or missing,
    StorageError if the storage does not answer.
    """
    shard = shard or open_shard(group.file)
    try:
        return shard.read_row_group(group.index, columns=list(columns))
    except (OSError, pa.ArrowInvalid) as error:
        _raise_outage(error, group.file)
        raise CorpusError(
            f"row group {group.index} is corrupt ({error})", where=group.file, fix="build the corpus again"
        ) from error


def _group_rows(file: str) -> list[int]:
    metadata = open_shard(file).metadata
    return [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]


def open_shard(file: str, footer: pq.FileMetaData | None = None) -> pq.ParquetFile:
    """A shard with its schema checked; `footer`, if it is known, is not read again. Raises as `read_row_group` does."""
    fs, path = storage.filesystem(file)
    try:
        parquet = pq.ParquetFile(path, filesystem=fs, metadata=footer, page_checksum_verification=True)
    except FileNotFoundError as error:
        raise CorpusError("the shard is missing", where=file, fix="build the corpus again") from error
    except (OSError, pa.ArrowInvalid) as error:
        _raise_outage(error, file)
        raise CorpusError(f"not a readable Parquet file ({error})", where=file) from error
    if not parquet.schema_arrow.equals(SCHEMA):
        raise CorpusError(f"has the schema {parquet.schema_arrow.names}, expected {SCHEMA.names}", where=file)
    return parquet


def _raise_outage(error: Exception, file: str) -> None:
    # What cannot be had now is not corrupt: to set its rows aside would make the data depend on the network.
    if storage.is_store_failure(error):
        raise storage.storage_error(error, file, "read") from error
