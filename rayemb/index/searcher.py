"""A whole index in one process: all shards open, searched side by side, merged exactly."""

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from rayemb.data.embeddings import IMAGE, EmbeddingsTable
from rayemb.index.effort import Effort
from rayemb.index.errors import IndexArtefactError
from rayemb.index.filters import Filter
from rayemb.index.live.config import LiveConfig
from rayemb.index.live.follower import Follower
from rayemb.index.manifest import Manifest, load_manifest
from rayemb.index.placement import Router
from rayemb.index.queries import Hits, Query
from rayemb.index.shard import Shard, open_embeddings
from rayemb.index.view import View


class Index:
    """One version of an index, all its shards in this process, opened by `Index.open`.

    Any number of threads may search it at once; FAISS works without Python's lock.
    """

    def __init__(
        self,
        manifest: Manifest,
        shards: Sequence[Shard],
        embeddings: EmbeddingsTable,
        router: Router,
        live: Follower | None = None,
    ) -> None:
        self.manifest, self.shards, self.embeddings = manifest, tuple(shards), embeddings
        self._router, self._live = router, live
        self._pool = _pool(len(self.shards)) if len(self.shards) > 1 and cores() > 1 else None
        self._latest = View(manifest, self.shards, router, self._pool, live.state() if live else None)

    @classmethod
    def open(
        cls, index_uri: str, *, model_digest: str | None = None, live: LiveConfig | bool = False, mapped: bool = True
    ) -> "Index":
        """The published index at `index_uri`, every checksum verified.

        `model_digest` is the digest of the model that will embed the queries; vectors of two models do not
        compare. With `live`, updates are searched and can be written (`upsert`, `delete`). `mapped` as in `Shard.open`.

        Raises IndexArtefactError if the model is not the one that the index, its embeddings and its updates name, or
        if a file is missing or altered.
        """
        updates = LiveConfig() if live is True else live or None
        manifest = load_manifest(index_uri)
        try:
            return cls._open(index_uri, manifest, model_digest, updates, mapped)
        except IndexArtefactError:
            # A rebuild may have been published since the manifest was read, and removed the files it names.
            published = load_manifest(index_uri)
            if published.version == manifest.version:
                raise
            return cls._open(index_uri, published, model_digest, updates, mapped)

    @classmethod
    def _open(
        cls, index_uri: str, manifest: Manifest, model_digest: str | None, updates: LiveConfig | None, mapped: bool
    ) -> "Index":
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
        live = Follower(manifest, embeddings, shards, updates) if updates else None
        return cls(manifest, shards, embeddings, Router(index_uri, manifest), live)

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
        """Rows that can be found."""
        return self.view().rows

    @property
    def filter_fields(self) -> list[str]:
        """The payload columns, which filters may name."""
        return list(self.shards[0].payload.columns)

    def view(self) -> View:
        """The index as it is now, updates included: what is asked of it twice is answered alike."""
        if self._live is None:
            return self._latest
        state, view = self._live.state(), self._latest
        if view.state is not state:
            view = self._latest = View(self.manifest, self.shards, self._router, self._pool, state)
        return view

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
        return self.view().search(vectors, k, filter, effort=effort, recall=recall)

    def words(self, text: str, k: int, filter: Filter | None = None) -> Hits:
        """As `View.words`."""
        return self.view().words(text, k, filter)

    def query(self, vector: ArrayLike | None, query: Query) -> Hits:
        """One query of any kind, `(1, <= results)`: see `rayemb.index.queries`."""
        return self.view().query(vector, query)

    def vectors(self, keys: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
        """As `View.vectors`. A key means the same row for as long as the index is open."""
        return self.view().vectors(keys)

    def payload(self, keys: Sequence[int] | NDArray[np.int64]) -> list[dict[str, Any]]:
        """As `View.payload`."""
        return self.view().payload(keys)

    def ids(self, keys: NDArray[np.int64]) -> pa.Array:
        """As `View.ids`."""
        return self.view().ids(keys)

    def key(self, row_id: str) -> int | None:
        """The key of the row with this id, or None."""
        return self.view().key(row_id)

    def image(self, row_id: str) -> bytes | None:
        """The encoded image of the row with this id, from the table or the updates; None if there is none."""
        if not self.embeddings.has_images:
            return None
        key = self.key(row_id)
        if key is None:
            return None
        if key >= self.manifest.embeddings.rows:
            return self.live.image(key)
        image: bytes | None = self.embeddings.take([key], [IMAGE])[0][IMAGE]
        return image

    # -- live updates ----------------------------------------------------------------------------------------

    @property
    def live(self) -> Follower:
        """The updates. Raises IndexArtefactError where the index was opened without."""
        if self._live is None:
            raise IndexArtefactError("the index was opened to be read only", where="live", fix="Index.open(live=True)")
        return self._live

    def upsert(
        self,
        ids: Sequence[str],
        vectors: ArrayLike,
        payload: Sequence[Mapping[str, Any]] | None = None,
        images: Sequence[bytes | None] | None = None,
    ) -> int:
        """Puts N items in the place of those with their ids, or beside them; the version of the updates with them.

        They are durable when this returns, and every search of this object finds them from then on; other readers
        do after `refresh(at_least=version)`. The same call twice changes nothing; of an id that comes twice in a
        call the last one counts. All or nothing is written.

        Args:
            vectors: `(N, D)`, finite and not zero; they are scaled to unit length.
            payload: a mapping of payload columns for each; what it lacks is null.
            images: encoded images, if the embeddings keep them.

        Raises:
            UpdateError: an item that is wrong, by its place (`items[3].vector`).
            UpdatesFullError: more than `LiveConfig.max_rows` updates would wait for a compaction.
            StorageError: it could not be written, or that is not known; searches go on.
        """
        return self.live.upsert(ids, vectors, payload, images)

    def delete(self, ids: Sequence[str]) -> int:
        """Removes the items with these ids, as `upsert` puts them there; ids of no item do no harm."""
        return self.live.delete(ids)

    def refresh(self, at_least: int | None = None) -> int:
        """Takes in what others wrote; the version of the updates that searches see from now on.

        Raises QueryError if there is no version `at_least` yet, IndexArtefactError if the updates were compacted into
        a newer index (open it again), StorageError.
        """
        return self.live.refresh(at_least)

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


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _pool(shards: int) -> ThreadPoolExecutor:
    count = cores()
    # The setting belongs to each thread: shards share the cores instead of fighting over all of them.
    return ThreadPoolExecutor(
        max(shards, count),
        "rayemb-search",
        initializer=faiss.omp_set_num_threads,
        initargs=(max(1, count // shards),),
    )
