"""Rows that a training could not use: counted, set aside with their reason, and too many of them an error."""

from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.distributed as dist

from rayemb import storage
from rayemb.data.decode import BadRow
from rayemb.data.stream import Batch
from rayemb.errors import RayembError

FOLDER = "quarantine"
ENOUGH = 1000  # rows before a share of them means anything


class BadRowsError(RayembError):
    """More rows than allowed could not be used."""


class Quarantine:
    """One worker's bad rows since the last checkpoint, and their number since the run's start or resumption."""

    def __init__(self, run_uri: str, most: float, rank: int) -> None:
        self.uri, self.most, self.rank = storage.join(run_uri, FOLDER), most, rank
        self.reasons: Counter[str] = Counter()
        self._rows: list[BadRow] = []
        self._seen = 0

    def add(self, batch: Batch) -> None:
        """Takes a batch's bad rows."""
        self._seen += batch.rows
        self._rows += batch.bad
        self.reasons.update(row.reason for row in batch.bad)

    def check(self) -> int:
        """The bad rows of all workers. Collective; raises BadRowsError on all of them if there are too many."""
        count = torch.tensor([sum(self.reasons.values())])
        if dist.is_initialized():
            device = "cuda" if dist.get_backend() == "nccl" else "cpu"
            count = count.to(device)
            dist.all_reduce(count)
        total = int(count)
        if self._seen >= ENOUGH and total > self.most * self._seen:
            reasons, first = self._everywhere()
            self.write(None)
            raise BadRowsError(
                f"{total} of {self._seen} rows could not be used ({reasons}; {first})",
                where="train.max_bad_fraction",
                fix=f"see {self.uri}, mend the corpus, or allow more",
            )
        return total

    def _everywhere(self) -> tuple[str, str]:
        """All workers' reasons with their counts, and one of the rows."""
        mine = (self.reasons, [f"{row.source}: {row.what}" for row in self._rows[:1]])
        found: list[tuple[Counter[str], list[str]] | None] = [mine]
        if dist.is_initialized():
            found = [None] * dist.get_world_size()
            dist.all_gather_object(found, mine)
        parts = [part for part in found if part is not None]
        reasons = sum((reasons for reasons, _ in parts), Counter[str]())
        return ", ".join(f"{reason} {count}" for reason, count in reasons.items()), next(
            (row for _, rows in parts for row in rows), "none since the last checkpoint"
        )

    def write(self, step: int | None) -> None:
        """Sets this worker's rows since the last call aside.

        The file is named after the step, not after the time: a run that goes over the same steps again after a
        failure writes the same file again.
        """
        if not self._rows:
            return
        table = pa.table({name: [getattr(row, name) for row in self._rows] for name in BadRow._fields})
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink)
        name = "last" if step is None else f"step-{step:09d}"
        storage.write_bytes(storage.join(self.uri, f"{name}-rank-{self.rank:05d}.parquet"), bytes(sink.getvalue()))
        self._rows = []
