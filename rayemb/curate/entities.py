"""Entities: what a pair is a picture of, from its text's names and an encoder (MOFI, Wu et al., 2023; card S134).

Of the method the labelling of the data: candidates by name, the encoder's choice by image and entity text, a
threshold, rare entities dropped and frequent ones capped. Candidates come from a table of names in place of a linker.
The released part of MOFI has no labelling code; thresholds are tunables.
"""

from __future__ import annotations

import itertools
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.json as pajson
import pyarrow.parquet as pq
import ray
import ray.data
from pydantic import Field

from rayemb import storage
from rayemb.curate.base import CurationError, Rows, Verdicts, runs, together, verdicts
from rayemb.curate.names import NameTable, accepted, confidence
from rayemb.curate.vectors import QUERY_VECTOR, EncoderStep, matrix, tables

NONE = -1  # no entity: the text names none, or the encoder believes in none
UNNAMED, DOUBTFUL = "no_entity", "low_confidence"


class Entities(EncoderStep):
    """Edits `concept` to the id of the entity that a row's text names and its image (or query) shows.

    Of several names the encoder chooses; `score` becomes its confidence, (1 + cosine) / 2. Drops rows of entities
    with too few images, and above a cap the least confident. A name that several entities share is decided by the
    encoder as well, so descriptions matter. Two passes over the texts, one over the images, one shuffle by entity.
    """

    name: Literal["entities"] = "entities"
    names: str | None = Field(
        None,
        description="URI of a Parquet, CSV or JSONL table of id, name and (optional) description; an id may come "
        "several times, under other names. Default: the corpus's own concepts",
    )
    threshold: float = Field(0.5, ge=0, le=1, description="confidence that has to be passed; 0 keeps all, 1 none")
    min_rows: int = Field(1, ge=1, description="entities with fewer rows are dropped")
    max_rows: int | None = Field(None, ge=1, description="most rows of an entity, the most confident ones")
    unmatched: Literal["drop", "keep"] = Field("drop", description="what becomes of rows without an entity")

    def inputs(self) -> dict[str, str]:
        """The digests of the model and of the table of names."""
        return super().inputs() | ({"names": storage.sha256_file(self.names)} if self.names else {})

    def judge(self, rows: Rows) -> Verdicts:
        """A verdict for every row, those that `unmatched: keep` leaves alone excepted."""
        table = name_table(self.names) if self.names else self._own_concepts(rows)
        if not table.ids:
            raise CurationError("the table names nothing", where=self.names or rows.corpus.uri)
        held = ray.put(table)

        def mentioned(part: pa.Table) -> pa.Table:
            found = {entity for text in part["text"].to_pylist() for entity in ray.get(held).mentions(text)}
            return pa.table({"entity": pa.array(sorted(found), pa.int64())})

        named = rows.dataset(["text"]).map_batches(mentioned, batch_format="pyarrow", batch_size=None)
        candidates = np.unique(
            np.concatenate([np.zeros(0, np.int64), *(np.asarray(t["entity"]) for t in tables(named))])
        )
        # Only the entities that occur are encoded: a table may name millions.
        texts = [table.texts[entity] for entity in candidates]
        known = ray.put((candidates, self.text_vectors(texts) if texts else np.zeros((0, 1), np.float32)))
        rows.facts.update(entities_known=len(table.ids), entities_named=len(candidates))

        def choose(part: pa.Table) -> pa.Table:
            return self._choose(part, ray.get(held), *ray.get(known))

        chosen = self.vectors(rows, ["query"], keep=["text"]).map_batches(
            choose, batch_format="pyarrow", batch_size=None
        )
        return together(chosen, "entity", lambda part: self._judge(part, ray.get(held)), rows=rows.count)

    def _choose(self, part: pa.Table, table: NameTable, candidates: np.ndarray, vectors: np.ndarray) -> pa.Table:
        """The entity of each row, -1 for none, with the confidence and how many were named."""
        queries = matrix(part, QUERY_VECTOR)
        entity = np.full(len(part), NONE, np.int64)
        trust, named = np.zeros(len(part), np.float32), np.zeros(len(part), np.int64)
        for at, text in enumerate(part["text"].to_pylist()):
            found = table.mentions(text)
            named[at] = len(found)
            if not found:
                continue
            cosines = vectors[np.searchsorted(candidates, found)] @ queries[at]
            best = int(cosines.argmax())
            trust[at] = confidence(float(cosines[best]))
            if accepted(float(trust[at]), self.threshold):
                entity[at] = found[best]
        return pa.table({"row": part["row"], "entity": entity, "confidence": trust, "named": named})

    def _judge(self, part: pa.Table, table: NameTable) -> pa.Table:
        ordinals, entity = np.asarray(part["row"]), np.asarray(part["entity"])
        trust, named = np.asarray(part["confidence"]), np.asarray(part["named"])
        reason: list[str | None] = [None] * len(part)
        what = [f"one of {n} named" for n in named]
        starts = runs(entity)
        for start, stop in itertools.pairwise(starts.tolist()):
            if entity[start] == NONE:
                for at in range(start, stop):
                    reason[at] = DOUBTFUL if named[at] else UNNAMED
                    what[at] = f"{named[at]} named, confidence {trust[at]:.3f}" if named[at] else "no name in the text"
                continue
            order = start + np.argsort(-trust[start:stop], kind="stable")  # the first of equals stays
            rare = stop - start < self.min_rows
            for at in order if rare else order[self.max_rows :] if self.max_rows else []:
                reason[at] = "rare_entity" if rare else "frequent_entity"
                what[at] = f"{table.ids[entity[at]]}: {stop - start} rows"
        drop = np.array([r is not None for r in reason])
        keep = np.ones(len(part), bool) if self.unmatched == "drop" else entity != NONE
        new = [None if d else table.ids[e] for d, e in zip(drop, entity, strict=True)]
        return verdicts(
            ordinals,
            drop=drop,
            reason=pa.array(reason, pa.string()),
            what=what,
            score=trust,
            new_concept=pa.array(new, pa.string()),
            new_score=pa.array([None if d else float(t) for d, t in zip(drop, trust, strict=True)], pa.float32()),
        ).filter(pa.array(keep))

    @staticmethod
    def _own_concepts(rows: Rows) -> NameTable:
        def distinct(part: pa.Table) -> pa.Table:
            return pa.table({"concept": part["concept"].unique()})

        parts = tables(rows.dataset(["concept"]).map_batches(distinct, batch_format="pyarrow", batch_size=None))
        concepts = {concept for part in parts for concept in part["concept"].to_pylist()}
        return NameTable.of((concept, concept, "") for concept in sorted(concepts))


def name_table(uri: str) -> NameTable:
    """The table of names at `uri`. Raises CurationError for one that cannot be read or lacks `id` or `name`."""
    readers = {".parquet": pq.read_table, ".csv": pacsv.read_csv, ".jsonl": pajson.read_json}
    suffix = next((s for s in readers if uri.lower().endswith(s)), None)
    if suffix is None:
        raise CurationError("not a table of names", where=uri, fix="use .parquet, .csv or .jsonl")
    try:
        table = readers[suffix](pa.BufferReader(storage.read_bytes(uri)))
    except (storage.StorageError, pa.ArrowInvalid) as error:
        raise CurationError(f"the table of names cannot be read ({error})", where=uri) from error
    missing = {"id", "name"} - set(table.column_names)
    if missing:
        raise CurationError(f"the table has no column {' or '.join(sorted(missing))}", where=uri)
    columns = [table[name].cast(pa.string()).to_pylist() for name in ("id", "name")]
    about = table["description"].cast(pa.string()).to_pylist() if "description" in table.column_names else None
    descriptions = about or [""] * len(table)
    entries = zip(*columns, descriptions, strict=True)
    return NameTable.of((i, name, said or "") for i, name, said in entries if i is not None and name)
