"""Is this index what it says, and does it find what an exact search finds?"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from rayemb.data.embeddings import EmbeddingsTable
from rayemb.errors import RayembError
from rayemb.index.config import IndexConfig
from rayemb.index.effort import Effort
from rayemb.index.errors import IndexArtefactError
from rayemb.index.faiss_index import load_index, parts_of
from rayemb.index.manifest import CurvePoint, Manifest, Recall, load_manifest
from rayemb.index.merge import merge
from rayemb.index.shard import Shard, exact_block, open_embeddings, take_vectors, verified_path

# Scores this close are the same to float32: either of two such neighbours is a right answer.
_TIE = 1e-6
_BLOCK_BYTES = 64 << 20
_TIMED = 20  # queries whose time is taken, one by one


@dataclass(frozen=True)
class VerifyReport:
    """What `verify_index` found; `problems` is empty when all is well."""

    version: str
    rows: int
    shards: int
    recall: Recall | None
    min_recall: float
    problems: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def require_ok(self) -> "VerifyReport":
        """This report. Raises IndexArtefactError listing the problems if there are any."""
        if self.problems:
            raise IndexArtefactError("; ".join(self.problems), where=f"index {self.version}")
        return self


def verify_index(index_uri: str, config: IndexConfig | None = None) -> VerifyReport:
    """A report on the index at `index_uri`: checksums, rows and model against the embeddings, recall.

    Of `config` only `recall_k`, `recall_queries`, `min_recall` and `seed` are read. Recall is measured when
    all else is well. Needs no Ray. Raises IndexArtefactError if there is no manifest.
    """
    config = config or IndexConfig()
    manifest = load_manifest(index_uri)
    problems: list[str] = []
    embeddings: EmbeddingsTable | None = None
    try:
        embeddings = open_embeddings(manifest)
    except RayembError as error:
        problems.append(str(error))
    checks: list[Callable[[], object]]
    if embeddings is None:
        checks = [partial(verified_path, index_uri, file) for file in manifest.files]
    else:
        shards = range(len(manifest.shards))
        checks = [partial(verified_path, index_uri, manifest.trained)]
        checks += [partial(Shard.open, index_uri, manifest, i, embeddings) for i in shards]
    for check in checks:
        try:
            check()
        except RayembError as error:
            problems.append(str(error))
    recall = None
    if not problems and config.recall_queries:
        recall = measure_recall(index_uri, manifest, k=config.recall_k, queries=config.recall_queries, seed=config.seed)
        if recall is not None and recall.recall < config.min_recall:
            problems.append(
                f"recall@{recall.k} is {recall.recall:.3f} over {recall.queries} queries, below "
                f"index.min_recall {config.min_recall:g}: raise index.nprobe (or ef_search, rerank), or choose a "
                "finer index.factory"
            )
    return VerifyReport(
        manifest.version,
        manifest.embeddings.rows,
        len(manifest.shards),
        recall,
        config.min_recall,
        tuple(problems),
    )


def measure_recall(index_uri: str, manifest: Manifest, *, k: int, queries: int, seed: int = 0) -> Recall | None:
    """Recall@k of the index at its own effort, as `measure` has it; None for a table of one row."""
    return measure(index_uri, manifest, k=k, queries=queries, seed=seed, efforts=[manifest.effort])[0]


def measure(
    index_uri: str,
    manifest: Manifest,
    *,
    k: int,
    queries: int,
    seed: int = 0,
    efforts: Sequence[Effort] | None = None,
) -> tuple[Recall | None, tuple[CurvePoint, ...]]:
    """Recall@k of the index against exact inner-product search over all rows, at its own effort and at `efforts`.

    The queries are `queries` rows of the table, chosen by `seed`; each is left out of both answers, so that it
    does not find itself. A result counts as a hit if its true score reaches the exact k-th score less 1e-6, so
    that ties are no misses. The milliseconds are those of the first queries, asked one at a time on one thread,
    added over the shards. Memory: one block of vectors and one shard at a time.

    Args:
        efforts: default: powers of two or four of what the type has (`efforts_of`).

    Returns:
        The recall at the manifest's effort, and the points that no cheaper point equals, cheapest first. A
        table of one row has nothing to find: None and no points.
    """
    embeddings = open_embeddings(manifest)
    k, queries = min(k, embeddings.rows - 1), min(queries, embeddings.rows)
    if k < 1 or queries < 1:
        return None, ()
    rows = np.sort(np.random.default_rng(seed).choice(embeddings.rows, queries, replace=False))
    x_ND = take_vectors(embeddings, rows)
    exact = _held_out(exact_search(embeddings, x_ND, k + 1)[1], rows, k)
    if efforts is None:
        efforts = efforts_of(load_index(verified_path(index_uri, manifest.trained)), manifest.effort)
    efforts = list(dict.fromkeys([manifest.effort, *efforts]))
    nothing = np.full((queries, k + 1), -np.inf, np.float32), np.full((queries, k + 1), -1, np.int64)
    found, seconds = [nothing] * len(efforts), np.zeros(len(efforts))
    threads = faiss.omp_get_max_threads()
    try:
        for i in range(len(manifest.shards)):
            shard = Shard.open(index_uri, manifest, i, embeddings)
            for number, effort in enumerate(efforts):
                scores, keys = shard.search(x_ND, k + 1, effort=effort)
                found[number] = merge([found[number][0], scores], [found[number][1], keys], k + 1)
                faiss.omp_set_num_threads(1)
                timed = x_ND[:_TIMED]
                started = time.perf_counter()
                for query in timed:
                    shard.search(query[None], k, effort=effort)
                seconds[number] += (time.perf_counter() - started) / len(timed)
                faiss.omp_set_num_threads(threads)
    finally:
        faiss.omp_set_num_threads(threads)
    recalls = _recalls(embeddings, x_ND, exact, [_held_out(keys, rows, k) for _, keys in found])
    points = [
        CurvePoint(effort=effort, recall=recall, ms=round(float(s) * 1000, 4))
        for effort, recall, s in zip(efforts, recalls, seconds, strict=True)
    ]
    return Recall(k=k, queries=queries, recall=recalls[0]), frontier(points)


def recall_of(embeddings: EmbeddingsTable, x_ND: NDArray[np.float32], keys_NK: NDArray[np.int64]) -> float:
    """The share of `keys_NK`, what an index found for each query, that exact search over the table finds as well.

    As in `measure` any row counts whose true score reaches the exact K-th less 1e-6. Queries are no rows of the table:
    nothing is left out. -1 is a miss.
    """
    exact = exact_search(embeddings, x_ND, min(keys_NK.shape[1], embeddings.rows))[1]
    return _recalls(embeddings, x_ND, exact, [keys_NK[:, : exact.shape[1]]])[0]


def efforts_of(index: Any, own: Effort) -> list[Effort]:
    """The efforts worth measuring for the type of `index`; parts that it lacks are as in `own`."""
    lists, graph, refine = parts_of(index)
    probes = [2**i for i in range(11) if 2**i < lists] + ([lists] if lists <= 1024 else []) if lists else [own.nprobe]
    graphs = [2**i for i in range(4, 11)] if graph else [own.ef_search]
    again = [1, 4, 16, 64] if refine else [own.rerank]
    return [Effort(*each) for each in product(probes, graphs, again)]


def frontier(points: Sequence[CurvePoint]) -> tuple[CurvePoint, ...]:
    """The points that no cheaper point equals in recall, cheapest first."""
    best: list[CurvePoint] = []
    for point in sorted(points, key=lambda each: (each.ms, -each.recall)):
        if not best or point.recall > best[-1].recall:
            best.append(point)
    return tuple(best)


def _held_out(keys: NDArray[np.int64], own_N: NDArray[np.int64], k: int) -> NDArray[np.int64]:
    """The first `k` of each row of `keys` `(N, k+1)` that are not the query's own row."""
    order = np.argsort(keys == own_N[:, None], axis=1, kind="stable")
    return np.take_along_axis(keys, order, axis=1)[:, :k]


