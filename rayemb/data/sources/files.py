"""What all sources of files share: finding them, opening them, and what is done with a damaged one."""

import contextlib
import dataclasses
import io
import os
import re
import tarfile
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import pyarrow as pa
from pydantic import Field, field_validator

from rayemb import storage
from rayemb.data.corpus import Kind
from rayemb.data.sources.base import RawRow, Source, SourceError
from rayemb.data.sources.columns import Bad, Columns, to_row
from rayemb.data.sources.images import THREADS, with_images

BUFFER = 8 << 20  # one request to S3
PACKED = ("", ".gz", ".zst", ".bz2")
_CODECS = {".gz": "gzip", ".tgz": "gzip", ".zst": "zstd", ".bz2": "bz2"}


class DamageError(Exception):
    """A file, or the rest of it, that cannot be read."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one task reads: a file or a part of one that can be found without reading what lies before it."""

    file: str
    name: str = ""  # of the file, in ids: its path below the folder that all files of the source share
    part: int | None = None  # row group, fragment
    start: int = 0  # first row or byte
    stop: int | None = None  # byte after the last
    rows: int = 1  # that it holds, where the file tells
    split: str = ""
    damage: str = ""  # why it cannot be read, if that was seen when planning

    @property
    def place(self) -> str:
        """The file and the part of it."""
        return self.file if self.part is None else f"{self.file} part {self.part}"


@dataclasses.dataclass(frozen=True)
class Record:
    """One row as its file has it: values by column, or the reason why it has none."""

    values: Mapping[str, Any] | Bad
    at: str  # "row 17"
    key: str  # its number, for rows without an id


class FileSource(Source):
    """Files under a column mapping. Damaged ones are set aside like bad rows; what was read before the damage stays."""

    uri: str | list[str] = Field(description="a file, a folder, a glob (`*`, `**`, `?`, `[...]`), or a list of these")
    columns: Columns = Columns()
    image_root: str | None = Field(
        None, description="folder or s3:// prefix that image URIs start at and must not leave; null: none is followed"
    )
    suffixes: ClassVar[tuple[str, ...]] = ()

    @field_validator("uri")
    @classmethod
    def _some(cls, value: str | list[str]) -> str | list[str]:
        if not value:
            raise ValueError("name at least one file")
        return value

    @property
    def kind(self) -> Kind:
        """What a row pairs."""
        return self.columns.kind

    def units(self, seed: int) -> list[Any]:
        """The pieces of every file in the order of their names, after each schema was checked.

        Raises SourceError for a file of another schema, and if no file can be read.
        """
        files = self._find()
        names = _short_names([file for file, _ in files])
        with ThreadPoolExecutor(THREADS) as pool:
            found = list(pool.map(self._planned, [file for file, _ in files]))
        pieces = [
            dataclasses.replace(piece, name=name, split=split)
            for (_, split), name, planned in zip(files, names, found, strict=True)
            for piece in planned
        ]
        if pieces and all(piece.damage for piece in pieces):
            first = pieces[0]
            raise SourceError(
                f"none of the {len(pieces)} files can be read; {first.file}: {first.damage}", where="corpus.source.uri"
            )
        return pieces

    def read(self, unit: Any) -> Iterator[RawRow]:
        """The rows of one piece; if it is damaged, one more that says where and how."""
        yield from with_images(self._mapped(unit), self.image_root)

    def _mapped(self, piece: Piece) -> Iterator[tuple[RawRow, str | None]]:
        seen, last = 0, ""
        try:
            if piece.damage:
                raise DamageError(piece.damage)
            for record in self._records(piece):
                seen, last = seen + 1, f" after {record.at}"
                source, key = f"{piece.file} {record.at}", f"{piece.name}#{record.key}"
                if isinstance(record.values, Bad):
                    problem = (record.values.reason, record.values.what)
                    yield RawRow(id="", image=None, text=None, source=source, problem=problem), None
                else:
                    yield to_row(record.values, self.columns, source=source, key=key, split=piece.split)
        except DamageError as error:
            problem = ("corrupt_file", " ".join(str(error).split())[:500])
            lost = max(1, piece.rows - seen)
            yield RawRow("", None, None, f"{piece.place}{last}", problem=problem, count=lost), None

    def _find(self) -> list[tuple[str, str]]:
        """Every file with the split that its place stands for ("" where it stands for none)."""
        return [(file, "") for file in find_files(self.uri, self.suffixes)]

    def _planned(self, file: str) -> list[Piece]:
        try:
            return self._plan(file)
        except storage.MissingError:
            return [Piece(file, damage="the file is missing")]  # that another file lists
        except DamageError as error:
            return [Piece(file, damage=" ".join(str(error).split())[:500])]

    @abstractmethod
    def _plan(self, file: str) -> list[Piece]:
        """The pieces of one file, its schema checked. Raises DamageError, SourceError, StorageError."""

    @abstractmethod
    def _records(self, piece: Piece) -> Iterator[Record]:
        """The rows of a piece in their order. Raises DamageError where it cannot go on, StorageError."""


def peek(records: Iterator[Record], count: int) -> list[Mapping[str, Any]]:
    """The values of the first rows. Raises DamageError if there is none: later damage costs only what follows it."""
    found: list[Mapping[str, Any]] = []
    seen = 0
    try:
        for record in records:
            seen += 1
            if not isinstance(record.values, Bad):
                found.append(record.values)
            if seen == count:
                break
    except DamageError:
        if not seen:
            raise
    return found


