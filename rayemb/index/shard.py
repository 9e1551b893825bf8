"""One shard of an index: verified, mapped into memory, searched with or without a filter.

Shape suffixes: N queries, D dimensions, K results.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike, NDArray

from rayemb import storage
from rayemb.data.embeddings import ID, VECTOR, EmbeddingsTable
from rayemb.index.effort import Effort
from rayemb.index.errors import IndexArtefactError, QueryError
from rayemb.index.faiss_index import FaissShard, load_index, reason
from rayemb.index.filters import Filter
from rayemb.index.keys import Keys, read_keys
from rayemb.index.lexical import LexicalShard, mapped_table, postings
from rayemb.index.manifest import File, Manifest, ShardFile
from rayemb.index.merge import merge
from rayemb.index.payload import Payload
from rayemb.index.selection import Selection, Selections
from rayemb.index.strategy import FilteredSearch, Search

# Results asked for beyond k, so that a tie at the k-th place is seen and broken by key rather than by FAISS's
# heap.
_TIE_SLACK = 8
# Past this many places the choice among ties at the k-th place is FAISS's: thousands of equal vectors.
_TIE_LIMIT = 4096
_EXACT_BLOCK = 32_768


@dataclass(frozen=True)
class Answer:
    """What a shard found: scores `(N, k)` float32, keys `(N, k)` int64, padded with -inf and -1.

    `strategy`: `index` (no filter, or all rows pass), or how the filter was answered: `exact`, `selector`, `overfetch`;
    `words` for BM25.
    """

    scores: NDArray[np.float32]
    keys: NDArray[np.int64]
    strategy: str


class Shard:
    """A part of an index's rows, which `keys` names; opened by `Shard.open`. Threads may share it."""

    def __init__(
        self,
        info: ShardFile,
        faiss_shard: FaissShard,
        keys: Keys,
        embeddings: EmbeddingsTable,
        payload: Payload,
        effort: Effort,
        lexical: LexicalShard | None = None,
    ) -> None:
        self.info, self.keys, self.payload, self.effort = info, keys, payload, effort
        self.rows, self.dim = info.rows, faiss_shard.dim
        self._faiss, self._embeddings, self.lexical = faiss_shard, embeddings, lexical
        self._selections = Selections(payload)
        self._filtered = FilteredSearch(faiss_shard, self._exact)

    @classmethod
    def open(
        cls,
        index_uri: str,
        manifest: Manifest,
        i: int,
        embeddings: EmbeddingsTable | None = None,
        *,
        mapped: bool = True,
    ) -> "Shard":
        """Shard `i` of the index at `index_uri`, after its checksum has been verified.

        `embeddings` saves opening the table again; default: the manifest's table at the manifest's version.
        `mapped`: vectors come into memory as they are searched; else all at once.
        Raises IndexArtefactError naming the file if it is missing, altered, or not what the manifest says.
        """
        info = manifest.shards[i]
        embeddings = embeddings or open_embeddings(manifest)
        path = verified_path(index_uri, info)
        where = storage.join(index_uri, info.file)
        try:
            loaded = FaissShard(load_index(path, mapped=mapped))
        except RuntimeError as error:
            raise IndexArtefactError(f"FAISS cannot read it ({reason(error)})", where=where) from error
        if (loaded.rows, loaded.dim) != (info.rows, manifest.dim):
            raise IndexArtefactError(
                f"it holds {loaded.rows} vectors of {loaded.dim} dimensions; "
                f"the manifest says {info.rows} of {manifest.dim}",
                where=where,
                fix="build the index again",
            )
        keys = open_keys(index_uri, info)
        columns = read_columns(embeddings, keys, [ID, *embeddings.payload_columns])
        lexical = open_lexical(index_uri, manifest, i)
        return cls(info, loaded, keys, embeddings, Payload(columns), manifest.effort, lexical)

    def search(
        self, vectors: ArrayLike, k: int, filter: Filter | None = None, effort: Effort | None = None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The `k` best rows of this shard for each query.

        Args:
            vectors: `(N, D)` float32, finite; unit length for cosine scores.
            k: results per query, >= 1.
            filter: only rows that pass are found (`rayemb.index.filters`).
            effort: how wide to search; default: the manifest's.

        Returns:
            Scores `(N, k)` float32 (inner products, or the type's estimate of them), best first, and keys
            `(N, k)` int64 (row offsets), lowest first among equal scores; padded with -inf and -1.

        Raises:
            QueryError: wrong dimension, NaN or infinity, k below 1.
            FilterError: no filter, an unknown field, or a value of another type.
        """
        answer = self.answer(vectors, k, filter, effort)
        return answer.scores, answer.keys

    def answer(
        self,
        vectors: ArrayLike,
        k: int,
        filter: Filter | None = None,
        effort: Effort | None = None,
        alive: Selection | None = None,
    ) -> Answer:
        """As `search`, with the strategy that was used; of the rows that are `alive` (None: all)."""
        x_ND = check_queries(vectors, self.dim, k)
        effort = effort or self.effort
        selection = self._selections(filter, alive) if filter else alive
        there = self.rows if alive is None else alive.count
        if selection is None or selection.count == there:

            def all_rows(x_ND: NDArray[np.float32], places: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
                if alive is None:
                    return self._faiss.search(x_ND, places, effort)
                return self._filtered.search_alive(x_ND, places, alive, effort)

            return self._answer(*self._untied(x_ND, k, there, all_rows), "index")
        if not selection.count or not len(x_ND):
            return self._answer(*_nothing(len(x_ND), k), "exact")
        strategy = self._filtered.plan(selection, len(x_ND), k + _TIE_SLACK, effort)

        def search(x_ND: NDArray[np.float32], places: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
            return self._filtered.search(x_ND, places, selection, strategy, effort)

        whole = strategy == "exact" and self._filtered.stored
        return self._answer(*(search(x_ND, k) if whole else self._untied(x_ND, k, selection.count, search)), strategy)

    def words(self, text: str, k: int, filter: Filter | None = None, alive: Selection | None = None) -> Answer:
        """The `k` best rows of this shard by BM25 for the words of `text`, as for one query `(1, k)`.

        Of the rows that are `alive` (None: all).

        Raises QueryError if the index was built without words.
        """
        if self.lexical is None:
            raise QueryError("the index has vectors only, no words", where="hybrid", fix="build it with index.words")
        selection = self._selections(filter, alive) if filter else alive
        scores, positions = self.lexical.search(text, k, selection.mask() if selection else None)
        return self._answer(scores[None], positions[None], "words")

    def vectors(self, positions: NDArray[np.int64]) -> NDArray[np.float32]:
        """The whole vectors `(len(positions), D)` of rows of this shard: of the index if it keeps them, else the
        table's.
        """
        stored = self._filtered.stored
        return stored.take(positions) if stored else take_vectors(self._embeddings, self.keys.of(positions))

    def key(self, row_id: str) -> int | None:
        """The key of the row with this id, if it is in this shard."""
        position = self.payload.position(row_id)
        return None if position is None else int(self.keys.of(np.array([position]))[0])

    def ids(self, keys: NDArray[np.int64]) -> pa.Array:
        """The ids of the rows `keys`, flat and in order, as arrow texts; null for what is not of this shard."""
        positions = self.keys.at(keys.reshape(-1))
        return self.payload.ids(pa.array(positions, mask=positions < 0))

    def _answer(self, scores: NDArray[np.float32], positions: NDArray[np.int64], strategy: str) -> Answer:
        return Answer(scores, self.keys.of(positions), strategy)

    def _untied(
        self, x_ND: NDArray[np.float32], k: int, available: int, search: Search
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Scores and positions `(N, k)` by `search`, lowest position first among equal scores."""
        if not available or not len(x_ND):
            return _nothing(len(x_ND), k)
        places = min(k + _TIE_SLACK, available)
        scores, positions = search(x_ND, places)
        if places >= k and (positions >= 0).all() and (scores[:, 1:] < scores[:, :-1]).all():
            return np.ascontiguousarray(scores[:, :k]), np.ascontiguousarray(positions[:, :k])  # no ties at all
        best_scores, best = merge([scores], [positions], k)
        # FAISS keeps an arbitrary few of the rows that tie for the last place; which ones would then depend
        # on how the rows were sharded. Ask for more until the tie is seen to end.
        open_ties = np.arange(len(x_ND)) if k < available else np.zeros(0, np.int64)
        while len(open_ties):
            unresolved = (positions >= 0).all(axis=1) & (scores.min(axis=1) == best_scores[open_ties, k - 1])
            open_ties = open_ties[unresolved]
            if not len(open_ties) or places >= min(available, k + _TIE_LIMIT):
                break
            places = min(places * 4, available, k + _TIE_LIMIT)
            scores, positions = search(x_ND[open_ties], places)
            best_scores[open_ties], best[open_ties] = merge([scores], [positions], k)
        return best_scores, best

    def _exact(
        self, x_ND: NDArray[np.float32], k: int, positions: NDArray[np.int64]
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Exact search over the rows at `positions`, whose vectors are read from the table in blocks."""
        best = _nothing(len(x_ND), k)
        for start in range(0, len(positions), _EXACT_BLOCK):
            block = positions[start : start + _EXACT_BLOCK]
            best = exact_block(x_ND, take_vectors(self._embeddings, self.keys.of(block)), block, k, best)
        return best


def verified_path(index_uri: str, info: File) -> str:
    """A local path to a file of the index, its SHA-256 checked. Raises IndexArtefactError naming the file."""
    uri = storage.join(index_uri, info.file)
    for attempt in (0, 1):
        try:
            path = storage.local_path(uri)
            found = storage.sha256_file(path)
        except (storage.StorageError, OSError) as error:
            # What the store or the disk says: no such file, no answer, no space for the local copy.
            told = error.what if isinstance(error, storage.StorageError) else error.strerror or str(error)
            full = "No space left" in told
            raise IndexArtefactError(
                f"the file is missing or cannot be read: {told}",
                where=uri,
                fix="make room where TMPDIR points" if full else "copy it again, or build the index again",
            ) from error
        if found == info.sha256:
            return path
        if path == uri or attempt:
            break
        Path(path).unlink(missing_ok=True)  # a copy from remote storage: the damage may have happened on this machine
    raise IndexArtefactError(
        f"the checksum differs (sha256 {found[:12]}..., the manifest says {info.sha256[:12]}...)",
        where=uri,
        fix="copy it again, or build the index again",
    )


def open_lexical(index_uri: str, manifest: Manifest, i: int) -> LexicalShard | None:
    """The words of shard `i`, checksums verified; None if the index was built without.

    Raises IndexArtefactError naming the file that is missing or altered.
    """
    built = manifest.words
    if built is None:
        return None
    return LexicalShard(
        mapped_table(verified_path(index_uri, built.shards[i])),
        mapped_table(verified_path(index_uri, built.terms)),
        rows=manifest.shards[i].rows,
        all_rows=manifest.embeddings.rows,
        length=built.length,
    )


def open_terms(index_uri: str, manifest: Manifest) -> LexicalShard | None:
    """What all shards' words have in common, as a shard without rows; None if the index was built without words.

    Raises IndexArtefactError if the file is missing or altered.
    """
    built = manifest.words
    if built is None:
        return None
    terms = mapped_table(verified_path(index_uri, built.terms))
    return LexicalShard(postings([]), terms, rows=0, all_rows=manifest.embeddings.rows, length=built.length)


def open_keys(index_uri: str, info: ShardFile) -> Keys:
    """The keys of a shard's rows. Raises IndexArtefactError if their file is altered."""
    if info.keys is None:
        assert info.start is not None  # the manifest has one or the other
        return Keys(info.start, info.rows)
    listed = read_keys(verified_path(index_uri, info.keys))
    if len(listed) != info.rows:
        raise IndexArtefactError(
            f"it holds {len(listed)} keys; the manifest says {info.rows}",
            where=storage.join(index_uri, info.keys.file),
            fix="build the index again",
        )
    return Keys(0, info.rows, listed)


def read_columns(embeddings: EmbeddingsTable, keys: Keys, names: list[str]) -> pa.Table:
    """The named columns of the rows of `keys`, in that order."""
    if keys.listed is None:
        return embeddings.columns(keys.start, keys.start + keys.rows, names)
    if not keys.rows:
        return embeddings.columns(0, 0, names)
    return embeddings.dataset.take(keys.listed.tolist(), columns=names)


def open_embeddings(manifest: Manifest) -> EmbeddingsTable:
    """The manifest's embeddings table at its version. Raises IndexArtefactError if it is another one."""
    ref = manifest.embeddings
    table = EmbeddingsTable.open(ref.uri, ref.version)
    if table.model_digest != manifest.model_digest:
        raise IndexArtefactError(
            f"the index was built with model {manifest.model_digest[:12]} and the embeddings are of model "
            f"{table.model_digest[:12]}",
            where=ref.uri,
            fix="build the index again",
        )
    if (table.rows, table.dim) != (ref.rows, manifest.dim):
        raise IndexArtefactError(
            f"the embeddings hold {table.rows} rows of {table.dim} dimensions and the index was built from "
            f"{ref.rows} of {manifest.dim}",
            where=ref.uri,
            fix="build the index again",
        )
    return table


def check_queries(vectors: ArrayLike, dim: int, k: int) -> NDArray[np.float32]:
    """`vectors` as contiguous `(N, dim)` float32. Raises QueryError for what FAISS answers with nonsense."""
    if k < 1:
        raise QueryError(f"k must be at least 1, got {k}", where="k")
    try:
        x_ND = np.ascontiguousarray(vectors, np.float32)
    except (ValueError, TypeError) as error:
        raise QueryError("expected rows of numbers, all of one length", where="vectors") from error
    if x_ND.ndim != 2 or x_ND.shape[1] != dim:
        raise QueryError(f"expected vectors of shape (N, {dim}), got {x_ND.shape}", where="vectors")
    bad = np.flatnonzero(~np.isfinite(x_ND).all(axis=1))
    if len(bad):
        raise QueryError(f"vector {int(bad[0])} holds NaN or infinity", where="vectors")
    return x_ND


def take_vectors(embeddings: EmbeddingsTable, offsets: NDArray[np.int64]) -> NDArray[np.float32]:
    """Vectors `(len(offsets), D)` float32 of the rows at `offsets`, in that order."""
    column: Any = embeddings.dataset.take(offsets.tolist(), columns=[VECTOR]).column(VECTOR)
    flat: NDArray[np.float32] = column.combine_chunks().flatten().to_numpy()
    return flat.reshape(-1, embeddings.dim)


def exact_block(
    x_ND: NDArray[np.float32],
    block_RD: NDArray[np.float32],
    keys_R: NDArray[np.int64],
    k: int,
    best: tuple[NDArray[np.float32], NDArray[np.int64]],
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """`best` `(N, k)` improved by the rows of `block_RD`, scored by inner product."""
    scores, at = faiss.knn(x_ND, np.ascontiguousarray(block_RD), min(k, len(block_RD)), faiss.METRIC_INNER_PRODUCT)
    return merge([best[0], scores], [best[1], np.where(at >= 0, keys_R[at], -1)], k)


def _nothing(n: int, k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    return np.full((n, k), -np.inf, np.float32), np.full((n, k), -1, np.int64)
