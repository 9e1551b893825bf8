"""A filesystem for libraries that write straight to a file's last name: what is there is whole, whenever they die."""

import contextlib
import io
import os
import uuid
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
from fsspec.implementations.local import LocalFileSystem


def whole_files(fs: pafs.FileSystem) -> pafs.FileSystem:
    """`fs`, with files that appear in one step when they are closed. Stores other than the local disk do so anyway."""
    return pafs.PyFileSystem(_Local()) if isinstance(fs, pafs.LocalFileSystem) else fs


class _Local(pafs.FSSpecHandler):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__(LocalFileSystem())

    def open_output_stream(self, path: str, metadata: object) -> pa.NativeFile:
        return pa.PythonFile(_Whole(path), mode="w")


class _Whole(io.BufferedWriter):
    """A file that is written under another name until it is closed."""

    def __init__(self, path: str) -> None:
        self._path, self._temporary = path, f"{path}.{uuid.uuid4().hex}.tmp"
        self._failed: OSError | None = None
        super().__init__(io.FileIO(self._temporary, "wb"))

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self._failed = error
            raise

    def close(self) -> None:
        if self.closed:
            return
        try:
            if self._failed is not None:  # who writes closes nevertheless: what is missing must not be taken for whole
                raise self._failed
            self.flush()
            os.fsync(self.fileno())
            super().close()
            os.replace(self._temporary, self._path)
        except BaseException:
            with contextlib.suppress(OSError):
                self.raw.close()
            with contextlib.suppress(OSError):
                os.unlink(self._temporary)
            raise
