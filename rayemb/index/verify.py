"""Is this index what it says, and does it find what an exact search finds?"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rayemb.data.embeddings import EmbeddingsTable
from rayemb.errors import RayembError
from rayemb.index.config import IndexConfig
from rayemb.index.errors import IndexArtefactError
from rayemb.index.manifest import Manifest, Recall, load_manifest
from rayemb.index.merge import merge
from rayemb.index.shard import Shard, exact_block, open_embeddings, take_vectors, verified_path

# Scores this close are the same to float32: either of two such neighbours is a right answer.
_TIE = 1e-6
_BLOCK_BYTES = 64 << 20


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
    for i, shard in enumerate(manifest.shards):
        try:
            if embeddings is not None:
                Shard.open(index_uri, manifest, i, embeddings)
            else:
                verified_path(index_uri, shard)
        except RayembError as error:
            problems.append(str(error))
    recall = None
    if not problems and config.recall_queries:
        recall = measure_recall(index_uri, manifest, k=config.recall_k, queries=config.recall_queries, seed=config.seed)
        if recall.recall < config.min_recall:
            problems.append(
                f"recall@{recall.k} is {recall.recall:.3f} over {recall.queries} queries, below "
                f"index.min_recall {config.min_recall:g}: raise index.nprobe (or ef_search), or choose a "
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


def measure_recall(index_uri: str, manifest: Manifest, *, k: int, queries: int, seed: int = 0) -> Recall:
    """Recall@k of the index against exact inner-product search over all rows of the embeddings table.

    The queries are `queries` rows of the table, chosen by `seed`. Nothing is left out: each finds itself
    among its own neighbours, in the exact answer as in the measured one. A result counts as a hit if its true
    score reaches the exact k-th score less 1e-6, so that ties are no misses. Memory: one block of vectors and
    one shard at a time.
    """
    embeddings = open_embeddings(manifest)
    k, queries = min(k, embeddings.rows), min(queries, embeddings.rows)
    rows = np.sort(np.random.default_rng(seed).choice(embeddings.rows, queries, replace=False))
    x_ND = take_vectors(embeddings, rows)
    _, exact_keys = exact_search(embeddings, x_ND, k)
    found_keys = np.full((queries, k), -1, np.int64)
    found_scores = np.full((queries, k), -np.inf, np.float32)
    for i in range(len(manifest.shards)):
        scores, keys = Shard.open(index_uri, manifest, i, embeddings).search(x_ND, k)
        found_scores, found_keys = merge([found_scores, scores], [found_keys, keys], k)
    # True scores, in float64: those of a quantising index are estimates, and BLAS rounds by block.
    known = np.unique(np.concatenate([exact_keys.ravel(), found_keys[found_keys >= 0]]))
    vectors = take_vectors(embeddings, known).astype(np.float64)

    def true_scores(keys: NDArray[np.int64]) -> NDArray[np.float64]:
        at = np.searchsorted(known, np.maximum(keys, known[0]))
        scores: NDArray[np.float64] = np.einsum("nd,nkd->nk", x_ND.astype(np.float64), vectors[at])
        return np.where(keys >= 0, scores, -np.inf)

    worst_exact = true_scores(exact_keys).min(axis=1, keepdims=True)
    hits = true_scores(found_keys) >= worst_exact - _TIE
    return Recall(k=k, queries=queries, recall=round(float(hits.mean()), 6))


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
