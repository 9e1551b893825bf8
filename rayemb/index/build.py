"""Building an index with Ray: train once, one task per shard, the manifest last."""

import logging
import re
import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import faiss
import numpy as np
import ray
from numpy.typing import NDArray

from rayemb import storage
from rayemb.cluster import require_cpus
from rayemb.data.embeddings import ID, EmbeddingsTable
from rayemb.errors import RayembError
from rayemb.index.config import IndexConfig
from rayemb.index.errors import IndexArtefactError
from rayemb.index.faiss_index import (
    deserialise,
    make_index,
    reason,
    rows_to_train,
    seed_training,
    serialise,
    with_keys,
)
from rayemb.index.manifest import (
    BuildFigures,
    EmbeddingsRef,
    Manifest,
    Recall,
    ShardFile,
    load_manifest,
    publish_manifest,
)
from rayemb.index.payload import id_hashes
from rayemb.index.shard import take_vectors
from rayemb.index.verify import block_rows, measure_recall

logger = logging.getLogger(__name__)

Progress = Callable[[str], None]
# A folder of a build that died is removed after this long; a younger one may belong to a build still running.
_ABANDONED_AFTER = timedelta(days=1)
_STAMP = "%Y%m%dT%H%M%S"
_FOLDER = re.compile(r"^v-(\d{8}T\d{6})-[0-9a-f]{8}$")
_HEARTBEAT_S = 30.0
_NAMED = 5


