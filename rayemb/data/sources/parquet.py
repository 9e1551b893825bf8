"""Parquet files of somebody else's making."""

from collections.abc import Iterator
from typing import ClassVar, Literal

import pyarrow.parquet as pq

from rayemb.data.sources.arrow import batch_records, batch_rows
from rayemb.data.sources.columns import check_schema
from rayemb.data.sources.files import BUFFER, DamageError, FileSource, Piece, Record, open_seekable, reading


class ParquetSource(FileSource):
    """Parquet files; a unit is a row group."""

    name: Literal["parquet"] = "parquet"
    suffixes: ClassVar[tuple[str, ...]] = (".parquet", ".pq")

    def _plan(self, file: str) -> list[Piece]:
        with open_seekable(file) as raw, reading(file):
            parquet = pq.ParquetFile(raw)
            check_schema(self.columns, parquet.schema_arrow, file, self.image_root)
            pieces, first = [], 0
            for group in range(parquet.num_row_groups):
                rows = parquet.metadata.row_group(group).num_rows
                pieces.append(Piece(file, part=group, start=first, rows=rows))
                first += rows
            return pieces

    def _records(self, piece: Piece) -> Iterator[Record]:
        row = piece.start
        with open_seekable(piece.file) as raw:
            with reading(piece.file):
                # A buffer: pages are read as they are needed, not the whole row group at once.
                parquet = pq.ParquetFile(raw, page_checksum_verification=True, buffer_size=BUFFER)
                batches = parquet.iter_batches(
                    batch_rows(self.columns), row_groups=[piece.part], columns=self.columns.names, use_threads=False
                )
            while True:
                with reading(piece.file):
                    batch = next(batches, None)
                if batch is None:
                    break
                yield from batch_records(batch, self.columns, row)
                row += batch.num_rows
        if row < piece.start + piece.rows:
            raise DamageError(f"the row group ends after {row - piece.start} of {piece.rows} rows")
