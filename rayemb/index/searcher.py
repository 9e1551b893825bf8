"""A whole index in one process: all shards open, searched side by side, merged exactly."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from rayemb.data.embeddings import IMAGE, EmbeddingsTable
from rayemb.index import queries
from rayemb.index.effort import Effort
from rayemb.index.errors import IndexArtefactError, QueryError
from rayemb.index.filters import Filter
from rayemb.index.manifest import Manifest, load_manifest
from rayemb.index.merge import merge
from rayemb.index.placement import Router
from rayemb.index.queries import Hits, Query
from rayemb.index.shard import Answer, Shard, check_queries, open_embeddings


class Index:
    """One version of an index, all its shards in this process, opened by `Index.open`.

    Any number of threads may search it at once; FAISS works without Python's lock.
    """

    def __init__(
        self, manifest: Manifest, shards: Sequence[Shard], embeddings: EmbeddingsTable, router: Router
    ) -> None:
        self.manifest, self.shards, self.embeddings = manifest, tuple(shards), embeddings
        self._router = router
        self._pool = _pool(len(self.shards)) if len(self.shards) > 1 else None

    @classmethod
    def open(cls, index_uri: str, *, model_digest: str | None = None, mapped: bool = True) -> "Index":
        """The published index at `index_uri`, every checksum verified.

        `model_digest` is the digest of the model that will embed the queries; vectors of two models do not
        compare. Raises IndexArtefactError if it is not the one that the index and its embeddings name, or if
        a file is missing or altered. `mapped` as in `Shard.open`.
        """
        manifest = load_manifest(index_uri)
        try:
            return cls._open(index_uri, manifest, model_digest, mapped)
        except IndexArtefactError:
            # A rebuild may have been published since the manifest was read, and removed the files it names.
            published = load_manifest(index_uri)
            if published.version == manifest.version:
                raise
            return cls._open(index_uri, published, model_digest, mapped)

    @classmethod
    def _open(cls, index_uri: str, manifest: Manifest, model_digest: str | None, mapped: bool) -> "Index":
        if model_digest is not None and model_digest != manifest.model_digest:
            raise IndexArtefactError(
                f"the index was built with model {manifest.model_digest[:12]} and the queries are of model "
                f"{model_digest[:12]}",
                where=index_uri,
                fix="load the model that embedded the corpus, or embed and index it again",
            )
        embeddings = open_embeddings(manifest)
        with ThreadPoolExecutor(min(len(manifest.shards), 8)) as pool:
            numbers = range(len(manifest.shards))
            shards = list(pool.map(lambda i: Shard.open(index_uri, manifest, i, embeddings, mapped=mapped), numbers))
        return cls(manifest, shards, embeddings, Router(index_uri, manifest))

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

    def search(
        self,
        vectors: ArrayLike,
        k: int,
        filter: Filter | None = None,
        *,
        effort: Effort | None = None,
        recall: float | None = None,
    ) -> Hits:
        """The `k` best rows for each of `vectors` `(N, D)`, as `Shard.search` finds them in each shard.

        `effort` says how wide to search; or `recall`, the share of the exact answer wanted: the cheapest effort
        that reached it when the index was built. Default: the manifest's effort.

        Raises QueryError for vectors or a `k` that cannot be searched, or a recall that no measured effort
        reaches; FilterError for a filter that does not fit.
        """
        x_ND = check_queries(vectors, self.dim, k)
        chosen = self.manifest.chosen_effort(effort, recall)
        # Under a filter the lists that hold enough may lie anywhere.
        asked = self.shards if filter else [self.shards[i] for i in self._router.shards(x_ND, chosen.nprobe)]
        return self._asked(asked, lambda shard: shard.answer(x_ND, k, filter, chosen), k)

    def words(self, text: str, k: int, filter: Filter | None = None) -> Hits:
        """The `k` best rows by BM25 for the words of `text`, as of one query `(1, k)`.

        Raises QueryError if the index was built without `index.words`, FilterError as `search` does.
        """
        return self._asked(self.shards, lambda shard: shard.words(text, k, filter), k)

    def query(self, vector: ArrayLike | None, query: Query) -> Hits:
        """One query of any kind, `(1, <= results)`: see `rayemb.index.queries`."""
        return queries.answer(self, vector, query)

    def vectors(self, keys: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """The whole vectors `(len(keys), D)` of rows, from the index where it keeps them, else from the table.

        Raises QueryError for a key of no row.
        """
        wanted = self._checked(keys)
        found = np.empty((len(wanted), self.dim), np.float32)
        for shard, places, positions in self._owners(wanted):
            found[places] = shard.vectors(positions)
        return found

    def payload(self, keys: Sequence[int] | NDArray[np.int64]) -> list[dict[str, Any]]:
        """Id and payload columns of the rows `keys` `(K,)`, in that order, from memory.

        Raises QueryError for a key of no row, such as the -1 of an empty place: drop those first.
        """
        wanted = self._checked(keys)
        rows: list[dict[str, Any]] = [{}] * len(wanted)
        for shard, places, positions in self._owners(wanted):
            for place, row in zip(places.tolist(), shard.payload.take(positions.tolist()), strict=True):
                rows[place] = row
        return rows

    def ids(self, keys: NDArray[np.int64]) -> pa.Array:
        """The ids of the rows `keys`, flat and in order, as arrow texts; null for the -1 of an empty place."""
        flat = keys.reshape(-1)
        if len(self.shards) == 1:
            return self.shards[0].ids(flat)
        owned = list(self._owners(flat))
        if not owned:
            return self.shards[0].ids(flat)
        # Each id's place among the parts, which lie one after the other.
        order = np.concatenate([places for _, places, _ in owned])
        at = np.zeros(len(flat), np.int64)
        at[order] = np.arange(len(order))
        parts = [shard.payload.ids(pa.array(positions)) for shard, _, positions in owned]
        return pa.concat_arrays(parts).take(pa.array(at, mask=flat < 0))

    def key(self, row_id: str) -> int | None:
        """The key of the row with this id, or None."""
        found = (shard.key(row_id) for shard in self.shards)
        return next((key for key in found if key is not None), None)

    def image(self, row_id: str) -> bytes | None:
        """The encoded image of the row with this id, from the embeddings table; None if there is none."""
        if not self.embeddings.has_images:
            return None
        key = self.key(row_id)
        if key is None:
            return None
        image: bytes | None = self.embeddings.take([key], [IMAGE])[0][IMAGE]
        return image

    def _checked(self, keys: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        wanted = np.asarray(keys, np.int64).reshape(-1)
        outside = wanted[(wanted < 0) | (wanted >= self.rows)]
        if len(outside):
            raise QueryError(f"there is no row {int(outside[0])}", where="keys", fix=f"keys are 0 to {self.rows - 1}")
        return wanted

    def _owners(self, keys: NDArray[np.int64]) -> Iterator[tuple[Shard, NDArray[np.int64], NDArray[np.int64]]]:
        """Each shard that has rows of `keys`: the places of those in `keys`, and their positions in the shard."""
        for shard in self.shards:
            positions = shard.keys.at(keys)
            places = np.flatnonzero(positions >= 0)
            if len(places):
                yield shard, places, positions[places]

    def _asked(self, shards: Sequence[Shard], ask: Callable[[Shard], Answer], k: int) -> Hits:
        """The k best of `shards`, asked side by side."""
        if self._pool is None or len(shards) == 1:
            answer = ask(shards[0])
            return Hits(answer.scores, answer.keys, (answer.strategy,))
        answers = list(self._pool.map(ask, shards))
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
