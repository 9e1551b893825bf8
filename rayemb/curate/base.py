"""What a curation step is given (`Rows`), and what it gives (tables of verdicts).

A row of a corpus is known by one integer, its *ordinal*: its place in the whole corpus, splits in the manifest's
order, files in theirs. Rows keep their ordinal from the first step to the last; what an earlier step dropped is not
seen by the next, what it edited is seen as edited.
"""

import json
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
from numpy.typing import NDArray
from pydantic import Field

from rayemb import storage
from rayemb.config import Config
from rayemb.data import Corpus
from rayemb.data.corpus import KEYS, SCHEMA, Kind, RowGroup, read_row_group
from rayemb.data.keys import keys_of, text_keys
from rayemb.errors import RayembError
from rayemb.progress import Progress

EDITS = {"text": "new_text", "texts": "new_texts", "concept": "new_concept", "score": "new_score"}
EDITS["negatives"] = "new_negatives"
VERDICT = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),  # ordinal in the corpus
        pa.field("drop", pa.bool_(), nullable=False),
        pa.field("reason", pa.string()),  # one short word, for counting
        pa.field("what", pa.string()),  # a sentence with the figures
        pa.field("score", pa.float32()),  # what was compared with the threshold; the report draws its histogram
        pa.field("partner", pa.int64()),  # ordinal of the row that it repeats
        pa.field("partner_corpus", pa.string()),  # URI of the partner's corpus where it is another
        # The row's new content; null: unchanged.
        *(pa.field(edit, SCHEMA.field(column).type) for column, edit in EDITS.items()),
    ]
)
READ_ROWS = 2048  # rows that one task reads, at least a row group
BUCKET_ROWS = 250_000  # rows that one task of a shuffle holds

Verdicts: TypeAlias = "ray.data.Dataset | Iterable[pa.Table]"


class CurationError(RayembError):
    """A curation that cannot start or leaves nothing."""


@dataclass(frozen=True)
class Shard:
    """One file of a corpus; its rows have the ordinals `first .. first + rows - 1`."""

    split: str
    file: str  # relative to the corpus
    first: int
    rows: int
    sha256: str


def shards_of(corpus: Corpus) -> list[Shard]:
    """Every shard of a corpus in the order that numbers the rows. From the manifest alone."""
    shards: list[Shard] = []
    first = 0
    for split, entry in corpus.manifest["splits"].items():
        for file in entry["files"]:
            shards.append(Shard(split, file["file"], first, file["rows"], file["sha256"]))
            first += file["rows"]
    return shards


@dataclass(frozen=True)
class Edited:
    """Where the edits of earlier steps lie: by shard, the files of verdicts, oldest first."""

    parts: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Rows:
    """The rows of a corpus that are still alive, as a step sees them. Cheap to make and to pickle."""

    corpus: Corpus
    splits: tuple[str, ...]  # the splits to judge; the others may be read, never changed
    alive: Any = None  # object reference to `np.packbits` over all ordinals; None: every row is alive
    counts: dict[str, int] = field(default_factory=dict)  # alive rows of every split
    edited: Edited = Edited()
    seed: int = 0
    folder: str = ""  # URI of a folder of the step's own, kept beside its verdicts
    facts: dict[str, Any] = field(default_factory=dict)  # a step adds figures here (JSON); they go to the report
    progress: Progress | None = None  # (done, total, text); the framework has its own for verdicts

    @classmethod
    def of(cls, corpus: Corpus, splits: Sequence[str] | None = None, **more: Any) -> "Rows":
        """All rows of `splits` (default: every one) of a corpus. Raises CorpusError for a split that is not there."""
        for split in splits or ():
            corpus.rows(split)
        return cls(corpus, tuple(splits or corpus.splits), counts=corpus.splits, **more)

    @property
    def count(self) -> int:
        """How many alive rows the step has to judge."""
        return sum(self.counts[split] for split in self.splits)

    def only(self, *splits: str) -> "Rows":
        """The same over other splits, for steps that compare (the verdicts still go to the splits to judge)."""
        for split in splits:
            self.corpus.rows(split)
        return replace(self, splits=splits)

    def dataset(self, columns: Sequence[str] = ()) -> ray.data.Dataset:
        """The alive rows of the splits to judge, lazily: `row` (int64 ordinal) and `columns` of the corpus's schema.

        `split` may be asked for as well. Edits of earlier steps are applied, keys included. Rows come in any order
        and in blocks of any size: a step's verdicts must not depend on either. Reads only the columns asked for.
        """
        columns, alive, kind, limit = list(columns), self.alive, self.corpus.kind, READ_ROWS
        units = []
        shards = {storage.join(self.corpus.uri, shard.file): shard for shard in shards_of(self.corpus)}
        starts = {split: min(s.first for s in shards.values() if s.split == split) for split in self.splits}
        for split in self.splits:
            for part in _runs(self.corpus.row_groups(split), limit):
                shard = shards[part[0].file]
                units.append(
                    {
                        "split": split,
                        "groups": [asdict(group) for group in part],
                        "first": starts[split] + part[0].first,
                        "shard": shard.first,
                        "edits": self.edited.parts.get(shard.file, []),
                    }
                )

        def read(batch: dict[str, Any]) -> Iterator[pa.Table]:
            (text,) = batch["unit"]
            yield from _read(json.loads(str(text)), columns, alive, kind)

        items = [{"unit": json.dumps(unit)} for unit in units]
        return ray.data.from_items(items, override_num_blocks=max(1, len(items))).map_batches(read, batch_size=1)

    def take(self, ordinals: Iterable[int], columns: Sequence[str]) -> dict[int, dict[str, Any]]:
        """A few rows by ordinal, dead or alive, unedited. Reads the row groups that hold them, here."""
        found: dict[int, dict[str, Any]] = {}
        shards = shards_of(self.corpus)
        firsts = [shard.first for shard in shards]
        wanted: dict[str, list[int]] = {}
        for ordinal in sorted(set(ordinals)):
            wanted.setdefault(shards[bisect_right(firsts, ordinal) - 1].file, []).append(ordinal)
        by_file = {shard.file: shard for shard in shards}
        for file, rows in wanted.items():
            found.update(read_rows(storage.join(self.corpus.uri, file), by_file[file].first, rows, columns))
        return found


