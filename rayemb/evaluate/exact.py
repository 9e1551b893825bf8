"""Exact search over a corpus of any size: the same neighbours to the last bit, in one process or on Ray tasks.

Suffixes: Q queries, N rows of the corpus, D dimensions, K neighbours, B queries and M rows of one block, P pairs.

How a matrix product rounds depends on the shape of its blocks, so blocks of another size would give other scores and,
among near ties, other neighbours. Here the product says only which rows *may* be among the k best, under the bound of
its rounding error (Higham, 2002, section 3.1: γ_D |q||c|); those few are scored by a sum whose order is fixed. The
result is then a property of the vectors: of a row's score, and of smaller rows before larger ones where scores tie.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from rayemb.data.embeddings import EmbeddingsTable
from rayemb.evaluate.errors import EvaluateError
from rayemb.progress import Progress

BLOCK_ROWS = 65_536
"""Rows of a corpus read at once: 32 MB at 128 dimensions."""
SCORES_BYTES = 64 << 20
"""Of the similarities of one block of queries with one block of rows."""
PAIRS_BYTES = 32 << 20
MERGED_AT_ONCE = 4
CROWD = 16
"""More candidates than CROWD·(k + 16) a query: the vectors lie close together, and the product is done in float64."""


class Neighbours(NamedTuple):
    """The k best rows of each query, best first; where there are fewer, -1 and -inf at the end."""

    rows: NDArray[np.int64]  # (Q, K)
    scores: NDArray[np.float64]  # (Q, K) inner products, cosines of unit vectors


class Vectors(Protocol):
    """A corpus that can be read in parts."""

    @property
    def rows(self) -> int:
        """How many there are."""

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Rows `start .. stop-1`, `(stop - start, D)`."""


class VectorSearch(Protocol):
    """A search given from outside, such as the sharded index: what `exact_search` gives, as well as it can."""

    @property
    def table(self) -> tuple[str, int]:
        """Address and version of the embeddings table whose rows it finds."""

    def __call__(self, queries: NDArray[np.float32], k: int) -> Neighbours:
        """The k best rows of the embeddings table that was indexed, for queries `(Q, D)`."""


@dataclass(frozen=True)
class ArrayVectors:
    """Those in memory."""

    array: NDArray[np.float32]
    first: int = 0  # the row that it begins with, where it is a part

    @property
    def rows(self) -> int:
        """See `Vectors.rows`."""
        return self.first + len(self.array)

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """See `Vectors.read`."""
        return self.array[start - self.first : stop - self.first]


class TableVectors:
    """Those of an embeddings table, at one version; a worker that gets this opens the table itself."""

    def __init__(self, uri: str, version: int | None = None) -> None:
        self._table: EmbeddingsTable | None = EmbeddingsTable.open(uri, version)
        self.uri, self.version, self.rows = self._table.uri, self._table.version, self._table.rows

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """See `Vectors.read`."""
        if self._table is None:
            self._table = EmbeddingsTable.open(self.uri, self.version)
        return self._table.vectors(start, stop)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_table": None}


