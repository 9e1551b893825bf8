"""What the steps so far have left of a corpus, and how one step's verdicts become files of it."""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data
from numpy.typing import NDArray

from rayemb import storage
from rayemb.curate.base import (
    EDITS,
    VERDICT,
    CurationError,
    Edited,
    Rows,
    Shard,
    Verdicts,
    is_alive,
    shards_of,
)
from rayemb.data import Corpus

RECORD, ALIVE = "_step.json", "alive.bin"
UNSAID = "dropped"  # the reason of a verdict that gives none
SCORES = 4096  # scores of a step that its record samples, about
# Which of a row's verdicts counts.
ORDER = [("row", "ascending"), ("drop", "descending"), ("reason", "ascending"), ("score", "descending")]
ORDER += [("partner_corpus", "ascending"), ("partner", "ascending"), ("what", "ascending")]


@dataclass
class State:
    """The corpus in the middle of its curation. The driver holds one bit a row and one entry a shard."""

    corpus: Corpus
    shards: list[Shard]
    alive: NDArray[np.uint8]  # packed
    counts: dict[str, int]
    edited: Edited

    @classmethod
    def of(cls, corpus: Corpus) -> "State":
        """All rows alive."""
        total = sum(corpus.splits.values())
        return cls(corpus, shards_of(corpus), np.packbits(np.ones(total, bool)), corpus.splits, Edited({}))

    def rows(self, **more: Any) -> Rows:
        """The rows as the next step sees them."""
        counts = dict(self.counts)
        return Rows(self.corpus, alive=ray.put(self.alive), counts=counts, edited=self.edited, **more)

    def after(self, folder: str, record: dict[str, Any], alive: NDArray[np.uint8]) -> "State":
        """The corpus after a step whose verdicts lie in `folder`."""
        parts = {file: list(uris) for file, uris in self.edited.parts.items()}
        for part in record["parts"]:
            if part["edited"]:
                parts.setdefault(part["shard"], []).append(storage.join(folder, part["file"]))
        counts = {split: self.counts[split] - record["dropped"].get(split, 0) for split in self.counts}
        return State(self.corpus, self.shards, alive, counts, Edited(parts))


def write_verdicts(
    found: Verdicts, rows: Rows, state: State, folder: str, examples: int, done: Callable[[int], None]
) -> tuple[dict[str, Any], NDArray[np.uint8]]:
    """Files of a step's verdicts under `folder`, one a shard of the corpus; gives its record and who is alive after.

    One hash shuffle by shard; every task holds the verdicts of one shard. Raises CurationError for a verdict over a
    row that the step was not given.
    """
    if isinstance(found, ray.data.Dataset):
        dataset = found
    else:
        tables = [ray.put(table) for table in found if len(table)]
        dataset = ray.data.from_arrow_refs(tables) if tables else None
    alive, record = state.alive.copy(), Tally(examples)
    if dataset is not None:
        shards, packed = ray.put(state.shards), ray.put(state.alive)
        firsts = ray.put(np.array([shard.first for shard in state.shards], np.int64))
        total, judged, seed, splits = sum(s.rows for s in state.shards), rows.count, rows.seed, rows.splits

        def place(table: pa.Table) -> pa.Table:
            ordinals = np.asarray(table["row"], np.int64)
            if len(ordinals) and not (ordinals.min() >= 0 and ordinals.max() < total):
                raise CurationError(f"a verdict over a row that is not there, {ordinals.min()} to {ordinals.max()}")
            at = np.searchsorted(ray.get(firsts), ordinals, side="right") - 1
            return table.select(VERDICT.names).append_column("shard", pa.array(at.astype(np.int32)))

        def write(table: pa.Table) -> Iterator[pa.Table]:
            for index in np.unique(np.asarray(table["shard"])).tolist():
                shard = ray.get(shards)[index]
                mask = is_alive(ray.get(packed), shard.first, shard.rows)
                some = table.filter(pc.equal(table["shard"], index)).drop_columns(["shard"])
                yield _write(some, index, shard, mask, splits, folder, (judged, seed, examples))

        partitions = max(1, min(len(state.shards), round(judged / 100_000)))
        placed = dataset.map_batches(place, batch_format="pyarrow", batch_size=None)
        parts = placed.repartition(partitions, keys=["shard"])
        written = parts.map_batches(write, batch_format="pyarrow", batch_size=None)
        for number, row in enumerate(written.iter_rows(), 1):
            shard, summary = state.shards[row["shard"]], json.loads(row["summary"])
            _bury(alive, shard, np.unpackbits(np.frombuffer(row["dropped"], np.uint8))[: shard.rows].astype(bool))
            record.add(shard, summary)
            done(number)
    return record.to_json(), alive


