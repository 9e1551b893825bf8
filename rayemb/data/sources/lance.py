"""Lance datasets."""

from collections.abc import Iterator
from typing import Any, Literal

from rayemb import storage
from rayemb.data.sources.arrow import batch_records, batch_rows
from rayemb.data.sources.base import SourceError
from rayemb.data.sources.columns import check_schema
from rayemb.data.sources.files import DamageError, FileSource, Piece, Record, find_folders, reading


class LanceSource(FileSource):
    """Lance datasets at their newest version; a unit is a fragment.

    Fragments that are cut short or missing are set aside. Lance keeps no checksums: a flipped bit shows in the row, in
    an error (set aside too), or ends the process, which fails the build.
    """

    name: Literal["lance"] = "lance"

    def _find(self) -> list[tuple[str, str]]:
        return [(folder, "") for folder in find_folders(self.uri, "_versions/*")]

    def _plan(self, file: str) -> list[Piece]:
        if not storage.list_files(storage.join(file, "_versions")):
            raise SourceError("there is no Lance dataset", where=f"corpus.source.uri={file}")
        dataset = _open(file)
        pieces, first = [], 0
        with reading(file):
            check_schema(self.columns, dataset.schema, file, self.image_root)
            for fragment in dataset.get_fragments():
                rows = fragment.count_rows()
                # The version too: rows that somebody adds while the corpus is built are not in it.
                pieces.append(Piece(file, part=fragment.fragment_id, start=first, stop=dataset.version, rows=rows))
                first += rows
        return pieces

    def _records(self, piece: Piece) -> Iterator[Record]:
        row = piece.start
        dataset = _open(piece.file, piece.stop)
        with reading(piece.place):
            fragment = dataset.get_fragment(piece.part)
            batches = iter(fragment.to_batches(columns=self.columns.names, batch_size=batch_rows(self.columns)))
        while True:
            with reading(piece.place):
                batch = next(batches, None)
            if batch is None:
                break
            yield from batch_records(batch, self.columns, row)
            row += batch.num_rows
        if row < piece.start + piece.rows:
            raise DamageError(f"the fragment ends after {row - piece.start} of {piece.rows} rows")


def _open(uri: str, version: int | None = None) -> Any:
    import lance

    with reading(uri):
        return lance.dataset(uri, version=version, storage_options=storage.lance_options(uri))
