"""Rules over texts: shared by many images, rare words, boiler-plate (ALIGN, Jia et al., 2021; card S101)."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray
import ray.data
from numpy.typing import NDArray
from pydantic import Field, field_validator

from rayemb.curate.base import Rows, Step, Verdicts, joined, runs, together, verdicts
from rayemb.curate.image_rules import Shared
from rayemb.curate.minhash import mixed
from rayemb.curate.sentences import tokens

BOILER_PLATE = [
    r"^(img|dsc|dscn|dscf|pict?|image|photo|picture|screenshot|untitled|thumbnail|file)?[\s_\-#.:]*\d+$",
    r"^\S*\.(jpe?g|png|gif|webp|bmp|tiff?)$",
    r"\b(click (here|to enlarge)|image (not )?available|no image|stock photo|all rights reserved|copyright ©?)",
    r"\b(lorem ipsum|javascript is disabled|cookies? policy)\b",
]
_URL = re.compile(r"(https?://|www\.)\S+|\b[\w-]+\.(com|org|net|info|html?|php)\b", re.IGNORECASE)


class TextRules(Step):
    """Drops texts that go with many images, that hold rare words, repeated characters or URLs, or say nothing.

    A text shared by more than `max_images` images is dropped with all its rows (one shuffle of 24 bytes a row). A text
    with an n-gram outside of the `vocabulary` most frequent ones is dropped: two passes, the first a shuffle of 16
    bytes for each different n-gram of a block, then a table of 8 bytes an n-gram on every node. Both depend on the
    rows that earlier steps left, and a second run may drop more; the other rules look at one row alone.
    """

    name: Literal["text_rules"] = "text_rules"
    max_images: int | None = Field(10, ge=1, description="texts with more different images are dropped; null: any")
    vocabulary: int | None = Field(
        None, ge=1, description="texts with an n-gram that is not among this many most frequent ones are dropped"
    )
    ngram: Literal[1, 2] = Field(2, description="the vocabulary counts single words, or single words and pairs of them")
    max_repeat: int | None = Field(6, ge=2, description="texts that repeat a character more often in a row are dropped")
    urls: bool = Field(True, description="drop texts with a URL or a host name")
    boiler_plate: list[str] = Field(
        BOILER_PLATE, description="texts that one of these regular expressions matches are dropped (case is ignored)"
    )

    @field_validator("boiler_plate")
    @classmethod
    def _patterns(cls, value: list[str]) -> list[str]:
        for pattern in value:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
        return value

    def judge(self, rows: Rows) -> Verdicts:
        """Verdicts for rows that break a rule."""
        vocabulary = self._frequent(rows) if self.vocabulary else None

        def judge(table: pa.Table) -> pa.Table:
            frequent = ray.get(vocabulary) if vocabulary is not None else None
            return self._judge(table, frequent)

        found = [rows.dataset(["text"]).map_batches(judge, batch_format="pyarrow", batch_size=None)]
        if self.max_images is not None and rows.corpus.kind != "text":
            keys = rows.dataset(["text_key", "query_key"])
            judge_shared = Shared("text_key", "query_key", self.max_images, "shared_text", "{:,} images have the text")
            found.append(together(keys, "text_key", judge_shared, rows=rows.count))
        return joined(found)

    def _judge(self, table: pa.Table, frequent: NDArray[np.int64] | None) -> pa.Table:
        repeated = re.compile(rf"(\S)\1{{{self.max_repeat},}}") if self.max_repeat else None
        patterns = [re.compile(pattern, re.IGNORECASE) for pattern in self.boiler_plate]
        out: list[tuple[int, str, str]] = []
        for row, text in zip(table["row"].to_pylist(), table["text"].to_pylist(), strict=True):
            text = (text or "").strip()
            if self.urls and (found := _URL.search(text)):
                out.append((row, "url", f"has {found.group()[:60]!r}"))
            elif repeated and (found := repeated.search(text)):
                out.append((row, "repeated_character", f"has {found.group()[:20]!r}"))
            elif found := next((match for pattern in patterns if (match := pattern.search(text))), None):
                out.append((row, "boiler_plate", f"has {found.group()[:60]!r}"))
            elif frequent is not None and (rare := _rare(text, self.ngram, frequent)):
                out.append((row, "rare_word", f"{rare!r} is not among the {self.vocabulary:,} most frequent"))
        columns = [list(column) for column in zip(*out, strict=True)] or [[], [], []]
        return verdicts(row=columns[0], reason=columns[1], what=columns[2])

    def _frequent(self, rows: Rows) -> Any:
        """A reference to the sorted keys of the most frequent n-grams; with ties at the end, none of the tied."""
        assert self.vocabulary is not None
        size = self.vocabulary

        def count(table: pa.Table) -> pa.Table:
            found = [ngram_keys(tokens(text or ""), self.ngram) for text in table["text"].to_pylist()]
            keys, counts = np.unique(np.concatenate([np.zeros(0, np.int64), *found]), return_counts=True)
            return pa.table({"key": keys, "count": counts})

        def add(table: pa.Table) -> pa.Table:
            keys, counts = np.asarray(table["key"]), np.asarray(table["count"])
            starts = runs(keys)
            return pa.table({"key": keys[starts[:-1]], "count": np.add.reduceat(counts, starts[:-1])})

        counted = rows.dataset(["text"]).map_batches(count, batch_format="pyarrow", batch_size=None)
        parts = together(counted, "key", add, rows=rows.count * 8).to_arrow_refs()
        histogram: Counter[int] = Counter()
        for part in ray.get([ray.remote(_histogram).remote(part) for part in parts]):
            histogram.update(part)
        total, least = 0, 1 + max(histogram, default=0)
        for frequency in sorted(histogram, reverse=True):
            total += histogram[frequency]
            if total > size:
                break
            least = frequency
        rows.facts["vocabulary"] = f"n-grams that occur {least:,} times or more"
        return ray.remote(_most).remote(least, *parts)


def ngram_keys(words: list[str], ngram: int) -> NDArray[np.int64]:
    """Keys of the single words, then (for `ngram` 2) of the pairs of neighbours."""
    codes = [word.encode() for word in words]
    ones = mixed(np.array([zlib.crc32(code) << 32 | zlib.adler32(code) for code in codes], np.uint64))
    twos = mixed(ones[:-1] * np.uint64(3) + ones[1:]) if ngram == 2 else ones[:0]
    return np.concatenate([ones, twos]).view(np.int64)


def _rare(text: str, ngram: int, frequent: NDArray[np.int64]) -> str:
    """The first n-gram of a text that is not among the frequent ones; empty if all are."""
    words = tokens(text)
    keys = ngram_keys(words, ngram)
    if not len(frequent):
        return words[0] if words else ""
    at = np.minimum(np.searchsorted(frequent, keys), len(frequent) - 1)
    missing = np.flatnonzero(frequent[at] != keys)
    if not len(missing):
        return ""
    first = int(missing[0])
    return words[first] if first < len(words) else " ".join(words[first - len(words) :][:2])


def _histogram(table: pa.Table) -> Counter[int]:
    if not table.num_rows:  # and no columns
        return Counter()
    values, counts = np.unique(np.asarray(table["count"]), return_counts=True)
    return Counter(dict(zip(values.tolist(), counts.tolist(), strict=True)))


def _most(least: int, *tables: pa.Table) -> NDArray[np.int64]:
    keys = [np.asarray(table["key"])[np.asarray(table["count"]) >= least] for table in tables if table.num_rows]
    return np.sort(np.concatenate([np.zeros(0, np.int64), *keys]))
