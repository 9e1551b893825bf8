"""Metrics as TensorBoard event files."""

import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from rayemb import storage
from rayemb.train.sinks.base import Row, Run, Sink, SinkConfig, figures, plain_name, require

UPLOAD_S = 20.0


class TensorBoardConfig(SinkConfig):
    """Event files for TensorBoard."""

    name: Literal["tensorboard"] = "tensorboard"
    uri: str | None = Field(None, description="folder; null: `tensorboard` in the run's folder")

    def build(self) -> "TensorBoard":
        """The sink."""
        # It comes with ray[tune] and writes what TensorBoard reads; the `tensorboard` package is for looking at it.
        require("tensorboardX", self.name)
        return TensorBoard(self)


class TensorBoard(Sink):
    """Writes beside the run; where that is a store, to a temporary folder whose files are copied every 20 s."""

    def __init__(self, config: TensorBoardConfig) -> None:
        self.config = config
        self._writer: Any = None
        self._temporary: str | None = None
        self._uri, self._uploaded, self._files = "", 0.0, 0

    def begin(self, run: Run, step: int | None) -> None:
        """See `Sink.begin`. Void steps stay in the files and are hidden."""
        from tensorboardX import SummaryWriter

        if self._writer is not None:
            self._writer.close()
        self._uri = storage.normalise(self.config.uri) if self.config.uri else storage.join(run.uri, "tensorboard")
        folder = self._uri
        if folder.startswith("s3://"):
            self._temporary = folder = self._temporary or tempfile.mkdtemp(prefix="rayemb-tensorboard-")
        # Files of one second differ by nothing else, and the later would replace the earlier.
        suffix = f".{os.getpid()}.{self._files:04d}"
        self._files += 1
        purge = None if step is None else step + 1
        self._writer = SummaryWriter(folder, purge_step=purge, filename_suffix=suffix)
        for name, text in run.tags.items() if purge is None or purge <= 1 else ():
            self._writer.add_text(plain_name(name), text, 0)

    def write(self, rows: Sequence[Row]) -> None:
        """See `Sink.write`."""
        for row in rows:
            for name, value in figures(row).items():
                self._writer.add_scalar(plain_name(name), value, row["step"], walltime=row.get("time"))
        self._writer.flush()
        if time.monotonic() - self._uploaded > UPLOAD_S:
            self._upload()

    def close(self) -> None:
        """See `Sink.close`."""
        if self._writer is not None:
            self._writer.close()
            self._upload()
        if self._temporary:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _upload(self) -> None:
        self._uploaded = time.monotonic()
        for path in Path(self._temporary).glob("events.*") if self._temporary else ():
            storage.write_bytes(storage.join(self._uri, path.name), path.read_bytes())