def _recalls(
    embeddings: EmbeddingsTable,
    x_ND: NDArray[np.float32],
    exact: NDArray[np.int64],
    answers: Sequence[NDArray[np.int64]],
) -> list[float]:
    # True scores, in float64: those of a quantising index are estimates, and BLAS rounds by block.
    known = np.unique(np.concatenate([exact.ravel(), *(keys.ravel() for keys in answers)]))
    known = known[known >= 0]
    vectors = take_vectors(embeddings, known).astype(np.float64)

    def true_scores(keys: NDArray[np.int64]) -> NDArray[np.float64]:
        at = np.searchsorted(known, np.maximum(keys, known[0]))
        scores: NDArray[np.float64] = np.einsum("nd,nkd->nk", x_ND.astype(np.float64), vectors[at])
        return np.where(keys >= 0, scores, -np.inf)

    worst_exact = true_scores(exact).min(axis=1, keepdims=True)
    return [round(float((true_scores(keys) >= worst_exact - _TIE).mean()), 6) for keys in answers]


def exact_search(
    embeddings: EmbeddingsTable, x_ND: NDArray[np.float32], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The `k` best of all rows by inner product: scores and keys `(N, k)`, read in blocks of 64 MiB."""
    best = np.full((len(x_ND), k), -np.inf, np.float32), np.full((len(x_ND), k), -1, np.int64)
    step = block_rows(embeddings.dim)
    for start in range(0, embeddings.rows, step):
        stop = min(start + step, embeddings.rows)
        best = exact_block(x_ND, embeddings.vectors(start, stop), np.arange(start, stop), k, best)
    return best


def block_rows(dim: int) -> int:
    """Rows of `dim` float32 that make a block of bounded memory."""
    return max(1, min(65_536, _BLOCK_BYTES // (4 * dim)))
