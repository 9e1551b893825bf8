"""Content digests (SHA-256, lower-case hex)."""

import hashlib

from rayemb.storage.uri import _named, filesystem

_CHUNK = 1 << 22


def sha256_bytes(data: bytes) -> str:
    """SHA-256 of `data` as hex."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(uri: str) -> str:
    """SHA-256 of the file at `uri` as hex, read in 4 MiB pieces (memory flat in the file's size).

    Raises MissingError if it is not there, StorageError if it cannot be read.
    """
    fs, path = filesystem(uri)
    digest = hashlib.sha256()
    with _named(uri, "read"), fs.open_input_stream(path, compression=None) as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
