"""Exact duplicates, found by the keys that a corpus stores (deduplication by hashing; Lee et al., 2022)."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pyarrow as pa
import ray.data
from pydantic import Field

from rayemb.curate.base import CurationError, Rows, Step, Verdicts, runs, together, verdicts
from rayemb.curate.minhash import mixed

What = Literal["text", "image", "query", "pair"]


class ExactDuplicates(Step):
    """Drops rows that repeat an earlier row's text, image, query or pair of both.

    Texts that differ in case, white space or Unicode form alone are equal; images are equal byte by byte. Reads the
    8-byte keys alone: O(rows), one shuffle of 16 bytes a row.
    """

    name: Literal["exact_duplicates"] = "exact_duplicates"
    of: What = Field("pair", description="what must be equal: text, image, query, or pair (both sides)")

    def judge(self, rows: Rows) -> Verdicts:
        """A verdict for every repeat; its partner is the first row with the same content."""
        check_content(self.of, rows, "curate.exact_duplicates.of")
        keyed = content_keys(rows, self.of)
        return together(keyed, "key", self._judge, rows=rows.count)

    def _judge(self, table: pa.Table) -> pa.Table:
        keys, rows = np.asarray(table["key"]), np.asarray(table["row"])
        starts = runs(keys)
        partner = np.repeat(rows[starts[:-1]], np.diff(starts))
        repeats = partner != rows
        return verdicts(
            row=rows[repeats],
            reason=f"same_{self.of}",
            what=f"has the {self.of} of an earlier row",
            partner=partner[repeats],
        )


def check_content(of: str, rows: Rows, where: str) -> None:
    """Raises CurationError where the corpus has nothing of the kind."""
    missing = {"image_text": "query", "text_pair": "image"}.get(rows.corpus.kind)
    if of == missing or (rows.corpus.kind == "text" and of in ("image", "query")):
        raise CurationError(
            f"a corpus of kind {rows.corpus.kind} has no {of} in its rows",
            where=where,
            fix=f"corpus: {rows.corpus.uri}",
        )


def content_keys(rows: Rows, of: What) -> ray.data.Dataset:
    """The alive rows as `row` and `key`: equal where the content is."""
    columns = {"text": ["text_key"], "pair": ["query_key", "text_key"]}.get(of, ["query_key"])

    def keyed(table: pa.Table) -> pa.Table:
        key = np.asarray(table[columns[0]]).astype(np.uint64)
        for column in columns[1:]:
            key = mixed(mixed(key) + np.asarray(table[column]).astype(np.uint64))
        return pa.table({"row": table["row"], "key": pa.array(key.view(np.int64))})

    return rows.dataset(columns).map_batches(keyed, batch_format="pyarrow", batch_size=None)
