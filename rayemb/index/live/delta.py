"""The rows of the log that are in no index yet, searched as shards like those of an index.

Rows are only ever added, so that a key means the same row for as long as the index is open. They lie in parts, each a
flat shard: 256 rows are made into one, and two of a size into one of twice that size, so that n rows are n/256 in
log(n) parts and each row is copied log(n) times. What is newer makes a small shard of its own, at the next search.
"""

from typing import Any

import faiss
import numpy as np
import pyarrow as pa

from rayemb.data.embeddings import ID, VECTOR, EmbeddingsTable
from rayemb.index.effort import Effort
from rayemb.index.faiss_index import FaissShard
from rayemb.index.keys import Keys
from rayemb.index.lexical import LexicalShard
from rayemb.index.live.tombstones import Tombstones
from rayemb.index.manifest import ShardFile
from rayemb.index.payload import Payload
from rayemb.index.selection import Selection
from rayemb.index.shard import Shard

_SEALED = 256
Part = tuple[Shard, Selection | None]


class Delta:
    """Rows by number 0, 1, 2, ...; row i has the key `first_key + i`. Not for several threads at once.

    Args:
        words: the payload column whose words are searched too, and the lexical half of a shard of the index.
    """

    def __init__(
        self, embeddings: EmbeddingsTable, first_key: int, effort: Effort, words: tuple[str, LexicalShard] | None
    ) -> None:
        self._embeddings, self._first_key, self._effort, self._words = embeddings, first_key, effort, words
        self._columns = [ID, *embeddings.payload_columns]
        self._sealed: list[_Sealed] = []
        self._sealed_rows = 0
        self._tail: list[pa.Table] = []
        self._tail_shard: Shard | None = None
        self._gone: dict[int, int] = {}
        self.rows = 0

    def add(self, rows: pa.Table) -> None:
        """Adds rows: id, vector, payload columns."""
        self._tail.append(rows)
        self._tail_shard = None
        self.rows += rows.num_rows
        if self.rows - self._sealed_rows >= _SEALED:
            self._seal()

    def remove(self, number: int, version: int) -> None:
        """Row `number` is gone from `version` of the log on."""
        self._gone.setdefault(number, version)
        for part in self._sealed:
            if part.start <= number < part.start + part.shard.rows:
                part.tombstones.add(number - part.start, version)

    def gone(self, number: int, version: int) -> bool:
        """Whether row `number` is gone at `version`."""
        return self._gone.get(number, version + 1) <= version

    def parts(self, version: int) -> list[Part]:
        """All rows as shards, and which of their rows are there at `version`, the newest one."""
        parts = [(part.shard, part.tombstones.alive(version)) for part in self._sealed]
        if self.rows > self._sealed_rows:
            if self._tail_shard is None:
                self._tail_shard = self._shard(pa.concat_tables(self._tail), self._sealed_rows)
            gone = Tombstones(self.rows - self._sealed_rows)
            for number in range(self._sealed_rows, self.rows):
                if number in self._gone:
                    gone.add(number - self._sealed_rows, version)
            parts.append((self._tail_shard, gone.alive(version)))
        return parts

    def _seal(self) -> None:
        rows, start = pa.concat_tables(self._tail), self._sealed_rows
        while self._sealed and self._sealed[-1].rows.num_rows <= rows.num_rows:
            last = self._sealed.pop()
            rows, start = pa.concat_tables([last.rows, rows]), last.start
        shard = self._shard(rows, start)
        sealed = _Sealed(rows, start, shard)
        for version, number in sorted((self._gone[n], n) for n in range(start, self.rows) if n in self._gone):
            sealed.tombstones.add(number - start, version)
        self._sealed.append(sealed)
        self._tail, self._tail_shard, self._sealed_rows = [], None, self.rows

    def _shard(self, rows: pa.Table, start: int) -> Shard:
        index: Any = faiss.IndexFlatIP(self._embeddings.dim)
        column: Any = rows.column(VECTOR).combine_chunks()
        flat = column.flatten().to_numpy()
        index.add(np.ascontiguousarray(flat.reshape(-1, self._embeddings.dim)))
        first = self._first_key + start
        lexical = None
        if self._words is not None:
            name, base = self._words
            lexical = base.beside(rows.column(name).to_pylist())
        return Shard(
            ShardFile(file="updates", bytes=0, sha256="", rows=rows.num_rows, start=first),
            FaissShard(index),
            Keys(first, rows.num_rows),
            self._embeddings,
            Payload(rows.select(self._columns)),
            self._effort,
            lexical,
        )


class _Sealed:
    """A part that takes no more rows."""

    def __init__(self, rows: pa.Table, start: int, shard: Shard) -> None:
        self.rows, self.start, self.shard = rows, start, shard
        self.tombstones = Tombstones(rows.num_rows)
