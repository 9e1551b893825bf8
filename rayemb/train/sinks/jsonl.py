"""Metrics as lines of JSON in the run's own folder: every run has them, and `rayemb report` reads them."""

import json
import math
from collections.abc import Sequence
from typing import Any

from rayemb import storage
from rayemb.train.sinks.base import Row, Run, Sink

FOLDER, ABOUT = "metrics", "run.json"
# An object store does not append: the last file is written anew, whole, and must stay small.
SEGMENT = 500


class JSONLines(Sink):
    """Files `metrics/00000.jsonl`, ... of at most 500 rows, each written in one atomic step; and `run.json`."""

    def __init__(self) -> None:
        self._folder = ""
        self._tail: list[str] = []
        self._number = 0

    def begin(self, run: Run, step: int | None) -> None:
        """See `Sink.begin`."""
        self._folder = storage.join(run.uri, FOLDER)
        rows = read_rows(run.uri)
        kept = [row for row in rows if step is None or row["step"] <= step]
        full, rest = divmod(len(kept), SEGMENT)
        self._number, self._tail = full, [_line(row) for row in kept[len(kept) - rest :]]
        if len(kept) < len(rows):
            self._put()
            for file in storage.list_files(self._folder, ".jsonl"):
                if file > self._file():
                    storage.delete(file)
        about = {"format": 1, "name": run.name, "config": dict(run.config), "tags": dict(run.tags)}
        storage.write_json(storage.join(run.uri, ABOUT), about)

    def write(self, rows: Sequence[Row]) -> None:
        """See `Sink.write`. Rows that could not be written come with the next ones."""
        self._tail += [_line(row) for row in rows]
        while len(self._tail) > SEGMENT:
            rest = self._tail[SEGMENT:]
            self._tail = self._tail[:SEGMENT]
            try:
                self._put()
            except BaseException:
                self._tail += rest
                raise
            self._number, self._tail = self._number + 1, rest
        self._put()

    def close(self) -> None:
        """See `Sink.close`."""

    def _put(self) -> None:
        storage.write_bytes(self._file(), "".join(self._tail).encode())

    def _file(self) -> str:
        return storage.join(self._folder, f"{self._number:05d}.jsonl")


def read_rows(run_uri: str) -> list[dict[str, Any]]:
    """The rows of a run in order; empty if there are none. Raises StorageError for what is not lines of JSON."""
    rows = []
    for file in storage.list_files(storage.join(run_uri, FOLDER), ".jsonl"):
        for number, line in enumerate(storage.read_bytes(file).decode().splitlines(), 1):
            try:
                rows.append(json.loads(line))
            except ValueError as error:
                raise storage.StorageError(f"line {number} is not JSON", where=file) from error
    return rows


def _line(row: Row) -> str:
    # NaN and infinity have no place in JSON.
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
    return json.dumps(clean, ensure_ascii=False) + "\n"
