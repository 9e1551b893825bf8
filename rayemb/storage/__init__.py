"""Where artefacts live: URIs (`file://`, `s3://`, plain paths), atomic writes, digests."""

from rayemb.storage.digest import sha256_bytes, sha256_file
from rayemb.storage.uri import (
    MissingError,
    StorageError,
    delete,
    exists,
    filesystem,
    join,
    lance_options,
    list_files,
    local_path,
    normalise,
    read_bytes,
    read_json,
    write_bytes,
    write_json,
)

__all__ = [
    "MissingError",
    "StorageError",
    "delete",
    "exists",
    "filesystem",
    "join",
    "lance_options",
    "list_files",
    "local_path",
    "normalise",
    "read_bytes",
    "read_json",
    "sha256_bytes",
    "sha256_file",
    "write_bytes",
    "write_json",
]
