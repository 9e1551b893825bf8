"""What can go wrong with a store, told apart by what a reader of many files should do next."""

import re

from rayemb.errors import RayembError


class StorageError(RayembError):
    """A URI that cannot be used, or a store that does not answer: reading other files will not help."""


class MissingError(StorageError):
    """There is no such file."""


class UnreadableError(StorageError):
    """This file cannot be read as a file (no permission, a folder, a name too long); others may."""


_SINGLE = (PermissionError, IsADirectoryError)
_SINGLE_TEXT = re.compile(r"is a directory|File name too long|Too many levels of symbolic links|Not a regular file")
# What pyarrow and Lance write when the store failed rather than the file's content. An answer of 404 or 416 (a range
# beyond the end) is about the object.
_STORE_TEXT = re.compile(r"AWS Error|Generic S3 error|HTTP error|error sending request|Generic N/A error")
_OBJECT_TEXT = re.compile(r"\b(404|416)\b|RESOURCE_NOT_FOUND|NO_SUCH_KEY|Not found")


def is_store_failure(error: BaseException) -> bool:
    """Whether the store failed (no answer, 500, a disk error), rather than the content of the file being damaged."""
    if isinstance(error, StorageError):
        return True
    text = str(error)
    if _STORE_TEXT.search(text):
        return not _OBJECT_TEXT.search(text)
    return isinstance(error, OSError) and error.errno is not None


def storage_error(error: BaseException, uri: str, doing: str, attempts: int = 1) -> StorageError:
    """The error that says which file could not be read (or written, ...) and what the store answered."""
    if isinstance(error, StorageError):
        return error
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return MissingError(f"cannot {doing} it (no such file)", where=uri)
    text = " ".join(str(error).split())
    reason = getattr(error, "strerror", None) or text
    if isinstance(error, _SINGLE) or _SINGLE_TEXT.search(str(reason)):
        return UnreadableError(f"cannot {doing} it ({str(reason)[:300]})", where=uri)
    if _STORE_TEXT.search(text):
        answer = text[text.find("AWS Error") :] if "AWS Error" in text else text
        tries = "1 attempt" if attempts == 1 else f"{attempts} attempts"
        return StorageError(
            f"cannot {doing} it (the store failed; up to {tries} a request: {answer[:400]})",
            where=uri,
            fix="see that the store is up and the credentials are right; storage.retries allows more attempts",
        )
    return StorageError(f"cannot {doing} it ({str(reason)[:300]})", where=uri)