class Step(Config):
    """Base of every step: its settings, and `judge`. A subclass has a literal `name` and stands in `AnyStep`.

    A step's first docstring line says what it drops or edits; the module's docstring names the paper and the card.
    Equal rows, settings and seed give equal verdicts, on any number of workers and in blocks of any size; ties go by
    the ordinal, the first row stays.
    """

    name: str
    splits: list[str] = Field(["train"], min_length=1, description="splits whose rows are judged; others stay whole")

    def inputs(self) -> dict[str, str]:
        """Digests of what the step reads beside the corpus, by key: another model at the same URI is another step."""
        return {}

    @abstractmethod
    def judge(self, rows: Rows) -> Verdicts:
        """Verdicts over `rows`: a Ray dataset (any block format `verdicts` can be made from) or tables.

        A row without a verdict stays as it is. One verdict a row counts: a drop before an edit, then the first
        reason by name, then the highest score. Verdicts over rows that are not among `rows` are an error.
        """


def verdicts(row: Any, *, drop: Any = True, **columns: Any) -> pa.Table:
    """A table of verdicts, of schema `VERDICT`, from columns: sequences as long as `row`, or one value for all rows.

    Columns that are not given are null. `verdicts(row=[3, 8], reason="short", score=[0.1, 0.2])` drops two rows.
    """
    rows = pa.array(np.asarray(row, dtype=np.int64))
    given = {"row": rows, "drop": drop, **columns}
    unknown = set(given) - set(VERDICT.names)
    if unknown:
        raise TypeError(f"verdicts have no column {sorted(unknown)}, only {VERDICT.names}")
    arrays = []
    for spec in VERDICT:
        value = given.get(spec.name)
        if value is None or isinstance(value, str | bool | int | float):
            arrays.append(pa.nulls(len(rows), spec.type) if value is None else _repeat(value, len(rows), spec.type))
        else:
            value = value.combine_chunks() if isinstance(value, pa.ChunkedArray) else value
            arrays.append(value.cast(spec.type) if isinstance(value, pa.Array) else pa.array(value, spec.type))
    return pa.Table.from_arrays(arrays, schema=VERDICT)


def together(
    dataset: ray.data.Dataset, key: str, judge: Callable[[pa.Table], pa.Table], *, rows: int
) -> ray.data.Dataset:
    """`judge` over tables in which all rows with an equal `key` (a column) stand together, sorted by key and row.

    A hash shuffle into tables of about `BUCKET_ROWS`; `rows` is about how many rows there are. A table holds many
    keys, so `judge` loops over the `runs` of equal ones, and what it says must not depend on which keys share a table.
    """
    order = list(dict.fromkeys((name, "ascending") for name in (key, "row")))

    def judged(table: pa.Table) -> pa.Table:
        return judge(table.sort_by([item for item in order if item[0] in table.column_names]))

    # Not groupby().map_groups(): it fails where every block is empty, and calls a function for each key.
    parts = dataset.repartition(max(1, round(rows / BUCKET_ROWS)), keys=[key])
    return parts.map_batches(judged, batch_format="pyarrow", batch_size=None)


def joined(parts: Sequence[ray.data.Dataset]) -> ray.data.Dataset:
    """The rows of all parts, at least one."""
    return parts[0].union(*parts[1:]) if len(parts) > 1 else parts[0]  # Ray's own union of one part fails


