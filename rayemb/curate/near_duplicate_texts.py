"""Near-duplicate texts by MinHash and locality-sensitive hashing (Broder, 1997; Lee et al., 2022)."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray.data
from numpy.typing import NDArray
from pydantic import Field
from scipy.sparse import csr_array

from rayemb.config import Config
from rayemb.curate.base import Rows, Step, Verdicts, together
from rayemb.curate.minhash import Unit, band_keys, banding, mixed, shingles, signatures
from rayemb.curate.neighbours import group_verdicts, near_edges


class TextLikeness(Config):
    """When two texts are near: the Jaccard similarity of their sets of character or word n-grams."""

    threshold: float = Field(0.8, gt=0, le=1, description="Jaccard similarity from which two texts are near")
    unit: Unit = Field("char", description="what n-grams are made of; characters suit short texts and any language")
    size: int = Field(4, ge=1, le=32, description="characters or words in an n-gram")
    permutations: int = Field(128, ge=8, le=1024, description="length of a MinHash signature")
    recall: float = Field(
        0.99, gt=0, lt=1, description="chance that a pair just at the threshold is compared; above it, it is higher"
    )

    def records(self, rows: Rows, column: str) -> ray.data.Dataset:
        """A record for each band of each text: `key`, `row`, `content` (equal for equal sets), `shingles`."""
        bands, rows_a_band = banding(self.threshold, self.permutations, self.recall)
        # The rooms' seeds may be as large as they like; datasketch's are 32 bits.
        seed = rows.seed % 2**32

        def records(table: pa.Table) -> pa.Table:
            texts = table[column].to_pylist()
            sets = [shingles(text or "", self.unit, self.size) for text in texts]
            some = np.flatnonzero([len(each) for each in sets])
            sets = [sets[at] for at in some]
            keys = band_keys(signatures(sets, self.permutations, seed), bands, rows_a_band)
            content = [int(mixed(mixed(each).sum(keepdims=True))[0]) for each in sets]
            at = np.repeat(np.arange(len(sets)), bands)
            lists = pa.array([each.view(np.int64) for each in sets], pa.list_(pa.int64()))
            return pa.table(
                {
                    "key": pa.array(keys.ravel()),
                    "row": table["row"].take(pa.array(some[at])),
                    "content": pa.array(np.array(content, np.uint64).view(np.int64)[at]),
                    "shingles": lists.take(pa.array(at)),
                }
            )

        return rows.dataset([column]).map_batches(records, batch_format="pyarrow", batch_size=1024)

    @property
    def bands(self) -> int:
        """Records that each text makes."""
        return banding(self.threshold, self.permutations, self.recall)[0]


class NearDuplicateTexts(Step, TextLikeness):
    """Drops texts that are near to an earlier row's, directly or through others: one row of a group stays.

    Candidates share a band of their MinHash signatures; each is verified by its exact Jaccard similarity, so nothing
    is dropped for a hash's sake, and pairs at the threshold are missed with probability 1 - recall. O(rows) signatures,
    then a shuffle of bands x (24 + 8 x n-grams) bytes a row; comparisons are quadratic in the distinct texts of a band.
    Texts without a letter stay.
    """

    name: Literal["near_duplicate_texts"] = "near_duplicate_texts"
    column: Literal["text", "query"] = Field("text", description="the column that is compared")

    def judge(self, rows: Rows) -> Verdicts:
        """A verdict for every row but the first of a group; the score is its similarity to the nearest of the group."""
        records = self.records(rows, self.column)
        edges = together(records, "key", self._edges, rows=rows.count * self.bands)
        bands, rows_a_band = banding(self.threshold, self.permutations, self.recall)
        rows.facts["bands"] = f"{bands} of {rows_a_band} permutations"
        return group_verdicts(edges, "near_text", "Jaccard similarity {:.2f} to the nearest of its group".format)

    def _edges(self, table: pa.Table) -> pa.Table:
        grams = Shingles(table["shingles"])
        return near_edges(table, grams.jaccard, self.threshold)


class Shingles:
    """The sets of a table's column `shingles` as a sparse matrix, for comparing many pairs at once."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        lists = column.combine_chunks()
        values = np.asarray(lists.flatten())
        _, ids = np.unique(values, return_inverse=True)
        self.sizes = np.asarray(lists.value_lengths()).astype(np.int64)
        bounds = np.concatenate([[0], np.cumsum(self.sizes)])
        width = int(ids.max(initial=0)) + 1
        self.matrix: Any = csr_array((np.ones(len(ids), np.int32), ids, bounds), (len(self.sizes), width))

    def jaccard(self, i: NDArray[np.int64], j: NDArray[np.int64]) -> NDArray[np.float64]:
        """Similarities of the sets at places i with those at places j."""
        common = np.asarray(self.matrix[i].multiply(self.matrix[j]).sum(axis=1)).ravel()
        return np.asarray(common / (self.sizes[i] + self.sizes[j] - common))
