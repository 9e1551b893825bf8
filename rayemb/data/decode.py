"""From rows of a plan to the arrays that a model is fed: read, decode, augment, tokenise."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rayemb.data.attributes import Attributes
from rayemb.data.augment import DRAWS, AugmentConfig, augmented, draws
from rayemb.data.corpus import KEYS, CorpusError, Kind, RowGroup, open_shard, read_row_group
from rayemb.data.keys import keys_of, text_keys
from rayemb.data.mix import CorpusEntry
from rayemb.models import PADDING, ImageError, ImageLimits, PromptsConfig, TextTokenizer, decode_image, image_tensor
from rayemb.models.tokenizer import Span
from rayemb.parallel import NO_KEY

COLUMNS: dict[Kind, tuple[str, ...]] = {
    "image_text": ("id", "image", "text", "texts", "negatives", *KEYS),
    "text_pair": ("id", "query", "text", "texts", "negatives", *KEYS),
    "text": ("id", "text", "texts", "negatives", *KEYS),
}

FOOTERS = 128
ROW_BYTES = 1500  # of a row's objects, beyond their content


CORPUS_COLUMNS = ("query", "text", "concept", "id", "length")  # that samplers may ask for


class BadRow(NamedTuple):
    """A row that could not be used: where it is and why."""

    source: str
    id: str
    reason: str
    what: str


class Piece(NamedTuple):
    """Rows of a global batch that one decoder turns into arrays: ordinals `(n,)` of each corpus, in its order."""

    step: int
    parts: tuple[tuple[int, NDArray[np.int64]], ...]


@dataclass(frozen=True)
class Member:
    """A corpus of the mixture, opened: what a decoder must know of it. `groups` lie in order of `first`."""

    entry: CorpusEntry
    kind: Kind
    groups: Sequence[RowGroup]
    limits: ImageLimits

    @property
    def rows(self) -> int:
        """Of all row groups."""
        return sum(group.rows for group in self.groups)


@dataclass(frozen=True)
class DecodeSettings:
    """What a row is turned into. `cache_bytes`: encoded row groups that are kept for the next batch."""

    tokenizer: TextTokenizer
    image_size: int
    seed: int
    augment: AugmentConfig
    cache_bytes: int = 256 << 20
    classes: NDArray[np.int64] | None = None  # sorted concept keys: a row's label is its concept's place
    prompts: PromptsConfig = field(default_factory=PromptsConfig)  # of the model, for corpora without prefixes

    def text_arrays(
        self,
        of: Literal["", "query_", "negative_"],
        texts: Sequence[str],
        prefix: str | None,
        spans: Sequence[Span | None] | None = None,
    ) -> dict[str, NDArray[Any]]:
        """`tokens` (N, L) of texts behind a prefix (null: the model's prompt); `skips` (N,) if it is not pooled.

        `spans`: the characters of each text that are masked.
        """
        prompt = self.prompts.query if of == "query_" else self.prompts.text
        ids, skips = self.tokenizer.with_prompt(texts, prompt if prefix is None else prefix, spans)
        found: dict[str, NDArray[Any]] = {f"{of}tokens": ids}
        return found if self.prompts.pooled else {**found, f"{of}skips": skips}


class Decoder:
    """Turns pieces into arrays; the same piece gives the same arrays in every process.

    Holds at most `cache_bytes` of encoded row groups, so that a group whose rows go to several batches of its
    window is read once. A row that cannot be decoded, or a row group that cannot be read, is left out and told of;
    a storage that does not answer is an error.
    """

    def __init__(self, members: Sequence[Member], settings: DecodeSettings) -> None:
        self.members, self.settings = members, settings
        self._starts = [np.array([group.first for group in member.groups], dtype=np.int64) for member in members]
        self._cache = GroupCache(settings.cache_bytes)

    def __call__(self, piece: Piece) -> tuple[dict[str, NDArray[Any]], list[BadRow]]:
        """The arrays of a piece of n rows, B of them good, and the others.

        `tokens` (B, L) int64 of the texts; `pixels` (B, 3, S, S) uint8, or `query_tokens` (B, M) int64; `keys` (B, 3)
        int64 of query, text and concept; `task` (B,) int64, the corpus; `row` (B,) int64, the ordinal;
        `labels` (B,) int64 where there are classes; where hard negatives are asked for, `negative_tokens` (N, L) in
        the order of the rows, `negative_counts` (B,) of each row, and `negative_keys` (N, 3). Where prompts are not
        pooled, `skips`, `query_skips` (B,) and `negative_skips` (N,) int64 say how many tokens of each text are its.
        """
        bad: list[BadRow] = []
        parts = [self._part(piece.step, corpus, ordinals, bad) for corpus, ordinals in piece.parts]
        return merged(parts) if parts else {}, bad

    def _part(self, step: int, corpus: int, ordinals: NDArray[np.int64], bad: list[BadRow]) -> dict[str, NDArray[Any]]:
        member, settings = self.members[corpus], self.settings
        rows, found = self._rows(corpus, ordinals, bad)
        # By step, not by epoch: a row comes once an epoch, and a step is what every process knows.
        u = draws([settings.seed, step, corpus], found, DRAWS + 2 + member.entry.hard_negatives)
        pixels: list[NDArray[np.uint8]] = []
        if member.kind == "image_text":
            rows, u, found, pixels = self._pixels(member, rows, u, found, bad)
        entry = member.entry
        texts = [_caption(row, x, entry.main_caption) for row, x in zip(rows, u[:, 0], strict=True)]
        # The caption that was drawn, not the main one, is what may equal another row's.
        concepts, own = np.array([row["concept_key"] for row in rows], dtype=np.int64), text_keys(texts)
        keys = np.stack([np.array([row["query_key"] for row in rows], dtype=np.int64), own, concepts], 1)
        if entry.identical:
            # Equal texts are one; two texts of a concept are not: nothing but the texts is known.
            keys = np.stack([own, own, np.full_like(own, NO_KEY)], 1)
        spans = [settings.augment.text.span(text, x) for text, x in zip(texts, u[:, 1], strict=True)]
        out: dict[str, NDArray[Any]] = {
            **settings.text_arrays("", texts, entry.text_prefix, spans),
            "keys": keys,
            "task": np.full(len(rows), corpus, dtype=np.int64),
            "row": found,
        }
        if member.kind == "image_text":
            size = settings.image_size
            out["pixels"] = np.stack(pixels) if pixels else np.zeros((0, 3, size, size), np.uint8)
        elif member.kind == "text_pair":
            out |= settings.text_arrays("query_", [row["query"] for row in rows], entry.query_prefix)
        else:
            queries = texts if entry.identical else [row["text"] for row in rows]
            out |= settings.text_arrays("query_", queries, entry.query_prefix)
        if settings.classes is not None:
            out["labels"] = np.searchsorted(settings.classes, concepts).astype(np.int64)
        if entry.hard_negatives:
            out |= self._negatives(entry, rows, u[:, DRAWS + 2 :])
        return out

    def _rows(
        self, corpus: int, ordinals: NDArray[np.int64], bad: list[BadRow]
    ) -> tuple[list[dict[str, Any]], NDArray[np.int64]]:
        """The readable rows of one corpus as dictionaries, with their ordinals."""
        member, starts = self.members[corpus], self._starts[corpus]
        at = np.searchsorted(starts, ordinals, side="right") - 1
        rows: list[dict[str, Any]] = []
        kept: list[NDArray[np.int64]] = []
        # A run of ordinals of one group at a time: the plan has them sorted.
        for run in np.split(np.arange(len(at)), np.flatnonzero(np.diff(at)) + 1) if len(at) else []:
            group = member.groups[at[run[0]]]
            local = ordinals[run] - group.first
            try:
                there = self._cache.rows(group, COLUMNS[member.kind])
            except CorpusError as error:
                place = [f"{group.file} row group {group.index} row {n}" for n in local]
                bad += [BadRow(where, "", "corrupt_file", error.what) for where in place]
                continue
            rows += [there[n] for n in local]
            kept.append(ordinals[run])
        return rows, np.concatenate(kept) if kept else np.zeros(0, dtype=np.int64)

    def _pixels(
        self,
        member: Member,
        rows: list[dict[str, Any]],
        u: NDArray[np.float64],
        ordinals: NDArray[np.int64],
        bad: list[BadRow],
    ) -> tuple[list[dict[str, Any]], NDArray[np.float64], NDArray[np.int64], list[NDArray[np.uint8]]]:
        """The rows whose images decode, and those."""
        settings, good, pixels = self.settings, [], []
        for number, row in enumerate(rows):
            try:
                image = decode_image(row["image"] or b"", member.limits)
                if settings.augment.of_images:
                    image = augmented(image, settings.augment, settings.image_size, u[number, 2 : 2 + DRAWS])
                pixels.append(image_tensor(image, settings.image_size))
                good.append(number)
            except ImageError as error:
                bad.append(BadRow(self._place(member, int(ordinals[number])), row["id"], error.reason, error.what))
        if len(good) == len(rows):
            return rows, u, ordinals, pixels
        return [rows[i] for i in good], u[good], ordinals[good], pixels

    @staticmethod
    def _place(member: Member, ordinal: int) -> str:
        group = next(g for g in member.groups if g.first <= ordinal < g.first + g.rows)
        return f"{group.file} row group {group.index} row {ordinal - group.first}"

    def _negatives(
        self, entry: CorpusEntry, rows: list[dict[str, Any]], u: NDArray[np.float64]
    ) -> dict[str, NDArray[Any]]:
        """So many of each row's hard negatives, without repeats, and how many of each."""
        texts: list[str] = []
        counts: list[int] = []
        for row, draw in zip(rows, u, strict=True):
            there = list(row["negatives"] or [])
            counts.append(min(len(there), len(draw)))
            texts += [there.pop(int(x * len(there))) for x in draw[: counts[-1]]]
        keys = np.full((len(texts), len(KEYS)), NO_KEY, dtype=np.int64)
        keys[:, KEYS.index("text_key")] = text_keys(texts)
        return {
            **self.settings.text_arrays("negative_", texts, entry.text_prefix),
            "negative_counts": np.array(counts, dtype=np.int64),
            "negative_keys": keys,
        }


class Footers:
    """The footers of the shards that were opened last: a shard is read from often, a row group at a time."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, pq.FileMetaData] = OrderedDict()

    def open(self, file: str) -> pq.ParquetFile:
        """The shard. Its footer is kept and the file is not: an open one holds on to all that was read of it last."""
        shard = open_shard(file, self._kept.pop(file, None))
        self._kept[file] = shard.metadata
        if len(self._kept) > FOOTERS:
            self._kept.popitem(last=False)
        return shard


class GroupCache:
    """Row groups as rows, the least recently used given up beyond `limit` bytes.

    Rows and not Arrow tables: a batch takes one or two rows of each of hundreds of groups, and so small a `take` costs
    more than the image.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.bytes, self.reads = limit, 0, 0
        self._groups: OrderedDict[tuple[str, int], tuple[list[dict[str, Any]], int]] = OrderedDict()
        self._footers = Footers()

    def rows(self, group: RowGroup, columns: Sequence[str]) -> list[dict[str, Any]]:
        """The rows of a row group. Raises CorpusError if it is corrupt, StorageError if it cannot be had."""
        key = (group.file, group.index)
        if key in self._groups:
            self._groups.move_to_end(key)
            return self._groups[key][0]
        table = read_row_group(group, columns, self._footers.open(group.file))
        self.reads += 1
        size = table.nbytes + ROW_BYTES * len(table)
        self._groups[key] = table.to_pylist(), size
        self.bytes += size
        while self.bytes > self.limit and len(self._groups) > 1:
            _, (_, old) = self._groups.popitem(last=False)
            self.bytes -= old
        return self._groups[key][0]


class ColumnReader:
    """Columns of row groups for planning: keys, lengths and attributes, 8 bytes a row, the last ones kept.

    Complexity: one read of small columns per row group, window and column; `most` row groups are held.
    """

    def __init__(
        self,
        member: Member,
        tokenizer: TextTokenizer | None = None,
        attributes: Attributes | None = None,
        most: int = 8192,
    ) -> None:
        self._member, self._tokenizer, self._attributes, self._most = member, tokenizer, attributes, most
        self._kept: OrderedDict[tuple[str, int, str], NDArray[Any]] = OrderedDict()
        self._footers = Footers()

    def __call__(self, groups: Sequence[RowGroup], column: str) -> NDArray[Any]:
        """The column's values over these groups, one after the other; those of a corrupt group are `-1`."""
        return np.concatenate([self._values(group, column) for group in groups])

    def _values(self, group: RowGroup, column: str) -> NDArray[Any]:
        key = (group.file, group.index, column)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        if self._attributes is not None and column in self._attributes.columns:
            values = self._attributes.read(group, column)
        elif column not in CORPUS_COLUMNS:
            there = (*CORPUS_COLUMNS, *(self._attributes.columns if self._attributes else ()))
            raise CorpusError(f"there is no column {column!r}", where=group.file, fix=f"columns: {', '.join(there)}")
        else:
            try:
                values = self._read(group, column)
            except CorpusError:
                # Its rows are told of where they are decoded; here they only must not be taken for one another.
                values = -1 - np.arange(group.first, group.first + group.rows, dtype=np.int64)
        self._keep(group, column, values)
        return values

    def _keep(self, group: RowGroup, column: str, values: NDArray[Any]) -> None:
        self._kept[group.file, group.index, column] = values
        while len(self._kept) > self._most:
            self._kept.popitem(last=False)

    def _read(self, group: RowGroup, column: str) -> NDArray[np.int64]:
        if column == "id":
            return keys_of(self._table(group, ["id"]).column(0).to_pylist())
        if column == "length":
            return self._lengths(group)
        # All keys at once: who asks for one asks for another, and opening a shard costs more than a column.
        table = self._table(group, KEYS)
        for name in KEYS:
            self._keep(group, name.removesuffix("_key"), table.column(name).to_numpy())
        values: NDArray[np.int64] = table.column(f"{column}_key").to_numpy()
        return values

    def _table(self, group: RowGroup, columns: Sequence[str]) -> pa.Table:
        return read_row_group(group, columns, self._footers.open(group.file))

    def _lengths(self, group: RowGroup) -> NDArray[np.int64]:
        """The tokens of each row's text, or of its query if that is longer."""
        if self._tokenizer is None:
            raise CorpusError("lengths are of tokens, and there is no tokenizer", where=group.file)
        entry, names = self._member.entry, ["query", "text"] if self._member.kind == "text_pair" else ["text"]
        table = self._table(group, names)
        lengths = []
        for name in names:
            prefix = entry.query_prefix if name == "query" else entry.text_prefix
            tokens = self._tokenizer([(prefix or "") + text for text in table.column(name).to_pylist()])
            lengths.append((tokens != PADDING).sum(1))
        longest: NDArray[np.int64] = np.maximum.reduce(lengths).astype(np.int64)
        return longest


def merged(parts: Sequence[dict[str, NDArray[Any]]]) -> dict[str, NDArray[Any]]:
    """Arrays of several pieces as one, token ids padded to the widest."""
    if len(parts) == 1:
        return parts[0]
    out = {}
    for name in dict.fromkeys(name for part in parts for name in part):
        arrays = [part[name] for part in parts if name in part]
        if name.endswith("tokens"):
            width = max(array.shape[1] for array in arrays)
            padding = [((0, 0), (0, width - array.shape[1])) for array in arrays]
            arrays = [np.pad(a, by, constant_values=PADDING) for a, by in zip(arrays, padding, strict=True)]
        out[name] = np.concatenate(arrays)
    return out


def _caption(row: dict[str, Any], draw: float, main: float) -> str:
    """The main caption for a `draw` in [0, main), else one of all captions, each equally likely."""
    if draw < main or not row["texts"]:
        return str(row["text"])
    return str(row["texts"][int((draw - main) / (1 - main) * len(row["texts"]))])
