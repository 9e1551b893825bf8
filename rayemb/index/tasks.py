"""The tasks of a build: each runs in a worker of its own, may be retried, and gives the same result again."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rayemb import storage
from rayemb.data.embeddings import ID, EmbeddingsTable
from rayemb.index.config import IndexConfig
from rayemb.index.errors import IndexArtefactError
from rayemb.index.faiss_index import (
    centroids,
    deserialise,
    faiss,
    give_back_memory,
    make_index,
    probed_lists,
    reason,
    reserve,
    seed_training,
    serialise,
)
from rayemb.index.keys import read_keys, write_keys
from rayemb.index.ledger import Ledger, Placed, Trained, Written, file_of
from rayemb.index.manifest import CurvePoint, File, Manifest, Recall, ShardFile
from rayemb.index.payload import id_hashes
from rayemb.index.placement import cell_shards, hashed_shards
from rayemb.index.shard import take_vectors, verified_path
from rayemb.index.verify import measure

_NAMED = 5
# Vectors read and added at once: small beside a shard, which is what a task's memory should be.
_BLOCK_BYTES = 8 << 20


def train(uri: str, version: int, config: IndexConfig, ledger: Ledger, reused: File | None = None) -> NDArray[np.uint8]:
    """The trained index without rows, as bytes; it lies in the object store once for all shards.

    Of an earlier run, if its record is there: shards of two quantisers do not belong together; a copy of `reused`, if
    that is given. Memory: the sample.
    """
    record = ledger.read("trained", Trained)
    if record is not None:
        return np.fromfile(verified_path(ledger.index_uri, record), np.uint8)
    if reused is not None:
        file = f"{ledger.folder}/trained.faiss"
        data = np.fromfile(verified_path(ledger.index_uri, reused), np.uint8)
        storage.write_bytes(storage.join(ledger.index_uri, file), data.tobytes())
        ledger.write("trained", Trained(**reused.model_dump(exclude={"file"}), file=file))
        return data
    embeddings = EmbeddingsTable.open(uri, version)
    index = make_index(embeddings.dim, config.factory, config.prefix)
    seed_training(index, config.seed)
    if not index.is_trained:
        sample = min(config.train_rows, embeddings.rows)
        offsets = np.sort(np.random.default_rng(config.seed).choice(embeddings.rows, sample, replace=False))
        vectors = take_vectors(embeddings, offsets)
        _check_finite(vectors, offsets, uri)
        try:
            index.train(vectors)
        except RuntimeError as error:
            raise IndexArtefactError(
                f"FAISS cannot train {config.factory} on {sample} rows: {reason(error)}",
                where="index.factory",
                fix="choose another type, or raise index.train_rows",
            ) from error
    file = f"{ledger.folder}/trained.faiss"
    with storage.writing(storage.join(ledger.index_uri, file)) as path:
        faiss.write_index(index, path)
        record = Trained(**file_of(file, path).model_dump())
    ledger.write("trained", record)
    return serialise(index)


def check_ids(uri: str, version: int) -> None:
    """Raises IndexArtefactError naming ids that occur more than once. Memory: 8 bytes a row and one batch."""
    dataset = EmbeddingsTable.open(uri, version).dataset
    hashes = np.sort(id_hashes(batch.column(0) for batch in dataset.to_batches(columns=[ID])))
    suspects = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    if not len(suspects):
        return
    wanted, counts = set(suspects.tolist()), dict[str, int]()
    for batch in dataset.to_batches(columns=[ID]):
        for row_id in batch.column(0).to_pylist():
            if hash(row_id) in wanted:
                counts[row_id] = counts.get(row_id, 0) + 1
    repeated = [row_id for row_id, count in counts.items() if count > 1]  # two ids may share a hash
    if repeated:
        more = f" and {len(repeated) - _NAMED} more" if len(repeated) > _NAMED else ""
        raise IndexArtefactError(
            f"ids occur more than once: {', '.join(map(repr, repeated[:_NAMED]))}{more}",
            where=uri,
            fix="give every row of the corpus its own id and embed it again",
        )


def cells(trained: NDArray[np.uint8] | None, uri: str, version: int, start: int, stop: int, shards: int) -> Any:
    """The coarse cell of rows `start .. stop-1`, `(R,)` int32; without `trained`, the shard by the hash of the id."""
    embeddings = EmbeddingsTable.open(uri, version)
    if trained is None:
        return hashed_shards(embeddings.columns(start, stop, [ID]).column(ID).to_pylist(), shards)
    index, step = deserialise(trained), _block_rows(embeddings.dim)
    blocks = (embeddings.vectors(low, min(low + step, stop)) for low in range(start, stop, step))
    return np.concatenate([probed_lists(index, np.ascontiguousarray(x), 1)[:, 0].astype(np.int32) for x in blocks])


def place(
    trained: NDArray[np.uint8] | None, trained_sha256: str, shards: int, ledger: Ledger, *parts: NDArray[np.int32]
) -> Placed:
    """Writes the keys of each shard. `parts`: the cells of all rows, in order. Memory: some 16 bytes a row."""
    cells_R = np.maximum(np.concatenate(parts), 0)  # FAISS gives a vector of NaN no cell; its shard will refuse it
    table = np.arange(shards, dtype=np.int32)
    if trained is not None:
        found = centroids(deserialise(trained))
        table = cell_shards(found, np.bincount(cells_R, minlength=len(found)), shards)
    owners_R = table[cells_R]
    files, rows = [], np.bincount(owners_R, minlength=shards).tolist()
    for number in range(shards):
        file = f"{ledger.folder}/shard-{number:05d}.keys"
        with storage.writing(storage.join(ledger.index_uri, file)) as path:
            write_keys(path, np.flatnonzero(owners_R == number))
            files.append(file_of(file, path))
    cells_of = tuple(table.tolist()) if trained is not None else ()
    record = Placed(trained=trained_sha256, rows=tuple(rows), keys=tuple(files), cells=cells_of)
    ledger.write("placed", record)
    return record


def build_shard(
    trained: NDArray[np.uint8],
    trained_sha256: str,
    uri: str,
    version: int,
    ledger: Ledger,
    number: int,
    rows: int,
    keys: int | File,
) -> Written:
    """Writes one shard, of the rows that `keys` names: the first of a range, or the file that lists them.

    Memory: the shard and some blocks of 8 MiB.
    """
    give_back_memory()
    embeddings = EmbeddingsTable.open(uri, version)
    listed = None if isinstance(keys, int) else read_keys(verified_path(ledger.index_uri, keys))
    index, step = deserialise(trained), _block_rows(embeddings.dim)
    reserve(index, rows)
    for low in range(0, rows, step):
        high = min(low + step, rows)
        if isinstance(keys, int):
            offsets = np.arange(keys + low, keys + high)
            vectors = embeddings.vectors(keys + low, keys + high)
        else:
            assert listed is not None
            offsets = np.array(listed[low:high])
            vectors = take_vectors(embeddings, offsets)
        _check_finite(vectors, offsets, uri)
        try:
            index.add(np.ascontiguousarray(vectors))
        except RuntimeError as error:  # NSG, for one, takes all its rows in one call
            raise IndexArtefactError(
                f"FAISS cannot add {rows} rows in blocks of {step}: {reason(error)}",
                where="index.factory",
                fix="choose another type",
            ) from error
    name = f"shard-{number:05d}"
    file = f"{ledger.folder}/{name}.faiss"
    with storage.writing(storage.join(ledger.index_uri, file)) as path:
        faiss.write_index(index, path)  # never as bytes in memory: that is the shard a second time
        written = file_of(file, path)
    place = {"start": keys} if isinstance(keys, int) else {"keys": keys}
    record = Written(trained=trained_sha256, shard=ShardFile(**written.model_dump(), rows=rows, **place))
    ledger.write(name, record)
    return record


def recall(index_uri: str, manifest: Manifest, config: IndexConfig) -> tuple[Recall | None, tuple[CurvePoint, ...]]:
    """What the index finds of what an exact search finds, at its own effort and at others."""
    return measure(index_uri, manifest, k=config.recall_k, queries=config.recall_queries, seed=config.seed)


def _block_rows(dim: int) -> int:
    return max(1, _BLOCK_BYTES // (4 * dim))


def _check_finite(vectors: NDArray[np.float32], offsets: NDArray[np.int64], uri: str) -> None:
    bad = offsets[~np.isfinite(vectors).all(axis=1)]
    if len(bad):
        named = ", ".join(map(str, bad[:_NAMED].tolist()))
        raise IndexArtefactError(
            f"vectors hold NaN or infinity in {len(bad)} rows ({named}, ...)",
            where=uri,
            fix="embed these rows again",
        )
