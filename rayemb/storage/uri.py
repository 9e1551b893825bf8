"""URIs to filesystems, through pyarrow.fs: the same calls for `file://`, `s3://` and plain paths."""

import contextlib
import json
import os
import re
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs

from rayemb.storage.config import attempts, lance_s3_options, s3_filesystem
from rayemb.storage.errors import StorageError, storage_error

_SCHEMES = ("file", "s3")


def normalise(uri: str) -> str:
    """`uri` in the one form that artefacts store: an absolute path, or `s3://bucket/key`, without a trailing slash.

    Raises StorageError for a scheme that is neither `file` nor `s3`, and for S3 without a bucket.
    """
    match = re.match(r"^([A-Za-z][A-Za-z0-9+.-]+)://", uri)
    if match is None:
        return os.path.abspath(os.path.expanduser(uri))
    scheme = match.group(1).lower()
    if scheme not in _SCHEMES:
        raise StorageError(f"unknown scheme {scheme!r}", where=uri, fix="use a path, file:// or s3://")
    if scheme == "file":
        parts = urlsplit(uri)
        if parts.netloc not in ("", "localhost"):
            raise StorageError("a file URI has three slashes", where=uri, fix=f"file:///{parts.netloc}{parts.path}")
        return os.path.abspath(unquote(parts.path))
    key = uri[match.end() :].rstrip("/")
    if not key or key.startswith("/"):
        raise StorageError("an S3 URI names a bucket", where=uri, fix="write s3://bucket/key")
    return f"s3://{key}"


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The pyarrow filesystem of `uri` and the path inside it.

    S3 endpoint, region, credentials, retries and timeouts come from the environment: the AWS names
    (`AWS_ENDPOINT_URL`, `AWS_REGION`, `AWS_ACCESS_KEY_ID`, ...) and what `StorageConfig` adds to them.
    """
    uri = normalise(uri)
    if not uri.startswith("s3://"):
        return pafs.LocalFileSystem(), uri
    return s3_filesystem(), uri.removeprefix("s3://")


def lance_options(uri: str) -> dict[str, str]:
    """The `storage_options` that Lance needs for `uri` beside the environment."""
    return lance_s3_options() if normalise(uri).startswith("s3://") else {}


@contextlib.contextmanager
def _named(uri: str, doing: str) -> Iterator[None]:
    """Turns pyarrow's and the system's errors into a StorageError that names `uri`."""
    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        raise storage_error(error, uri, doing, attempts()) from error


def join(uri: str, *parts: str) -> str:
    """`uri/part/...`. Raises StorageError for a part that would climb out (`..`, an absolute path)."""
    for part in parts:
        if not part or part.startswith("/") or ".." in part.split("/"):
            raise StorageError(f"{part!r} leaves its folder", where=uri, fix="name a file inside it")
    return "/".join([normalise(uri), *parts])


def exists(uri: str) -> bool:
    """Whether a file or a folder lies at `uri`."""
    fs, path = filesystem(uri)
    with _named(uri, "look at"):
        return bool(fs.get_file_info(path).type != pafs.FileType.NotFound)


def list_files(uri: str, suffix: str = "") -> list[str]:
    """Sorted URIs of the files below folder `uri` whose names end in `suffix`; empty if there is no such folder."""
    fs, path = filesystem(uri)
    selector = pafs.FileSelector(path, recursive=True, allow_not_found=True)
    with _named(uri, "list"):
        files = [info.path for info in fs.get_file_info(selector) if info.type == pafs.FileType.File]
    prefix = "s3://" if normalise(uri).startswith("s3://") else ""
    return sorted(prefix + file for file in files if file.endswith(suffix))


def read_bytes(uri: str, limit: int | None = None) -> bytes:
    """The file at `uri`, or its first `limit` bytes. Raises MissingError if it is not there, UnreadableError if it is
    no file that can be read, StorageError if the store fails.
    """
    fs, path = filesystem(uri)
    # No compression: pyarrow would unpack whatever is called .gz, and its digest would be that of other bytes.
    with _named(uri, "read"), fs.open_input_stream(path, compression=None) as stream:
        return bytes(stream.read() if limit is None else stream.read(limit))


def write_bytes(uri: str, data: bytes) -> None:
    """Writes the file at `uri` in one atomic step: a reader sees the old content or the new, never a part.

    Local files go through a temporary name in the same folder, fsync and rename; an S3 put is atomic by itself.
    """
    fs, path = filesystem(uri)
    if not isinstance(fs, pafs.LocalFileSystem):
        with _named(uri, "write"), fs.open_output_stream(path, compression=None) as out:
            out.write(data)
        return
    with _named(uri, "write"):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = f"{path}.{uuid.uuid4().hex}.tmp"
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def writing(uri: str) -> Iterator[str]:
    """A local path to write a file of any size at, without holding it; at the end it becomes the file at `uri`.

    In one atomic step, as `write_bytes`; nothing is left behind if the body raises. Raises StorageError.
    """
    fs, path = filesystem(uri)
    local = isinstance(fs, pafs.LocalFileSystem)
    folder, name = os.path.split(path)
    temporary = os.path.join(folder if local else tempfile.gettempdir(), f"{name}.{uuid.uuid4().hex}.tmp")
    with _named(uri, "write"):
        os.makedirs(os.path.dirname(temporary), exist_ok=True)
    try:
        yield temporary
        with _named(uri, "write"):
            if local:
                with open(temporary, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(temporary, path)
            else:
                pafs.copy_files(temporary, path, source_filesystem=pafs.LocalFileSystem(), destination_filesystem=fs)
    finally:
        Path(temporary).unlink(missing_ok=True)


def read_json(uri: str) -> Any:
    """The JSON document at `uri`. Raises StorageError if it is missing or is not JSON."""
    try:
        return json.loads(read_bytes(uri))
    except ValueError as error:
        if isinstance(error, StorageError):
            raise
        raise StorageError("not a JSON document", where=uri) from error


def write_json(uri: str, document: Any) -> None:
    """Writes `document` as indented UTF-8 JSON, atomically."""
    write_bytes(uri, (json.dumps(document, indent=2, ensure_ascii=False) + "\n").encode())


def delete(uri: str) -> None:
    """Removes the file or the folder at `uri`; silent if there is none."""
    fs, path = filesystem(uri)
    with _named(uri, "delete"):
        kind = fs.get_file_info(path).type
        if kind == pafs.FileType.Directory:
            fs.delete_dir(path)
        elif kind == pafs.FileType.File:
            fs.delete_file(path)


def local_path(uri: str, cache: str | None = None) -> str:
    """A path on this machine with the content of `uri`: the file itself, or a copy of the S3 object.

    The copy goes to `cache` (default: a folder in the temporary directory) under a name that depends on the
    object's URI, size, time of change and ETag, so that it is fetched once and never stale. Raises StorageError.
    """
    fs, path = filesystem(uri)
    if isinstance(fs, pafs.LocalFileSystem):
        return path
    from rayemb.storage.digest import sha256_bytes

    with _named(uri, "read"), fs.open_input_stream(path, compression=None) as stream:
        # The ETag too: S3 counts time in seconds, and an object of the same size may replace another within one.
        about = {key: stream.metadata().get(key) for key in ("Content-Length", "Last-Modified", "ETag")}
    name = sha256_bytes(f"{normalise(uri)}|{about}".encode())[:32]
    folder = Path(cache or os.path.join(tempfile.gettempdir(), "rayemb-cache"))
    target = folder / f"{name}-{path.rsplit('/', 1)[-1]}"
    if not target.exists():
        temporary = folder / f"{target.name}.{uuid.uuid4().hex}.tmp"
        local = pafs.LocalFileSystem()
        with _named(uri, "copy"):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                pafs.copy_files(path, str(temporary), source_filesystem=fs, destination_filesystem=local)
                os.replace(temporary, target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
    return str(target)