def exact_search(
    queries: NDArray[np.float32],
    corpus: NDArray[np.float32] | Vectors,
    k: int,
    *,
    exclude: NDArray[np.int64] | None = None,
    block: int = BLOCK_ROWS,
    tasks: int | None = None,
    progress: Progress | None = None,
) -> Neighbours:
    """The k rows of the corpus with the largest inner products with each query; ties go to the smaller row.

    Args:
        queries: `(Q, D)` float32.
        corpus: `(N, D)` float32, or what reads it in parts.
        k: neighbours; where the corpus has fewer, the rest is -1.
        exclude: `(Q, E)` int64: rows that are no answer to that query, filled up with -1.
        block: rows read at once. It changes neither rows nor scores.
        tasks: Ray tasks that share the rows, merged in a tree; None: this process. It changes nothing either.

    O(Q N D) time. Memory O(Q k + block D) and 64 MB a process; on Ray a merge holds 4 results of `(Q, k)` at once.
    Raises EvaluateError for shapes that don't fit, and naming the first row that is not finite.
    """
    vectors = ArrayVectors(floats(corpus, "corpus")) if isinstance(corpus, np.ndarray) else corpus
    q_QD = floats(queries, "queries")
    check_finite(q_QD, 0, "queries")
    if k < 1 or block < 1 or (tasks is not None and tasks < 1):
        raise EvaluateError(f"k, block and tasks count from 1, got {k}, {block} and {tasks}", where="exact search")
    excluded_QE = np.empty((len(q_QD), 0), np.int64) if exclude is None else np.asarray(exclude, np.int64)
    if excluded_QE.ndim != 2 or len(excluded_QE) != len(q_QD):
        raise EvaluateError(f"expected (Q, E) for {len(q_QD):,} queries, got {excluded_QE.shape}", where="exclude")
    part = _SearchPart(k, block)
    if tasks is None:
        return part.run(q_QD, vectors, 0, vectors.rows, excluded_QE, progress)
    found: Neighbours = on_ray(part, q_QD, vectors, excluded_QE, tasks=tasks, progress=progress)
    return found