@contextlib.contextmanager
def reading(file: str) -> Iterator[None]:
    """Tells a store that failed (StorageError) from a file that is damaged (DamageError)."""
    try:
        yield
    except (OSError, ValueError, EOFError, RuntimeError, tarfile.TarError, pa.ArrowMemoryError) as error:
        # Memory: a damaged length asks for petabytes.
        if isinstance(error, SourceError):
            raise
        if storage.is_store_failure(error):
            raise storage.storage_error(error, file, "read", storage.attempts()) from error
        raise DamageError(f"{type(error).__name__}: {error}") from error


def open_seekable(file: str) -> pa.NativeFile:
    """The file for reads at any place. Raises StorageError."""
    fs, path = storage.filesystem(file)
    with reading(file):
        return fs.open_input_file(path)


def open_stream(file: str, start: int = 0) -> io.BufferedReader:
    """The bytes of the file from `start`, unpacked by its suffix, a few MB at a time."""
    fs, path = storage.filesystem(file)
    codec = _CODECS.get(os.path.splitext(file)[1].lower())
    with reading(file):
        if start:
            raw = fs.open_input_file(path)
            raw.seek(start)
        else:
            raw = fs.open_input_stream(path, compression=None)
        if codec:
            packed = io.BufferedReader(raw, BUFFER)
            if not packed.peek(1):  # which pyarrow takes for a packed file of nothing
                raise DamageError("the file is empty")
            raw = pa.CompressedInputStream(packed, codec)
        return io.BufferedReader(raw, BUFFER if not codec else 1 << 20)


def find_files(uris: str | Sequence[str], suffixes: tuple[str, ...]) -> list[str]:
    """The URIs of all files that `uris` name, each once, sorted within each of them.

    A folder stands for the files below it that end in one of `suffixes`; a glob for what it matches. Names that begin
    with `_` or `.` are no data, as for all readers of such folders. Raises SourceError for one that names nothing.
    """
    found: dict[str, None] = {}
    for uri in [uris] if isinstance(uris, str) else uris:
        files = glob(uri) if is_glob(uri) else _named(uri, suffixes)
        if not files:
            ends = f" that end in {', '.join(suffixes)}" if not is_glob(uri) else ""
            raise SourceError(f"there are no files{ends}", where=f"corpus.source.uri={uri}")
        found.update(dict.fromkeys(files))
    return list(found)


def find_folders(uris: str | Sequence[str], holding: str) -> list[str]:
    """The URIs of all folders that `uris` name; a glob stands for the folders it matches that hold files `holding`."""
    found: dict[str, None] = {}
    for uri in [uris] if isinstance(uris, str) else uris:
        folders = glob(uri, f"/{holding}") if is_glob(uri) else [storage.normalise(uri)]
        if not folders:
            raise SourceError("it matches no dataset", where=f"corpus.source.uri={uri}")
        found.update(dict.fromkeys(folders))
    return list(found)


def _named(uri: str, suffixes: tuple[str, ...]) -> list[str]:
    root = storage.normalise(uri)
    fs, path = storage.filesystem(root)
    with reading(root):
        if fs.get_file_info(path).is_file:
            return [root]
    return [file for file in storage.list_files(root) if file.lower().endswith(suffixes) and _is_data(file, root)]


def is_glob(uri: str) -> bool:
    """Whether `uri` is a pattern. A file that really has brackets in its name is meant itself."""
    return bool(re.search(r"[*?\[]", uri)) and not storage.exists(uri)


def glob(uri: str, inside: str = "") -> list[str]:
    """The files that the pattern `uri` matches; with `inside`, the folders that it matches and that hold such files."""
    pattern = storage.normalise(uri)
    root = re.split(r"[*?\[]", pattern, maxsplit=1)[0].rpartition("/")[0]
    if root in ("", "s3:/"):
        raise SourceError("a glob begins with the name of a folder", where=f"corpus.source.uri={uri}")
    match = re.compile(f"({_pattern(pattern)}){_pattern(inside)}")
    found = {hit[1] for file in storage.list_files(root) if (hit := match.fullmatch(file))}
    return sorted(file for file in found if _is_data(file, root))


def _pattern(glob: str) -> str:
    """`**/` stands for any folders, `*` and `?` stay within one name."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]/]+\])", glob)
    special = {"**/": "(?:[^/]+/)*", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return "".join(
        special.get(part) or (part.replace("[!", "[^", 1) if part[:1] == "[" and part[-1:] == "]" else re.escape(part))
        for part in parts
    )


def _is_data(file: str, root: str) -> bool:
    return not any(part.startswith(("_", ".")) for part in file.removeprefix(f"{root}/").split("/"))


def _short_names(files: list[str]) -> list[str]:
    """Each file's path below the deepest folder that holds them all: ids do not change when the data moves."""
    parts = [file.removeprefix("s3://").strip("/").split("/") for file in files]
    depth = min(len(path) for path in parts) - 1
    while depth and len({tuple(path[:depth]) for path in parts}) > 1:
        depth -= 1
    return ["/".join(path[depth:]) for path in parts]
