"""Condensation: few rows a class that stand for all (herding, Welling, 2009; DCC, Lee et al., 2022; card S024).

Herding and random choice keep rows; DC and DCC (gradient matching, `rayemb.curate.matching`) make new vectors, which
are written beside the verdicts for probes, replay and prototypes.
"""

from __future__ import annotations

import itertools
import json
from typing import Literal

import numpy as np
import pyarrow as pa
from pydantic import Field
from safetensors.numpy import save

from rayemb import storage
from rayemb.curate.base import CurationError, Rows, Verdicts, runs, together, verdicts
from rayemb.curate.draw import uniform_of
from rayemb.curate.matching import condense, herding
from rayemb.curate.vectors import VectorStep, collected, matrix
from rayemb.data.embeddings import VECTOR

CONDENSED = "condensed.safetensors"


class Condense(VectorStep):
    """Drops all but `per_class` rows of each concept: those whose mean is the concept's (herding), or any (random).

    A baseline for probes and prototypes, not for training encoders. Memory: the vectors of a bucket's concepts; with
    `synthetic`, those of all rows on the driver. One hash shuffle by concept.
    """

    name: Literal["condense"] = "condense"
    per_class: int = Field(10, ge=1, description="rows of a concept that stay (or are made)")
    select: Literal["herding", "random"] = Field("herding", description="which rows stay; random: the baseline")
    synthetic: Literal["none", "class_wise", "summed"] = Field(
        "none", description="vectors to be made as well: class_wise (DC) or summed (DCC) gradients; none: none"
    )
    synthetic_rows: int = Field(200_000, ge=1, description="more rows than this are not condensed on one machine")

    def judge(self, rows: Rows) -> Verdicts:
        """A verdict for every dropped row; synthetic vectors go to `condensed.safetensors` in the step's folder."""
        vectors = self.one_side(rows, ["concept_key"] if self.synthetic == "none" else ["concept_key", "concept"])
        if self.synthetic != "none":
            if rows.count > self.synthetic_rows:
                raise CurationError(
                    f"{rows.count:,} rows are too many to condense on one machine",
                    where="synthetic_rows",
                    fix="draw a sample first, or allow more",
                )
            vectors = vectors.materialize()
            self._write_synthetic(collected(vectors, ["row", "concept", VECTOR]), rows)
        seed = rows.seed
        return together(vectors, "concept_key", lambda table: self._judge(table, seed), rows=rows.count)

    def _judge(self, table: pa.Table, seed: int) -> pa.Table:
        vectors, ordinals = matrix(table, VECTOR), np.asarray(table["row"])
        starts = runs(np.asarray(table["concept_key"]))
        keep = np.zeros(len(ordinals), bool)
        for start, stop in itertools.pairwise(starts.tolist()):
            if self.select == "herding":
                chosen = herding(vectors[start:stop], self.per_class)
            else:
                chosen = np.argsort(uniform_of(ordinals[start:stop], seed), kind="stable")[: self.per_class]
            keep[start + chosen] = True
        dropped = ordinals[~keep]
        return verdicts(
            dropped, reason="not_chosen", what=f"{self.select} chose {self.per_class} others of its concept"
        )

    def _write_synthetic(self, table: pa.Table, rows: Rows) -> None:
        if self.synthetic == "none" or not rows.folder:
            raise CurationError("synthetic vectors need a folder to be written to", where="synthetic")
        concepts, labels = np.unique(np.array(table["concept"].to_pylist()), return_inverse=True)
        made, of = condense(
            matrix(table, VECTOR), labels.astype(np.int64), self.per_class, method=self.synthetic, seed=rows.seed
        )
        about = {"concepts": json.dumps(concepts.tolist()), "method": self.synthetic}
        storage.write_bytes(storage.join(rows.folder, CONDENSED), save({"vectors": made, "labels": of}, about))
        rows.facts.update(synthetic_vectors=len(made), concepts=len(concepts))
