"""WebDataset: tar files whose members `key.ext` of one key are one sample."""

import tarfile
from collections.abc import Iterator
from typing import Any, ClassVar, Literal, Self

from pydantic import Field

from rayemb.data.sources.columns import Bad, Columns
from rayemb.data.sources.files import DamageError, FileSource, Piece, Record, open_stream, peek, reading
from rayemb.data.sources.images import IMAGE_SUFFIXES, MAX_BYTES
from rayemb.data.sources.jsonl import check_rows, parse_object

PEEK = 5


class TarColumns(Columns):
    """Which part of a sample means what: `__key__`, an extension (`txt`, `jpg`), a field of its `.json`, or `image`
    for the member whose extension is that of an image.
    """

    id: str | None = Field("__key__", description="unique name of the row; null: made of file and sample number")
    text: str | None = Field("txt", description="the text; null: the first of texts")


class _StrictInfo(tarfile.TarInfo):
    """Headers that may not be broken: tarfile takes a damaged one for the end of the archive, and says nothing."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"the archive breaks off at byte {archive.offset} ({error})") from error


class WebDatasetSource(FileSource):
    """Tar files, plain or packed (.gz, .zst, .bz2); a unit is a file. Nothing is unpacked to disk.

    Members of one key must stand together, as the format asks for; an extension that comes twice begins another sample
    of the same key. The key is the member's path up to the first dot of its name, and never anything but a name.
    """

    name: Literal["webdataset"] = "webdataset"
    columns: TarColumns = TarColumns()
    suffixes: ClassVar[tuple[str, ...]] = (".tar", ".tgz", ".tar.gz", ".tar.zst", ".tar.bz2")

    def _plan(self, file: str) -> list[Piece]:
        check_rows(self, peek(self._records(Piece(file)), PEEK), file)
        return [Piece(file)]

    def _records(self, piece: Piece) -> Iterator[Record]:
        with reading(piece.file), open_stream(piece.file) as stream:
            for number, (key, members) in enumerate(_samples(stream)):
                yield Record(self._values(key, members), f"sample {number} ({key})", str(number))

    def _values(self, key: str, members: dict[str, bytes | None]) -> dict[str, Any] | Bad:
        too_large = [name for name, data in members.items() if data is None]
        if too_large:
            return Bad("large_member", f"the member {key}.{too_large[0]} has over {MAX_BYTES:,} bytes")
        fields = parse_object(members["json"] or b"") if "json" in members else {}
        if isinstance(fields, Bad):
            return Bad(fields.reason, f"{key}.json: {fields.what}")
        values: dict[str, Any] = {**fields, **members, "__key__": key}
        images = [name for name in members if name.rsplit(".", 1)[-1] in _IMAGES]
        if "image" not in members and images:
            values["image"] = members[images[0]]
        for column in self.columns.names:
            if column in members:
                values[column] = members[column] if column == self.columns.image else _text(members[column])
        return values


_IMAGES = {suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES}


def _text(data: bytes | None) -> str | Bad:
    try:
        return (data or b"").decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Bad("bad_utf8", f"not valid UTF-8 ({error.reason} at byte {error.start})")


def _samples(stream: Any) -> Iterator[tuple[str, dict[str, bytes | None]]]:
    """The samples of an archive: key, and content by extension (None: too large to hold)."""
    key: str | None = None
    members: dict[str, bytes | None] = {}
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=_StrictInfo) as archive:
        for member in archive:
            archive.members = []  # type: ignore[attr-defined]  # it would keep every header
            folder, slash, base = member.name.rpartition("/")
            stem, dot, extension = base.partition(".")
            if not member.isfile() or not dot or base.startswith((".", "__")):
                continue
            name, extension = f"{folder}{slash}{stem}", extension.lower()
            if name != key or extension in members:
                if key is not None and members:
                    yield key, members
                key, members = name, {}
            members[extension] = _content(archive, member)
    if key is not None and members:
        yield key, members


def _content(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes | None:
    if member.size > MAX_BYTES:
        return None
    file = archive.extractfile(member)
    data = file.read() if file else b""
    if len(data) < member.size:
        raise DamageError(f"the archive breaks off within {member.name}")
    return data
