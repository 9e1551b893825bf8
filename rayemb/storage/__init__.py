"""Where artefacts live: URIs (`file://`, `s3://`, plain paths), atomic writes, digests."""

from rayemb.storage.config import StorageConfig, attempts, environment
from rayemb.storage.digest import sha256_bytes, sha256_file
from rayemb.storage.errors import MissingError, StorageError, UnreadableError, is_store_failure, storage_error
from rayemb.storage.uri import (
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
    writing,
)
from rayemb.storage.whole import whole_files

__all__ = [
    "MissingError",
    "StorageConfig",
    "StorageError",
    "UnreadableError",
    "attempts",
    "delete",
    "environment",
    "exists",
    "filesystem",
    "is_store_failure",
    "join",
    "lance_options",
    "list_files",
    "local_path",
    "normalise",
    "read_bytes",
    "read_json",
    "sha256_bytes",
    "sha256_file",
    "storage_error",
    "whole_files",
    "write_bytes",
    "write_json",
    "writing",
]