def build_index(
    embeddings_uri: str,
    index_uri: str,
    config: IndexConfig,
    *,
    model_digest: str | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Builds an index over the newest version of an embeddings table, publishes it, and gives its manifest.

    Needs a connected Ray. The corpus never passes through this process: tasks read their rows from the table
    and write their shards to `index_uri`, which every node must reach (S3 or a shared folder when there are
    several). An index published there before stays readable until the new manifest replaces it in one atomic
    step; then its files are removed (a reader that has them open keeps them).

    Args:
        model_digest: the digest that the table must carry; default: whatever it carries.
        progress: receives one line per step.

    Raises:
        IndexArtefactError: no rows, more shards than rows, too few rows to train, another model, ids that
            occur twice, vectors with NaN. Nothing is published then.
    """
    started = time.monotonic()
    say = progress or logger.info
    if not ray.is_initialized():
        raise IndexArtefactError("not connected to Ray", where="index", fix="call inside `rayemb.cluster.connect()`")
    embeddings = EmbeddingsTable.open(embeddings_uri)
    _check(embeddings, config, model_digest)
    require_cpus(1, "building an index")
    index_uri = storage.normalise(index_uri)
    folder = f"v-{datetime.now(UTC).strftime(_STAMP)}-{uuid.uuid4().hex[:8]}"
    try:
        shards, recall, draft = _run(embeddings, index_uri, folder, config, say, started)
        manifest = draft.model_copy(update={"recall": recall})
        _check_written(index_uri, shards)
        outdated = _folders_of_published(index_uri)
        publish_manifest(index_uri, manifest)
    except BaseException:
        if folder not in _folders_of_published(index_uri):  # an interrupt may come just after the publication
            storage.delete(storage.join(index_uri, folder))
        raise
    _clean(index_uri, keep=folder, outdated=outdated)
    found = "" if recall is None else f", recall@{recall.k} {recall.recall:.3f}"
    say(f"index {manifest.version}: {embeddings.rows:,} rows in {len(shards)} shards{found}")
    if recall is not None and recall.recall < config.min_recall:
        logger.warning(
            "recall@%d of index %s is %.3f, below index.min_recall %g: raise index.nprobe",
            *(recall.k, manifest.version, recall.recall, config.min_recall),
        )
    return manifest


def _run(
    embeddings: EmbeddingsTable,
    index_uri: str,
    folder: str,
    config: IndexConfig,
    say: Progress,
    started: float,
) -> tuple[list[ShardFile], Recall | None, Manifest]:
    """Trains, writes the shards into `folder`, measures; the manifest comes without its recall."""
    source = (embeddings.uri, embeddings.version)
    bounds = np.linspace(0, embeddings.rows, config.shards + 1).astype(np.int64).tolist()
    trained = ray.remote(_train).remote(*source, config)
    ids = ray.remote(_check_ids).remote(*source)
    _gather([ids, trained], lambda done: None, say, "training and checking ids")
    sample = min(config.train_rows, embeddings.rows)
    say(f"{config.factory} ready ({sample:,} rows sampled, {time.monotonic() - started:.1f} s)")

    def written(result: ShardFile) -> None:
        say(f"{result.file.rsplit('/', 1)[-1]}: {result.rows:,} rows, {result.bytes / 1e6:.1f} MB")

    tasks = [
        ray.remote(_build_shard).remote(trained, *source, index_uri, f"{folder}/shard-{i:05d}.faiss", start, stop)
        for i, (start, stop) in enumerate(pairwise(bounds))
    ]
    shards: list[ShardFile] = _gather(tasks, written, say, "writing shards")
    manifest = Manifest(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model_digest=embeddings.model_digest,
        embeddings=EmbeddingsRef(uri=embeddings.uri, version=embeddings.version, rows=embeddings.rows),
        metric=config.metric,
        dim=embeddings.dim,
        factory=config.factory,
        nprobe=config.nprobe,
        ef_search=config.ef_search,
        shards=tuple(shards),
        build=BuildFigures(
            seconds=round(time.monotonic() - started, 3), train_rows=sample, faiss=str(faiss.__version__)
        ),
    )
    recall: Recall | None = None
    if config.recall_queries:
        task = ray.remote(_recall).remote(index_uri, manifest, config)
        (recall,) = _gather([task], lambda done: None, say, "measuring recall")
    return shards, recall, manifest


def _check(embeddings: EmbeddingsTable, config: IndexConfig, model_digest: str | None) -> None:
    """What can be known to fail before any work is done."""
    if model_digest is not None and embeddings.model_digest != model_digest:
        raise IndexArtefactError(
            f"the embeddings are of model {embeddings.model_digest[:12]}, not of {model_digest[:12]}",
            where=embeddings.uri,
            fix="embed the corpus with this model first",
        )
    if embeddings.rows == 0:
        raise IndexArtefactError("the embeddings table has no rows", where=embeddings.uri, fix="embed a corpus first")
    if config.shards > embeddings.rows:
        raise IndexArtefactError(
            f"{config.shards} shards of {embeddings.rows} rows",
            where="index.shards",
            fix="ask for fewer shards",
        )
    try:
        needed = rows_to_train(make_index(embeddings.dim, config.factory))
    except ValueError as error:
        raise IndexArtefactError(
            f"{error} for vectors of {embeddings.dim} dimensions",
            where="index.factory",
            fix="choose another type",
        ) from error
    if embeddings.rows < needed:
        raise IndexArtefactError(
            f"{config.factory} needs at least {needed} rows to train and the table has {embeddings.rows}",
            where="index.factory",
            fix=f"choose fewer lists or centroids (IVF{max(1, embeddings.rows // 39)}), or Flat",
        )
    if config.train_rows < needed:
        raise IndexArtefactError(
            f"{config.factory} needs at least {needed} rows to train and the sample has {config.train_rows}",
            where="index.train_rows",
            fix=f"sample {39 * needed} rows or more, or choose an index.factory with fewer lists",
        )


# -- tasks: each runs in a worker of its own, may be retried, and gives the same result again ----------


def _train(uri: str, version: int, config: IndexConfig) -> NDArray[np.uint8]:
    """The trained index without rows, as bytes; it lies in the object store once for all shards."""
    embeddings = EmbeddingsTable.open(uri, version)
    index = make_index(embeddings.dim, config.factory)
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
    return serialise(with_keys(index))


def _check_ids(uri: str, version: int) -> None:
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


def _build_shard(
    trained: NDArray[np.uint8], uri: str, version: int, index_uri: str, file: str, start: int, stop: int
) -> ShardFile:
    """Writes the shard of rows `start .. stop-1`. Memory: twice the shard, and one block."""
    embeddings = EmbeddingsTable.open(uri, version)
    index = deserialise(trained)
    step = block_rows(embeddings.dim)
    for low in range(start, stop, step):
        high = min(low + step, stop)
        vectors, keys = embeddings.vectors(low, high), np.arange(low, high, dtype=np.int64)
        _check_finite(vectors, keys, uri)
        try:
            index.add_with_ids(np.ascontiguousarray(vectors), keys)
        except RuntimeError as error:  # NSG, for one, takes all its rows in one call
            raise IndexArtefactError(
                f"FAISS cannot add {stop - start} rows in blocks of {step}: {reason(error)}",
                where="index.factory",
                fix="choose another type",
            ) from error
    data: Any = serialise(index).data  # a view: bytes() would hold the shard a third time
    storage.write_bytes(storage.join(index_uri, file), data)
    digest = storage.sha256_bytes(data)
    return ShardFile(file=file, start=start, stop=stop, rows=stop - start, bytes=len(data), sha256=digest)


def _recall(index_uri: str, manifest: Manifest, config: IndexConfig) -> Recall:
    return measure_recall(index_uri, manifest, k=config.recall_k, queries=config.recall_queries, seed=config.seed)


def _check_finite(vectors: NDArray[np.float32], offsets: NDArray[np.int64], uri: str) -> None:
    bad = offsets[~np.isfinite(vectors).all(axis=1)]
    if len(bad):
        named = ", ".join(map(str, bad[:_NAMED].tolist()))
        raise IndexArtefactError(
            f"vectors hold NaN or infinity in {len(bad)} rows ({named}, ...)",
            where=uri,
            fix="embed these rows again",
        )


# -- around the tasks ----------------------------------------------------------------------------------


def _gather(tasks: list[Any], done: Callable[[Any], None], say: Progress, what: str) -> list[Any]:
    """The results of `tasks` in order; the first failure cancels the rest and is raised as the task did."""
    pending = list(tasks)
    try:
        while pending:
            ready, pending = ray.wait(pending, num_returns=1, timeout=_HEARTBEAT_S)
            for task in ready:
                done(ray.get(task))
            if not ready:
                free = ray.available_resources().get("CPU", 0.0)
                say(f"{what}: {len(pending)} of {len(tasks)} tasks to go ({free:g} CPUs free)")
        return list(ray.get(tasks))
    except BaseException as error:
        for task in pending:
            ray.cancel(task)
        if pending:
            # Else a task could write into the folder that is about to be removed.
            ray.wait(pending, num_returns=len(pending), timeout=_HEARTBEAT_S)
        cause = getattr(error, "cause", None)
        if isinstance(cause, RayembError):
            raise cause from None
        raise


def _check_written(index_uri: str, shards: list[ShardFile]) -> None:
    missing = [shard.file for shard in shards if not storage.exists(storage.join(index_uri, shard.file))]
    if missing:
        raise IndexArtefactError(
            f"{missing[0]} was written on another machine or has been removed",
            where=index_uri,
            fix="use S3 or a folder that all nodes share",
        )


def _folders_of_published(index_uri: str) -> set[str]:
    try:
        return {shard.file.split("/")[0] for shard in load_manifest(index_uri).shards}
    except IndexArtefactError:
        return set()  # none yet, or one that cannot be read: then its files wait for their age


def _clean(index_uri: str, keep: str, outdated: set[str]) -> None:
    """Removes the files that the last manifest named, and those of builds that died long ago."""
    prefix = storage.normalise(index_uri) + "/"
    now = datetime.now(UTC)
    for folder in {uri.removeprefix(prefix).split("/")[0] for uri in storage.list_files(index_uri, ".faiss")} - {keep}:
        stamp = _FOLDER.match(folder)
        if stamp is None:
            continue  # not ours
        age = now - datetime.strptime(stamp.group(1), _STAMP).replace(tzinfo=UTC)
        if folder in outdated or age > _ABANDONED_AFTER:
            try:
                storage.delete(storage.join(index_uri, folder))
            except OSError as error:
                logger.warning("could not remove the outdated folder %s of %s: %s", folder, index_uri, error)
