"""URIs to filesystems, through pyarrow.fs: the same calls for `file://`, `s3://` and plain paths."""

import json
import os
import re
import tempfile
import uuid
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pyarrow.fs as pafs

from rayemb.errors import RayembError

_SCHEMES = ("file", "s3")


class StorageError(RayembError):
    """A URI that cannot be used, or a file that is not there."""


def normalise(uri: str) -> str:
    """`uri` in the one form that artefacts store: an absolute path, or `s3://bucket/key`, without a trailing slash.

    Raises StorageError for a scheme that is neither `file` nor `s3`.
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
        return os.path.abspath(parts.path)
    return uri.rstrip("/")


def filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The pyarrow filesystem of `uri` and the path inside it.

    S3 endpoint, region and credentials come from the environment in the AWS names
    (`AWS_ENDPOINT_URL`, `AWS_REGION`, `AWS_ACCESS_KEY_ID`, ...), which Ray passes to its workers.
    """
    uri = normalise(uri)
    if not uri.startswith("s3://"):
        return pafs.LocalFileSystem(), uri
    # pyarrow's own reading of these variables depends on its build and version (26.0 ignores them): passed in here.
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return pafs.S3FileSystem(endpoint_override=endpoint), uri.removeprefix("s3://")


def join(uri: str, *parts: str) -> str:
    """`uri/part/...`. Raises StorageError for a part that would climb out (`..`, an absolute path)."""
    for part in parts:
        if not part or part.startswith("/") or ".." in part.split("/"):
            raise StorageError(f"{part!r} leaves its folder", where=uri, fix="name a file inside it")
    return "/".join([normalise(uri), *parts])


def exists(uri: str) -> bool:
    """Whether a file or a folder lies at `uri`."""
    fs, path = filesystem(uri)
    return bool(fs.get_file_info(path).type != pafs.FileType.NotFound)


def list_files(uri: str, suffix: str = "") -> list[str]:
    """Sorted URIs of the files below folder `uri` whose names end in `suffix`; empty if there is no such folder."""
    fs, path = filesystem(uri)
    selector = pafs.FileSelector(path, recursive=True, allow_not_found=True)
    files = [info.path for info in fs.get_file_info(selector) if info.type == pafs.FileType.File]
    prefix = "s3://" if normalise(uri).startswith("s3://") else ""
    return sorted(prefix + file for file in files if file.endswith(suffix))


def read_bytes(uri: str) -> bytes:
    """The whole file at `uri`. Raises StorageError if it is not there."""
    fs, path = filesystem(uri)
    try:
        with fs.open_input_stream(path) as stream:
            return bytes(stream.read())
    except (FileNotFoundError, OSError) as error:
        raise StorageError(f"cannot read it ({_reason(error)})", where=uri) from error


def write_bytes(uri: str, data: bytes) -> None:
    """Writes the file at `uri` in one atomic step: a reader sees the old content or the new, never a part.

    Local files go through a temporary name in the same folder, fsync and rename; an S3 put is atomic by itself.
    """
    fs, path = filesystem(uri)
    if not isinstance(fs, pafs.LocalFileSystem):
        with fs.open_output_stream(path) as out:
            out.write(data)
        return
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        Path(temporary).unlink(missing_ok=True)
        raise StorageError(f"cannot write it ({_reason(error)})", where=uri) from error


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
    kind = fs.get_file_info(path).type
    if kind == pafs.FileType.Directory:
        fs.delete_dir(path)
    elif kind == pafs.FileType.File:
        fs.delete_file(path)


def local_path(uri: str, cache: str | None = None) -> str:
    """A path on this machine with the content of `uri`: the file itself, or a copy of the S3 object.

    The copy goes to `cache` (default: a folder in the temporary directory) under a name that depends on the
    object's URI, size and time of change, so that it is fetched once and never stale.
    """
    fs, path = filesystem(uri)
    if isinstance(fs, pafs.LocalFileSystem):
        return path
    info = fs.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        raise StorageError("there is no such file", where=uri)
    from rayemb.storage.digest import sha256_bytes

    name = sha256_bytes(f"{uri}|{info.size}|{info.mtime_ns}".encode())[:32]
    folder = Path(cache or os.path.join(tempfile.gettempdir(), "rayemb-cache"))
    target = folder / f"{name}-{path.rsplit('/', 1)[-1]}"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f"{target.name}.{uuid.uuid4().hex}.tmp"
        pafs.copy_files(path, str(temporary), source_filesystem=fs, destination_filesystem=pafs.LocalFileSystem())
        os.replace(temporary, target)
    return str(target)


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
