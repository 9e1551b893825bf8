"""A whole index in one process: all shards open, searched side by side, merged exactly."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import faiss
import numpy as np
from numpy.typing import ArrayLike, NDArray

from rayemb.data.embeddings import IMAGE, EmbeddingsTable
from rayemb.index import queries
from rayemb.index.errors import IndexArtefactError, QueryError
from rayemb.index.filters import Filter
from rayemb.index.manifest import Manifest, load_manifest
from rayemb.index.merge import merge
from rayemb.index.queries import Hits, Query
from rayemb.index.shard import Answer, Shard, check_queries, open_embeddings

__all__ = ["Hits", "Index", "merge"]


class Index:
    """One version of an index, all its shards in this process, opened by `Index.open`.

    Any number of threads may search it at once; FAISS works without Python's lock.
    """

    def __init__(self, manifest: Manifest, shards: Sequence[Shard], embeddings: EmbeddingsTable) -> None:
        self.manifest, self.shards, self.embeddings = manifest, tuple(shards), embeddings
        self._starts = np.array([shard.info.start for shard in shards], np.int64)
        self._pool = _pool(len(self.shards)) if len(self.shards) > 1 else None

    @classmethod
    def open(cls, index_uri: str, *, model_digest: str | None = None) -> "Index":
        """The published index at `index_uri`, every checksum verified.

        `model_digest` is the digest of the model that will embed the queries; vectors of two models do not
        compare. Raises IndexArtefactError if it is not the one that the index and its embeddings name, or if
        a file is missing or altered.
        """
        manifest = load_manifest(index_uri)
        try:
            return cls._open(index_uri, manifest, model_digest)
        except IndexArtefactError:
            # A rebuild may have been published since the manifest was read, and removed the files it names.
            published = load_manifest(index_uri)
            if published.version == manifest.version:
                raise
            return cls._open(index_uri, published, model_digest)

    @classmethod
    def _open(cls, index_uri: str, manifest: Manifest, model_digest: str | None) -> "Index":
        if model_digest is not None and model_digest != manifest.model_digest:
            raise IndexArtefactError(
                f"the index was built with model {manifest.model_digest[:12]} and the queries are of model "
                f"{model_digest[:12]}",
                where=index_uri,
                fix="load the model that embedded the corpus, or embed and index it again",
            )
        embeddings = open_embeddings(manifest)
        with ThreadPoolExecutor(min(len(manifest.shards), 8)) as pool:
            shards = list(
                pool.map(lambda i: Shard.open(index_uri, manifest, i, embeddings), range(len(manifest.shards)))
            )
        return cls(manifest, shards, embeddings)

    @property
    def version(self) -> str:
        """The version of the index, which answers carry."""
        return self.manifest.version

    @property
    def dim(self) -> int:
        """Dimension D of the vectors."""
        return self.manifest.dim

    @property
    def rows(self) -> int:
        """Rows in all shards."""
        return self.manifest.embeddings.rows

    @property
    def filter_fields(self) -> list[str]:
        """The payload columns, which filters may name."""
        return list(self.shards[0].payload.columns)

    def search(self, vectors: ArrayLike, k: int, filter: Filter | None = None) -> Hits:
        """The `k` best rows for each of `vectors` `(N, D)`, as `Shard.search` finds them in each shard.

        Raises QueryError for vectors or a `k` that cannot be searched, FilterError for a filter that does not
        fit.
        """
        x_ND = check_queries(vectors, self.dim, k)
        return self._asked(lambda shard: shard.answer(x_ND, k, filter), k)

    def words(self, text: str, k: int, filter: Filter | None = None) -> Hits:
        """The `k` best rows by BM25 for the words of `text`, as of one query `(1, k)`.

        Raises QueryError if the index has no lexical half (`build_lexical`), FilterError as `search` does.
        """
        return self._asked(lambda shard: shard.words(text, k, filter), k)

    def query(self, vector: ArrayLike | None, query: Query) -> Hits:
        """One query of any kind, `(1, <= results)`: see `rayemb.index.queries`."""
        return queries.answer(self, vector, query)

    def vectors(self, keys: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """The whole vectors `(len(keys), D)` of rows, from the index where it keeps them, else from the table.

        Raises QueryError for a key of no row.
        """
        wanted, owners = self._owners(keys)
        found = np.empty((len(wanted), self.dim), np.float32)
        for owner in np.unique(owners).tolist():
            own = owners == owner
            found[own] = self.shards[owner].vectors(wanted[own] - self._starts[owner])
        return found

    def payload(self, keys: Sequence[int] | NDArray[np.int64]) -> list[dict[str, Any]]:
        """Id and payload columns of the rows `keys` `(K,)`, in that order, from memory.

        Raises QueryError for a key of no row, such as the -1 of an empty place: drop those first.
        """
        wanted, owners = self._owners(keys)
        positions = wanted - self._starts[owners]
        if len(self.shards) == 1:
            return self.shards[0].payload.take(positions.tolist())
        found: list[dict[str, Any]] = []
        for owner, position in zip(owners.tolist(), positions.tolist(), strict=True):
            found += self.shards[owner].payload.take([position])
        return found

    def key(self, row_id: str) -> int | None:
        """The key of the row with this id, or None."""
        for shard in self.shards:
            position = shard.payload.position(row_id)
            if position is not None:
                return shard.info.start + position
        return None

    def image(self, row_id: str) -> bytes | None:
        """The encoded image of the row with this id, from the embeddings table; None if there is none."""
        if not self.embeddings.has_images:
            return None
        key = self.key(row_id)
        if key is None:
            return None
        image: bytes | None = self.embeddings.take([key], [IMAGE])[0][IMAGE]
        return image

    def _owners(self, keys: Sequence[int] | NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The keys, and the shard that each belongs to."""
        wanted = np.asarray(keys, np.int64).reshape(-1)
        outside = wanted[(wanted < 0) | (wanted >= self.rows)]
        if len(outside):
            raise QueryError(f"there is no row {int(outside[0])}", where="keys", fix=f"keys are 0 to {self.rows - 1}")
        return wanted, np.searchsorted(self._starts, wanted, side="right") - 1

    def _asked(self, ask: Callable[[Shard], Answer], k: int) -> Hits:
        """The k best of all shards, asked side by side."""
        if self._pool is None:
            answer = ask(self.shards[0])
            return Hits(answer.scores, answer.keys, (answer.strategy,))
        answers = list(self._pool.map(ask, self.shards))
        scores, keys = [each.scores for each in answers], [each.keys for each in answers]
        return Hits(*merge(scores, keys, k), tuple(each.strategy for each in answers))

    def close(self) -> None:
        """Stops the search threads; files stay mapped until the object goes."""
        if self._pool is not None:
            self._pool.shutdown(wait=True)

    def __enter__(self) -> "Index":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _pool(shards: int) -> ThreadPoolExecutor:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # The setting belongs to each thread: shards share the cores instead of fighting over all of them.
    return ThreadPoolExecutor(
        max(shards, cores),
        "rayemb-search",
        initializer=faiss.omp_set_num_threads,
        initargs=(max(1, cores // shards),),
    )
