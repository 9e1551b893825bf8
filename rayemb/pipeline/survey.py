"""What a corpus or a source holds, in figures: counts, lengths, sizes, duplicates, bad rows, and a few rows to look at.

The cost is bounded. Counts come from the manifest, duplicates from the key columns (16 bytes a row), everything else
from a seeded sample of row groups whose size is stated.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from rayemb import storage
from rayemb.data import Corpus, CorpusConfig
from rayemb.data.build import QUARANTINE, concept_of, judge, split_of
from rayemb.data.corpus import SCHEMA, open_shard, read_row_group
from rayemb.data.keys import keys_of, text_keys
from rayemb.data.sources import RawRow, SourceError
from rayemb.models import describe_image

SAMPLE_ROWS, UNITS, SHOWN, BAD_SHOWN = 2000, 16, 24, 20
_COLUMNS = ("id", "image", "query", "text", "texts", "negatives", "concept", "score", "style", "license")


@dataclass(frozen=True)
class Histogram:
    """How often a size occurs, in bins that double: bin `i` holds [edges[i], edges[i + 1])."""

    name: str
    unit: str
    edges: list[int]
    counts: list[int]
    median: float
    smallest: int
    largest: int

    @classmethod
    def of(cls, name: str, unit: str, values: Sequence[int]) -> "Histogram | None":
        """None where there are no values."""
        if not values:
            return None
        # 0 has a bin of its own; then 1, 2-3, 4-7, ...
        bins = [value.bit_length() for value in values]
        first, last = min(bins), max(bins)
        counts = np.bincount(np.array(bins) - first, minlength=last - first + 1)
        edges = [0 if k == 0 else 1 << (k - 1) for k in range(first, last + 2)]
        return cls(name, unit, edges, counts.tolist(), float(np.median(values)), min(values), max(values))


@dataclass(frozen=True)
class Duplicates:
    """Rows whose content another row before them has."""

    what: str
    rows: int
    distinct: int

    @property
    def share(self) -> float:
        """Of all rows."""
        return 1 - self.distinct / self.rows if self.rows else 0.0


@dataclass(frozen=True)
class Split:
    """One split: its rows, its files (0: a sample has none), medians over its part of the sample."""

    name: str
    rows: int
    files: int
    text_length: float | None
    image_size: str


@dataclass
class Survey:
    """Everything that `rayemb data inspect` shows."""

    title: str
    facts: dict[str, str]
    kind: str
    rows: int
    splits: list[Split]
    schema: list[tuple[str, str]]
    duplicates: list[Duplicates]
    duplicates_of: str  # "all rows", or of how many
    bad_rows: int
    reasons: dict[str, int]
    sample_rows: int
    histograms: list[Histogram] = field(default_factory=list)
    sizes: list[tuple[str, int]] = field(default_factory=list)  # the most frequent "width x height"
    formats: dict[str, int] = field(default_factory=dict)
    sample: list[dict[str, Any]] = field(default_factory=list)
    bad: list[dict[str, Any]] = field(default_factory=list)


def survey_corpus(uri: str, *, sample_rows: int = SAMPLE_ROWS, seed: int = 0) -> Survey:
    """What the corpus at `uri` holds. Raises CorpusError, StorageError."""
    corpus = Corpus.open(uri)
    manifest = corpus.manifest
    rows = list(_sampled(corpus, sample_rows, seed))
    quarantine = manifest.get("quarantine", {"rows": 0, "reasons": {}})
    survey = Survey(
        title=f"corpus {corpus.uri}",
        facts={"digest": corpus.digest[:12], "built": str(manifest.get("created", "unknown"))},
        kind=corpus.kind,
        rows=sum(corpus.splits.values()),
        splits=[],
        schema=[(name.name, str(name.type)) for name in SCHEMA],
        duplicates=_key_duplicates(corpus),
        duplicates_of="all rows",
        bad_rows=int(quarantine["rows"]),
        reasons=dict(quarantine["reasons"]),
        sample_rows=len(rows),
        bad=list(islice(_quarantined(corpus.uri), BAD_SHOWN)),
    )
    counts = {name: (split["rows"], len(split["files"])) for name, split in manifest["splits"].items()}
    return _described(survey, rows, counts, seed)


def survey_source(config: CorpusConfig, *, sample_rows: int = SAMPLE_ROWS, seed: int = 0) -> Survey:
    """What a sample of the source holds and what would become of its rows. Raises SourceError, StorageError."""
    units = config.source.units(config.seed)
    if not units:
        raise SourceError("the source has no rows", where="corpus.source")
    chosen = np.random.default_rng(seed).permutation(len(units))[:UNITS]
    good: list[dict[str, Any]] = []
    reasons: Counter[str] = Counter()
    bad: list[dict[str, Any]] = []
    for number in sorted(chosen.tolist()):
        for row in islice(config.source.read(units[number]), max(1, sample_rows // len(chosen))):
            if problem := row.problem or judge(row, config):
                reasons[problem[0]] += row.count
                bad.append({"source": row.source, "id": row.id, "reason": problem[0], "what": problem[1]})
            else:
                good.append(_as_built(row, config))
    survey = Survey(
        title=f"source {getattr(config.source, 'uri', config.source.name)}",
        facts={"units": f"{len(units):,}", "read": f"the beginnings of {len(chosen)} of them, of a seeded choice"},
        kind=config.source.kind,
        rows=len(good),
        splits=[],
        schema=[(name, str(SCHEMA.field(name).type)) for name in _COLUMNS],
        duplicates=_row_duplicates(good, config.source.kind),
        duplicates_of=f"the {len(good):,} good rows of the sample",
        bad_rows=sum(reasons.values()),
        reasons=dict(reasons),
        sample_rows=len(good),
        bad=bad[:BAD_SHOWN],
    )
    counts = {name: (count, 0) for name, count in sorted(Counter(row["split"] for row in good).items())}
    return _described(survey, good, counts, seed)


def _as_built(row: RawRow, config: CorpusConfig) -> dict[str, Any]:
    values = {name: getattr(row, name) for name in _COLUMNS}
    split = row.split or split_of(concept_of(row), config)
    return {**values, "text": str(row.text).strip(), "concept": concept_of(row), "split": split}


def _sampled(corpus: Corpus, sample_rows: int, seed: int) -> Iterator[dict[str, Any]]:
    """Whole row groups of every split, in a seeded order, until the split's share of the sample is reached."""
    share = max(1, sample_rows // max(1, len(corpus.splits)))
    for name in corpus.splits:
        groups = corpus.row_groups(name)
        left = share
        for number in np.random.default_rng([seed, len(groups)]).permutation(len(groups)):
            table = read_row_group(groups[number], _COLUMNS).slice(0, left)
            yield from ({**row, "split": name} for row in table.to_pylist())
            left -= table.num_rows
            if left <= 0:
                break


def _described(survey: Survey, rows: list[dict[str, Any]], counts: dict[str, tuple[int, int]], seed: int) -> Survey:
    """`survey` with what the sampled rows show."""
    images = {}
    for number, row in enumerate(rows):
        if row["image"] is not None:
            images[number] = describe_image(row["image"])
    for name, (total, files) in counts.items():
        mine = [number for number, row in enumerate(rows) if row["split"] == name]
        lengths = [len(rows[number]["text"]) for number in mine]
        sizes = [images[number] for number in mine if number in images]
        size = f"{np.median([w for _, w, _ in sizes]):g} x {np.median([h for _, _, h in sizes]):g}" if sizes else ""
        survey.splits.append(Split(name, total, files, float(np.median(lengths)) if lengths else None, size))
    texts = {"text": [row["text"] for row in rows], "query": [row["query"] for row in rows if row["query"]]}
    found = [
        Histogram.of(f"{name} length", unit, [measure(text) for text in values])
        for name, values in texts.items()
        for unit, measure in (("characters", len), ("words", _words))
    ]
    found += [
        Histogram.of("image width", "pixels", [width for _, width, _ in images.values()]),
        Histogram.of("image height", "pixels", [height for _, _, height in images.values()]),
        Histogram.of("image file", "bytes", [len(rows[number]["image"]) for number in images]),
    ]
    survey.histograms = [histogram for histogram in found if histogram]
    survey.sizes = Counter(f"{width} x {height}" for _, width, height in images.values()).most_common(8)
    survey.formats = dict(Counter(form for form, _, _ in images.values()).most_common())
    order = np.random.default_rng(seed).permutation(len(rows))[:SHOWN]
    survey.sample = [
        {**rows[number], "size": "{} {} x {}".format(*images[number]) if number in images else ""}
        for number in sorted(order.tolist())
    ]
    return survey


def _words(text: str) -> int:
    return len(text.split())


def _quarantined(uri: str) -> Iterator[dict[str, Any]]:
    for file in storage.list_files(storage.join(uri, QUARANTINE), ".parquet"):
        fs, path = storage.filesystem(file)
        yield from pq.ParquetFile(path, filesystem=fs).read(["source", "id", "reason", "what"]).to_pylist()


def _key_duplicates(corpus: Corpus) -> list[Duplicates]:
    """Exact, over all splits, from the key columns alone."""
    queries, texts = [], []
    for split in corpus.manifest["splits"].values():
        for entry in split["files"]:
            table = open_shard(storage.join(corpus.uri, entry["file"])).read(columns=["query_key", "text_key"])
            queries.append(table.column(0).to_numpy())
            texts.append(table.column(1).to_numpy())
    return _duplicates(_joined(queries), _joined(texts), corpus.kind)


def _row_duplicates(rows: Iterable[dict[str, Any]], kind: str) -> list[Duplicates]:
    rows = list(rows)
    texts = text_keys(row["text"] for row in rows)
    if kind == "text":
        return _duplicates(texts, texts, kind)
    queries = text_keys(row["query"] for row in rows) if kind == "text_pair" else keys_of(row["image"] for row in rows)
    return _duplicates(queries, texts, kind)


def _duplicates(queries: NDArray[np.int64], texts: NDArray[np.int64], kind: str) -> list[Duplicates]:
    found = [Duplicates("texts", len(texts), len(np.unique(texts)))]
    if kind != "text":
        pairs = queries.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) ^ texts.astype(np.uint64)
        name = "images" if kind == "image_text" else "queries"
        found += [
            Duplicates(name, len(queries), len(np.unique(queries))),
            Duplicates("pairs", len(pairs), len(np.unique(pairs))),
        ]
    return found


def _joined(parts: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