def runs(keys: NDArray[Any]) -> NDArray[np.int64]:
    """Where each run of equal values in a sorted array starts, and at the end its length: `starts[i]:starts[i + 1]`."""
    if not len(keys):
        return np.zeros(1, np.int64)
    return np.concatenate([[0], np.flatnonzero(keys[1:] != keys[:-1]) + 1, [len(keys)]]).astype(np.int64)


def is_alive(alive: NDArray[np.uint8], first: int, count: int) -> NDArray[np.bool_]:
    """Bits `first .. first + count - 1` of a packed bitmap as booleans."""
    start = first // 8
    bits = np.unpackbits(alive[start : (first + count + 7) // 8])
    return bits[first - 8 * start : first - 8 * start + count].astype(bool)


def read_rows(file: str, first: int, ordinals: Sequence[int], columns: Sequence[str]) -> dict[int, dict[str, Any]]:
    """Rows of one shard by ordinal; `first` is the ordinal of its first row. Reads only the row groups they are in."""
    fs, path = storage.filesystem(file)
    metadata = pq.ParquetFile(path, filesystem=fs).metadata
    found: dict[int, dict[str, Any]] = {}
    start = first
    for index in range(metadata.num_row_groups):
        rows = metadata.row_group(index).num_rows
        inside = [ordinal for ordinal in ordinals if start <= ordinal < start + rows]
        if inside:
            table = read_row_group(RowGroup(file, index, rows), columns)
            places = pa.array([ordinal - start for ordinal in inside])
            found.update(zip(inside, table.take(places).to_pylist(), strict=True))
        start += rows
    return found


def apply_edits(table: pa.Table, ordinals: NDArray[np.int64], edits: pa.Table, kind: Kind) -> pa.Table:
    """`table` (columns of the corpus, rows in ordinal order) with the verdicts' new content and the keys of it.

    A new text leaves `texts` alone: a step that edits the one says what becomes of the other.
    """
    at = np.searchsorted(ordinals, np.asarray(edits["row"]))
    inside = (at < len(ordinals)) & (ordinals[np.minimum(at, len(ordinals) - 1)] == np.asarray(edits["row"]))
    edits, at = edits.filter(pa.array(inside)), at[inside]
    for column, edit in EDITS.items():
        new = edits[edit].drop_null().to_pylist()
        places = at[np.asarray(edits[edit].is_valid())].tolist()
        changes = {column: new}
        if column == "text":
            changes |= dict.fromkeys(("text_key", "query_key") if kind == "text" else ("text_key",), text_keys(new))
        elif column == "concept":
            changes["concept_key"] = keys_of(new)
        for name, values in changes.items():
            if places and name in table.column_names:
                whole = table[name].to_pylist()
                for place, value in zip(places, values, strict=True):
                    whole[place] = value
                spec = SCHEMA.field(name)
                table = table.set_column(table.schema.get_field_index(name), spec, pa.array(whole, spec.type))
    return table


def _runs(groups: list[RowGroup], limit: int) -> Iterator[list[RowGroup]]:
    """Neighbouring row groups of one file, about `limit` rows at a time."""
    part: list[RowGroup] = []
    for group in groups:
        if part and (group.file != part[0].file or sum(g.rows for g in part) + group.rows > limit):
            yield part
            part = []
        part.append(group)
    if part:
        yield part


def _read(unit: dict[str, Any], columns: list[str], alive: Any, kind: Kind) -> Iterator[pa.Table]:
    bitmap = ray.get(alive) if alive is not None else None
    stored = [name for name in columns if name != "split"]
    edits = [_edits(file) for file in unit["edits"]] if {*EDITS, *KEYS} & set(stored) else []
    first = unit["first"]
    for group in (RowGroup(**fields) for fields in unit["groups"]):
        ordinals = first + np.arange(group.rows)
        keep = is_alive(bitmap, first, group.rows) if bitmap is not None else np.ones(group.rows, bool)
        first += group.rows
        if not keep.any():
            yield _table(pa.table({name: [] for name in stored}), ordinals[:0], unit["split"], columns)
            continue
        table = read_row_group(group, stored) if stored else pa.table({})
        for edit in edits:
            table = apply_edits(table, ordinals, edit, kind)
        yield _table(table, ordinals, unit["split"], columns).filter(pa.array(keep))


def _table(stored: pa.Table, ordinals: NDArray[np.int64], split: str, columns: list[str]) -> pa.Table:
    given = {"row": pa.array(ordinals), "split": pa.array([split] * len(ordinals), pa.string())}
    given |= {name: stored[name].cast(SCHEMA.field(name).type) for name in stored.column_names}
    return pa.table({name: given[name] for name in ("row", *columns)})


def _edits(file: str) -> pa.Table:
    fs, path = storage.filesystem(file)
    return pq.ParquetFile(path, filesystem=fs).read(columns=["row", *EDITS.values()])


def _repeat(value: Any, count: int, kind: pa.DataType) -> pa.Array:
    return pa.repeat(pa.scalar(value, kind), count)
