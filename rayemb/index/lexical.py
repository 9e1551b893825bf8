"""BM25 over a text column, shard by shard beside the vectors: the words a query names, found by letter.

The score of a row is `sum over the query's terms of idf * tf / (tf + k1 (1 - b + b length / mean length))` with
`idf = ln(1 + (N - n + 0.5) / (n + 0.5))` (Robertson and Zaragoza, 2009; the form of Lucene and bm25s). Counts are
stored and not scores, unlike bm25s: rows, terms and lengths of all shards are summed first, so that a sharded index
scores like a whole one, and a new shard needs no other to be written again.

A build with `index.words` writes Arrow files beside the shards: `words-NNNNN.arrow` (term, rows, counts) and
`terms.arrow` (term, rows of all shards that have it).
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from rayemb.index.stored import best_of

K1, B = 1.2, 0.75

# Letters and digits of any script; what is glued together by other characters is several words.
_WORD = re.compile(r"[^\W_]+")
# Below this share of the rows, adding up by row is faster than a score for every row.
_SPARSE = 8

Floats = NDArray[np.float32]
Positions = NDArray[np.int64]


def words(text: str) -> list[str]:
    """The terms of a text: its words in lower case, by Unicode's rules; no stemming, no stop words."""
    return _WORD.findall(text.casefold())


def postings(texts: Iterable[str | None]) -> pa.Table:
    """Term, positions of the rows that have it, and how often each has it: a table ordered by term."""
    found: dict[str, tuple[list[int], list[int]]] = {}
    for position, text in enumerate(texts):
        for term, count in Counter(words(text or "")).items():
            rows, counts = found.setdefault(term, ([], []))
            rows.append(position)
            counts.append(count)
    terms = sorted(found)
    return pa.table(
        {
            "term": pa.array(terms, pa.large_string()),
            "rows": pa.array([found[term][0] for term in terms], pa.large_list(pa.int32())),
            "counts": pa.array([found[term][1] for term in terms], pa.large_list(pa.int32())),
        }
    )


def terms_of(parts: Sequence[pa.Table]) -> pa.Table:
    """Term and number of rows that have it, over the postings of all shards, ordered by term."""
    counted = [pa.table({"term": part["term"], "rows": pc.list_value_length(part["rows"])}) for part in parts]
    summed = pa.concat_tables(counted).group_by("term").aggregate([("rows", "sum")])
    return pa.table({"term": summed["term"], "rows": summed["rows_sum"].cast(pa.int64())}).sort_by("term")


class LexicalShard:
    """The words of one shard's rows. Threads may share it.

    Args:
        found: `postings` of the rows.
        terms: `terms_of` all shards.
        rows: rows of this shard.
        all_rows, length: rows and words of all shards.
    """

    def __init__(self, found: pa.Table, terms: pa.Table, *, rows: int, all_rows: int, length: int) -> None:
        self.rows = rows
        self._own, self._all = _Terms(found["term"]), _Terms(terms["term"])
        self._frequency = terms["rows"].combine_chunks().to_numpy()
        lists = found["rows"].combine_chunks()
        lists = lists.chunk(0) if isinstance(lists, pa.ChunkedArray) else lists
        self._ends = lists.offsets.to_numpy()
        self._rows = lists.values.to_numpy()
        counts = found["counts"].combine_chunks()
        counts = counts.chunk(0) if isinstance(counts, pa.ChunkedArray) else counts
        counts_P = counts.values.to_numpy().astype(np.float32)
        lengths = np.bincount(self._rows, counts_P, minlength=rows)
        mean = length / all_rows if length else 1.0
        norm = (K1 * (1 - B + B * lengths / mean)).astype(np.float32)
        # What a row has of a term, but for the term's weight; once here rather than in each query.
        self._share_P = counts_P / (counts_P + norm[self._rows])
        self._all_rows, self._length = all_rows, length

    def beside(self, texts: Sequence[str | None]) -> "LexicalShard":
        """The words of rows that came later. They are weighed as those that were there then: by the rows, terms and
        lengths of before, and a new term by the new rows that have it.
        """
        found = postings(texts)
        own = pc.list_value_length(found["rows"]).to_pylist()
        known = [self._frequency_of(term) for term in found["term"].to_pylist()]
        rows = [there or min(here, self._all_rows) for there, here in zip(known, own, strict=True)]
        terms = pa.table({"term": found["term"], "rows": pa.array(rows, pa.int64())})
        return LexicalShard(found, terms, rows=len(texts), all_rows=self._all_rows, length=self._length)

    def _frequency_of(self, term: str) -> int:
        place = self._all.place(term)
        return 0 if place is None else int(self._frequency[place])

    def search(self, text: str, k: int, mask_R: NDArray[np.bool_] | None = None) -> tuple[Floats, Positions]:
        """Scores and positions `(k,)` of the best rows that have one of the words of `text`, and pass `mask_R`.

        Best first, lowest position first among equal scores; padded with -inf and -1.
        """
        rows, scores = self._scored(text)
        if mask_R is not None:
            passing = mask_R[rows]
            rows, scores = rows[passing], scores[passing]
        best_scores, best = best_of(scores[None], rows, k)
        return best_scores[0], best[0]

    def _scored(self, text: str) -> tuple[Positions, Floats]:
        """Positions of the rows with one of the words, ascending, and their scores."""
        found: list[tuple[NDArray[np.int32], Floats]] = []
        for term, times in Counter(words(text)).items():
            own = self._own.place(term)
            if own is None:
                continue
            these = slice(self._ends[own], self._ends[own + 1])
            there = int(self._frequency[self._all.place(term)])
            idf = np.float32(times * np.log1p((self._all_rows - there + 0.5) / (there + 0.5)))
            found.append((self._rows[these], idf * self._share_P[these]))
        if sum(len(rows) for rows, _ in found) * _SPARSE > self.rows:
            scores = np.zeros(self.rows, np.float32)
            for rows, share in found:
                scores[rows] += share  # a row occurs once in a term's list
            there_are = np.flatnonzero(scores)
            return there_are.astype(np.int64), scores[there_are]
        if not found:
            return np.zeros(0, np.int64), np.zeros(0, np.float32)
        few, at = np.unique(np.concatenate([rows for rows, _ in found]), return_inverse=True)
        summed = np.bincount(at, np.concatenate([share for _, share in found]), minlength=len(few))
        return few.astype(np.int64), summed.astype(np.float32)


class _Terms:
    """Where a term stands in an ordered column: a binary search, no dictionary in memory."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        array = column.combine_chunks()
        self._terms: pa.Array = array.chunk(0) if isinstance(array, pa.ChunkedArray) else array

    def place(self, term: str) -> int | None:
        low, high = 0, len(self._terms)
        while low < high:
            middle = (low + high) // 2
            if self._terms[middle].as_py() < term:
                low = middle + 1
            else:
                high = middle
        return low if low < len(self._terms) and self._terms[low].as_py() == term else None


def mapped_table(path: str) -> pa.Table:
    """The table in an Arrow file, its pages shared and read on first use."""
    return pa.ipc.open_file(pa.memory_map(path)).read_all()