@dataclass(frozen=True)
class _SearchPart:
    k: int
    block: int

    def run(
        self,
        q_QD: NDArray[np.float32],
        corpus: Vectors,
        start: int,
        stop: int,
        excluded_QE: NDArray[np.int64],
        progress: Progress | None = None,
    ) -> Neighbours:
        best = Neighbours(np.full((len(q_QD), self.k), -1, np.int64), np.full((len(q_QD), self.k), -np.inf, np.float64))
        norms_Q = np.linalg.norm(q_QD.astype(np.float64), axis=1)
        for first in range(start, stop, self.block):
            last = min(first + self.block, stop)
            c_MD = read_block(corpus, first, last, q_QD.shape[1])
            reach = longest_product(norms_Q, c_MD, first)
            step = max(1, SCORES_BYTES // (4 * len(c_MD)))
            for at in range(0, len(q_QD), step):
                own = slice(at, at + step)
                mine = Neighbours(best.rows[own], best.scores[own])
                pairs = _candidates(q_QD[own], c_MD, mine.scores[:, -1], reach[own], excluded_QE[own] - first, self.k)
                scores_P = fixed_scores(q_QD[own], c_MD, *pairs)
                better = _best(self.k, len(mine.rows), [_pairs(mine), (pairs[0], pairs[1] + first, scores_P)])
                best.rows[own], best.scores[own] = better
            if progress:
                progress(last - start, stop - start, f"{last - start:,} rows searched")
        return best

    def merge(self, *parts: Neighbours) -> Neighbours:
        """The best of what parts of the corpus found."""
        return _best(self.k, len(parts[0].rows), [_pairs(part) for part in parts])


def _candidates(
    q_BD: NDArray[np.float32],
    c_MD: NDArray[np.float32],
    least_B: NDArray[np.float64],
    reach_B: NDArray[np.float64],
    excluded_BE: NDArray[np.int64],
    k: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Pairs (query, row) of the block, P of them, that hold all which can be among the k best.

    `least_B`: what a query's k-th best scores so far. `reach_B`: |q| times the longest row.
    """
    error_B = product_error(q_BD.shape[1], np.float32, reach_B)
    mask_BM = _may_be_best(q_BD @ c_MD.T, least_B, error_B, excluded_BE, k)
    if mask_BM.sum() > CROWD * (k + 16) * len(q_BD):
        # A float32 product cannot tell the rows of a collapsed space apart; in the worst case all would be candidates.
        error_B = product_error(q_BD.shape[1], np.float64, reach_B)
        s_BM = q_BD.astype(np.float64) @ c_MD.T.astype(np.float64)
        mask_BM = _may_be_best(s_BM, least_B, error_B, excluded_BE, k)
    queries, rows = np.nonzero(mask_BM)
    return queries.astype(np.int64), rows.astype(np.int64)


def _may_be_best(
    s_BM: NDArray[Any],
    least_B: NDArray[np.float64],
    error_B: NDArray[np.float64],
    excluded_BE: NDArray[np.int64],
    k: int,
) -> NDArray[np.bool_]:
    queries, places = np.nonzero((excluded_BE >= 0) & (excluded_BE < s_BM.shape[1]))
    s_BM[queries, excluded_BE[queries, places]] = -np.inf
    mask = _at_least(s_BM, least_B - error_B)
    many = np.flatnonzero(mask.sum(axis=1) > k + 16)
    if len(many) and s_BM.shape[1] > k:
        # k rows of the block score at least its k-th best product minus the error, so that each of the k best has a
        # product of at least that minus the error twice.
        kth = np.partition(s_BM[many], s_BM.shape[1] - k, axis=1)[:, s_BM.shape[1] - k]
        mask[many] &= _at_least(s_BM[many], kth.astype(np.float64) - 2 * error_B[many])
    return mask


def _at_least(s_BM: NDArray[Any], bound_B: NDArray[np.float64]) -> NDArray[np.bool_]:
    low_B = np.maximum(bound_B, np.finfo(s_BM.dtype).min / 2).astype(s_BM.dtype)
    mask: NDArray[np.bool_] = s_BM >= np.nextafter(low_B, s_BM.dtype.type(-np.inf))[:, None]  # it may be rounded up
    mask &= s_BM > -np.inf
    return mask


def fixed_scores(
    q_BD: NDArray[np.float32], c_MD: NDArray[np.float32], queries_P: NDArray[np.int64], rows_P: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Inner products `(P,)`: float64 products of float32 numbers are exact, and NumPy sums a row in one fixed order."""
    scores_P = np.empty(len(rows_P))
    step = max(1, PAIRS_BYTES // (16 * q_BD.shape[1]))
    for at in range(0, len(rows_P), step):
        part = slice(at, at + step)
        products = q_BD[queries_P[part]].astype(np.float64)
        products *= c_MD[rows_P[part]]
        scores_P[part] = products.sum(axis=1)
    return scores_P


Pairs = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]  # queries, rows, scores: (P,) each


def _pairs(found: Neighbours) -> Pairs:
    queries, places = np.nonzero(found.rows >= 0)
    return queries.astype(np.int64), found.rows[queries, places], found.scores[queries, places]


def _best(k: int, queries: int, parts: Sequence[Pairs]) -> Neighbours:
    q_P, rows_P, scores_P = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((rows_P, -scores_P, q_P))
    q_P, rows_P, scores_P = q_P[order], rows_P[order], scores_P[order]
    place_P = np.arange(len(q_P)) - np.searchsorted(q_P, q_P)
    kept = place_P < k
    best = Neighbours(np.full((queries, k), -1, np.int64), np.full((queries, k), -np.inf))
    best.rows[q_P[kept], place_P[kept]] = rows_P[kept]
    best.scores[q_P[kept], place_P[kept]] = scores_P[kept]
    return best


# -- shared with the exact ranks ----------------------------------------------------------------------------


class Part(Protocol):
    """Work on a span of a corpus's rows, whose results merge in any order."""

    def run(
        self,
        q_QD: NDArray[np.float32],
        corpus: Vectors,
        start: int,
        stop: int,
        more: Any,
        progress: Progress | None = None,
    ) -> Any:
        """What rows `start .. stop-1` give."""

    def merge(self, *parts: Any) -> Any:
        """The results of several spans as one."""


def on_ray(
    part: Part, q_QD: NDArray[np.float32], corpus: Vectors, more: Any, *, tasks: int, progress: Progress | None = None
) -> Any:
    """The result of `part` over all rows, in so many Ray tasks; results are merged in a tree where they lie."""
    import ray

    task, merging = ray.remote(num_cpus=1)(_run), ray.remote(num_cpus=1)(_merge)
    queries, shared = ray.put(q_QD), ray.put(more)
    bounds = [corpus.rows * number // tasks for number in range(tasks + 1)]
    spans = [span for span in pairwise(bounds) if span[0] < span[1]] or [(0, 0)]
    results = [task.remote(part, queries, _span(corpus, *span), *span, shared) for span in spans]
    pending = list(results)
    while pending:
        _, pending = ray.wait(pending, num_returns=1)
        if progress:
            progress(len(spans) - len(pending), len(spans), f"{len(spans) - len(pending)} of {len(spans)} parts done")
    while len(results) > 1:
        results = [
            merging.remote(part, *results[at : at + MERGED_AT_ONCE]) for at in range(0, len(results), MERGED_AT_ONCE)
        ]
    return ray.get(results[0])


def _run(part: Part, q_QD: NDArray[np.float32], corpus: Vectors, start: int, stop: int, more: Any) -> Any:
    return part.run(q_QD, corpus, start, stop, more)


def _merge(part: Part, *results: Any) -> Any:
    return part.merge(*results)


def _span(corpus: Vectors, start: int, stop: int) -> Vectors:
    return ArrayVectors(corpus.read(start, stop), start) if isinstance(corpus, ArrayVectors) else corpus


def read_block(corpus: Vectors, first: int, last: int, dim: int) -> NDArray[np.float32]:
    """Rows `first .. last-1`. Raises EvaluateError for another dimension, and naming the first that is not finite."""
    c_MD = floats(corpus.read(first, last), "corpus")
    if c_MD.shape != (last - first, dim):
        raise EvaluateError(
            f"rows {first:,} to {last:,} have the shape {c_MD.shape}, queries {dim} dimensions", where="corpus"
        )
    check_finite(c_MD, first, "corpus")
    return c_MD


def longest_product(norms_Q: NDArray[np.float64], c_MD: NDArray[np.float32], first: int) -> NDArray[np.float64]:
    """|q| times the longest row `(Q,)`. Raises EvaluateError where a product would overflow."""
    longest = np.sqrt(np.einsum("md,md->m", c_MD, c_MD, dtype=np.float64)).max(initial=0.0)
    reach_Q: NDArray[np.float64] = norms_Q * longest
    if (reach_Q > np.finfo(np.float32).max / 2).any():
        raise EvaluateError(
            f"vectors of length {longest:.3g} overflow", where=f"corpus, from row {first:,}", fix="normalise them"
        )
    return reach_Q


def product_error(dim: int, dtype: type[np.floating[Any]], reach_Q: NDArray[np.float64]) -> NDArray[np.float64]:
    """How far `(Q,)` a product of two matrices of `dtype` may be from `fixed_scores`, whatever the order of its sums.

    `reach_Q` is |q| times the longest row. Numbers that underflow are in it.
    """
    terms = 2 * (dim + 4) * float(np.finfo(dtype).eps) / 2
    return reach_Q * (terms / (1 - terms)) + dim * float(np.finfo(np.float32).tiny)


def floats(array: Any, name: str) -> NDArray[np.float32]:
    """The array, contiguous. Raises EvaluateError if it is not `(N, D)` float32."""
    array = np.asarray(array)
    if array.ndim != 2 or array.dtype != np.float32:
        raise EvaluateError(f"expected float32 (N, D), got {array.dtype} {array.shape}", where=name)
    return np.ascontiguousarray(array)


def check_finite(x_ND: NDArray[np.float32], first: int, name: str) -> None:
    """Raises EvaluateError naming the first row that is not finite; `first`: the number of the first one here."""
    good = np.isfinite(x_ND).all(axis=1)
    if not good.all():
        raise EvaluateError(f"row {first + int(np.argmin(good)):,} holds NaN or infinity", where=name)
