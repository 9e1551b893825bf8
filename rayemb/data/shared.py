"""Decoded rows that trainings on one machine share: the trials of a sweep see the same batches at the same steps."""

import contextlib
import json
import os
import shutil
import tempfile
import uuid
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayemb import storage
from rayemb.data.decode import BadRow, Piece

Decoded = tuple[dict[str, NDArray[Any]], list[BadRow]]
_BAD = "__bad__"


@dataclass(frozen=True)
class Shared:
    """What is shared under a `name`: `key` is of all that decides what a piece becomes, `limit` bytes of all keys."""

    name: str
    key: str
    limit: int


def shared_folder(name: str) -> Path:
    """The folder of that name on this machine, this user's alone."""
    return Path(tempfile.gettempdir()) / f"rayemb-shared-{os.getuid()}" / name


def forget(name: str) -> None:
    """Removes what is shared under a name on this machine."""
    shutil.rmtree(shared_folder(name), ignore_errors=True)


class SharedPieces:
    """A decoder whose answers other processes find, and which finds theirs; the arrays are the same either way.

    Once `limit` is reached nothing more is written: the first steps are what all trials of a sweep come by. Files hold
    plain arrays, never pickles.
    """

    def __init__(self, decoder: Callable[[Piece], Decoded], shared: Shared) -> None:
        self._decoder, self._limit = decoder, shared.limit
        self._top = shared_folder(shared.name)
        self._folder = self._top / shared.key
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        owner = self._top.parent.stat()
        if owner.st_uid != os.getuid():
            raise storage.StorageError(
                "the folder for shared rows belongs to another user", where=str(self._top.parent)
            )
        self._top.parent.chmod(0o700)
        self.hits = 0

    def __call__(self, piece: Piece) -> Decoded:
        """See `Decoder`."""
        path = self._folder / f"{piece.step:09d}-{_digest(piece)}.npz"
        # A file that cannot be read is as good as none.
        with contextlib.suppress(OSError, ValueError, KeyError, zipfile.BadZipFile):
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
            bad = [BadRow(*row) for row in json.loads(arrays.pop(_BAD).tobytes())]
            self.hits += 1
            return arrays, bad
        arrays, bad = self._decoder(piece)
        if self._used() + sum(values.nbytes for values in arrays.values()) <= self._limit:
            self._write(path, arrays, bad)
        return arrays, bad

    def _used(self) -> int:
        total = 0
        for folder, _, names in os.walk(self._top):
            for name in names:
                with contextlib.suppress(OSError):
                    total += os.stat(os.path.join(folder, name)).st_size
        return total

    def _write(self, path: Path, arrays: dict[str, NDArray[Any]], bad: list[BadRow]) -> None:
        temporary = path.with_name(f"{uuid.uuid4().hex}.tmp")
        note = np.frombuffer(json.dumps(bad).encode(), np.uint8)
        try:
            with temporary.open("wb") as file:
                np.savez(file, **{_BAD: note}, **arrays)  # type: ignore[arg-type]
            os.replace(temporary, path)
        except OSError:  # a full disk: the rows are decoded all the same
            temporary.unlink(missing_ok=True)


def _digest(piece: Piece) -> str:
    parts = [f"{corpus}:{len(ordinals)}:".encode() + ordinals.tobytes() for corpus, ordinals in piece.parts]
    return storage.sha256_bytes(b"|".join(parts))[:24]