class Tally:
    """What a step's record says, gathered over the shards in any order."""

    def __init__(self, examples: int) -> None:
        self.keep = examples
        self.dropped: Counter[str] = Counter()
        self.reasons: Counter[str] = Counter()
        self.edits: Counter[str] = Counter()
        self.parts: list[dict[str, Any]] = []
        self.scores: list[tuple[int, float, bool]] = []
        self.examples: dict[str, list[dict[str, Any]]] = {}

    def add(self, shard: Shard, summary: dict[str, Any]) -> None:
        """One shard's verdicts."""
        self.dropped[shard.split] += summary["dropped"]
        self.reasons.update(summary["reasons"])
        self.edits.update(summary["edits"])
        self.parts.append({"shard": shard.file, **summary["part"]})
        self.scores += summary["scores"]
        for reason, found in summary["examples"].items():
            best = sorted(self.examples.get(reason, []) + found, key=lambda e: (e["order"], e["row"]))
            self.examples[reason] = best[: self.keep]

    def to_json(self) -> dict[str, Any]:
        """The record; the same whatever the order of the shards was."""
        return {
            "dropped": dict(sorted((split, count) for split, count in self.dropped.items() if count)),
            "reasons": dict(sorted(self.reasons.items(), key=lambda item: (-item[1], item[0]))),
            "edits": dict(sorted(self.edits.items())),
            "parts": sorted(self.parts, key=lambda part: part["shard"]),
            "scores": [(score, drop) for _, score, drop in sorted(self.scores)],
            "examples": {reason: self.examples[reason] for reason in sorted(self.examples)},
        }


def _write(
    table: pa.Table,
    index: int,
    shard: Shard,
    alive: NDArray[np.bool_],
    splits: Iterable[str],
    folder: str,
    sample: tuple[int, int, int],
) -> pa.Table:
    """Writes one shard's verdicts; gives a row about them."""
    judged, seed, keep = sample
    table = table.sort_by(ORDER)
    ordinals = np.asarray(table["row"])
    first = np.ones(len(table), bool)
    first[1:] = ordinals[1:] != ordinals[:-1]
    table, ordinals = table.filter(pa.array(first)), ordinals[first]
    if shard.split not in splits or not alive[ordinals - shard.first].all():
        raise CurationError(f"a verdict over a row of {shard.split} that was not to be judged", where=shard.file)
    drop = np.asarray(table["drop"])
    edits = {column: len(table) - table[name].null_count for column, name in EDITS.items()}
    edits = {column: count for column, count in edits.items() if count}
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd", write_page_checksum=True)
    data, file = bytes(sink.getvalue()), shard.file
    storage.write_bytes(storage.join(folder, file), data)
    part = {"file": file, "sha256": storage.sha256_bytes(data), "edited": bool(edits), "dropped": int(drop.sum())}
    order = _mixed(ordinals, seed)
    scores = np.asarray(table["score"].to_pylist(), np.float64)  # nulls become NaN
    chosen = np.isfinite(scores) & (order <= np.uint64(min(1.0, SCORES / max(judged, 1)) * (2**64 - 2**12)))
    dead = np.zeros(shard.rows, bool)
    dead[ordinals[drop] - shard.first] = True
    summary = {
        "dropped": int(drop.sum()),
        "reasons": Counter(reason or UNSAID for reason in table["reason"].filter(pa.array(drop)).to_pylist()),
        "edits": edits,
        "part": part,
        "scores": [(int(order[i]), float(scores[i]), bool(drop[i])) for i in np.flatnonzero(chosen)],
        "examples": _examples(table, order, keep),
    }
    return pa.table({"shard": [index], "summary": [json.dumps(summary)], "dropped": [np.packbits(dead).tobytes()]})


def _examples(table: pa.Table, order: NDArray[np.uint64], keep: int) -> dict[str, list[dict[str, Any]]]:
    """A few dropped or edited rows of each reason, drawn by `order`."""
    edited = np.zeros(len(table), bool)
    for name in EDITS.values():
        edited |= np.asarray(table[name].is_valid())
    found: dict[str, list[dict[str, Any]]] = {}
    told = table.select(["row", "drop", "reason", "what", "score", "partner", "partner_corpus", *EDITS.values()])
    for at in np.argsort(order, kind="stable").tolist():
        if not (edited[at] or table["drop"][at].as_py()):
            continue
        reason = table["reason"][at].as_py() or UNSAID
        if len(found.setdefault(reason, [])) < keep:
            found[reason].append({"order": int(order[at]), **told.slice(at, 1).to_pylist()[0]})
    return found


def _mixed(ordinals: NDArray[np.int64], seed: int) -> NDArray[np.uint64]:
    """A pseudo-random number for each ordinal (splitmix64): a sample that no order of work can change."""
    x = ordinals.astype(np.uint64) + np.uint64((seed + 1) * 0x9E3779B97F4A7C15 % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ (x >> np.uint64(shift))) * np.uint64(factor)
    return x ^ (x >> np.uint64(31))


def _bury(alive: NDArray[np.uint8], shard: Shard, dropped: NDArray[np.bool_]) -> None:
    """Clears the bits of a shard's dropped rows, in place."""
    start, stop = shard.first // 8, (shard.first + shard.rows + 7) // 8
    bits = np.unpackbits(alive[start:stop])
    bits[shard.first - 8 * start :][: shard.rows][dropped] = 0
    alive[start:stop] = np.packbits(bits)
