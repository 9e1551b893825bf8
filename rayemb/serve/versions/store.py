"""The catalog's document: read whole, changed by one writer at a time.

On a file system writers hold an exclusive lock (flock) on a file beside the document, from reading it to replacing it;
a writer that dies lets go of it. S3, through pyarrow, has no conditional put, but its listings are consistent: a
writer puts a claim beside the document, lists the claims, and goes on only if its own is the only one; of two that
claim at once at least one sees the other and both may step back and try again. A claim of a writer that died counts
for `CLAIM_S` seconds. So two writers could both go on only where one of them stops for that long between its look and
its put, which it checks once more before it writes.
"""

import contextlib
import fcntl
import logging
import os
import random
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

import pyarrow.fs as pafs
from pydantic import ValidationError

from rayemb import storage
from rayemb.serve.errors import ServeError
from rayemb.serve.versions.catalog import Catalog

logger = logging.getLogger(__name__)

# How long a claim on S3 counts after its writer died, and how long a writer tries.
CLAIM_S = 60.0
_TRY_S = 90.0


class CatalogError(ServeError):
    """A catalog that cannot be read, or a change of it that cannot be made."""


class ConflictError(CatalogError):
    """Somebody else has changed the catalog since it was looked at."""


class CatalogStore:
    """The catalog at one URI."""

    def __init__(self, uri: str) -> None:
        self.uri = storage.normalise(uri)

    def read(self) -> Catalog:
        """The catalog as it is now. Raises CatalogError if there is none, or none that can be read."""
        return self.parse(self.read_bytes())

    def read_bytes(self) -> bytes:
        """The document's bytes. Raises CatalogError."""
        try:
            return storage.read_bytes(self.uri)
        except storage.MissingError as error:
            fix = "make one: rayemb collection add NAME --model URI --index URI --catalog URI"
            raise CatalogError("there is no catalog here", where=self.uri, fix=fix) from error
        except storage.StorageError as error:
            raise CatalogError(f"the catalog cannot be read ({error.what})", where=self.uri) from error

    def parse(self, data: bytes) -> Catalog:
        """The catalog in `data`. Raises CatalogError naming what is wrong with it."""
        try:
            return Catalog.model_validate_json(data)
        except ValidationError as error:
            wrong = error.errors(include_url=False)[0]
            told = f"{'.'.join(map(str, wrong['loc'])) or 'it'}: {wrong['msg'].removeprefix('Value error, ')}"
            raise CatalogError(f"this is no catalog ({told})", where=self.uri, fix="restore it") from error

    def update(self, change: Callable[[Catalog], Catalog], *, revision: int | None = None) -> Catalog:
        """The catalog after `change`, which is made of what is there at that moment, with nobody else writing.

        `revision`: the change was made in view of that revision and holds for no other. Raises ConflictError if there
        is another, CatalogError, and whatever `change` raises; the catalog then stays as it is.
        """
        with self._alone() as still_alone:
            found = self.read() if storage.exists(self.uri) else Catalog()
            if revision is not None and found.revision != revision:
                told = f"the catalog is at revision {found.revision}, and the change was for {revision}"
                raise ConflictError(told, where=self.uri, fix="look at it again, then decide")
            changed = change(found).model_copy(update={"revision": found.revision + 1})
            # Through the checks of the document as a reader makes them, before anybody can read it.
            data = (changed.model_dump_json(indent=2) + "\n").encode()
            self.parse(data)
            if not still_alone():
                raise ConflictError("somebody else took over the catalog meanwhile", where=self.uri, fix="try again")
            storage.write_bytes(self.uri, data)
        return changed

    @contextlib.contextmanager
    def _alone(self) -> Iterator[Callable[[], bool]]:
        """Nobody else writes within; gives a last look at whether that still holds."""
        if self.uri.startswith("s3://"):
            with self._claimed() as still:
                yield still
            return
        path = f"{self.uri}.lock"
        try:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            handle = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise CatalogError(f"cannot lock the catalog ({error.strerror})", where=self.uri) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield lambda: True
        finally:
            os.close(handle)  # the lock goes with it

    @contextlib.contextmanager
    def _claimed(self) -> Iterator[Callable[[], bool]]:
        mine = f"{self.uri}.claims/{uuid.uuid4().hex}"
        deadline = time.monotonic() + _TRY_S
        while True:
            storage.write_bytes(mine, b"")
            try:
                if self._claims() == [mine]:
                    # While mine is there and counts, others step back.
                    yield lambda: mine in self._claims()
                    return
            finally:
                storage.delete(mine)
            if time.monotonic() > deadline:
                raise CatalogError("other writers hold the catalog", where=self.uri, fix="try again")
            # Apart by chance: of two that stepped back one comes first.
            time.sleep(random.uniform(0.02, 0.5))

    def _claims(self) -> list[str]:
        """The claims that count. One whose writer died is removed."""
        fs, path = storage.filesystem(f"{self.uri}.claims")
        infos = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
        found = []
        for info in infos:
            if info.type != pafs.FileType.File:
                continue
            uri = f"s3://{info.path}"
            if info.mtime is not None and (datetime.now(UTC) - info.mtime).total_seconds() > CLAIM_S:
                logger.warning("a writer of the catalog left its claim behind: %s", uri)
                storage.delete(uri)
            else:
                found.append(uri)
        return found
