"""Building an index with Ray: train once, one task per shard, the manifest last."""

import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from typing import Any

import faiss
import numpy as np
import ray

from rayemb import storage
from rayemb.cluster import require_cpus
from rayemb.data.embeddings import EmbeddingsTable
from rayemb.errors import RayembError
from rayemb.index import lexical_build, plan, tasks
from rayemb.index.config import AUTO, IndexConfig
from rayemb.index.errors import IndexArtefactError
from rayemb.index.faiss_index import make_index, rows_to_train
from rayemb.index.ledger import Ledger, Placed, Terms, Trained, Worded, Written, fingerprint, folders, started
from rayemb.index.live.log import updates_in
from rayemb.index.manifest import (
    BuildFigures,
    EmbeddingsRef,
    File,
    Manifest,
    ShardFile,
    Sharding,
    Words,
    load_manifest,
    publish_manifest,
)

logger = logging.getLogger(__name__)

Progress = Callable[[str], None]
# A folder of a build that died is removed after this long; a younger one may belong to a build still running.
_ABANDONED_AFTER = timedelta(days=1)
_HEARTBEAT_S = 30.0
_PLACED = 1_000_000  # rows that one task finds the cells of


def build_index(
    embeddings_uri: str,
    index_uri: str,
    config: IndexConfig,
    *,
    model_digest: str | None = None,
    version: int | None = None,
    compacted: Manifest | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Builds an index over an embeddings table, publishes it, and gives its manifest.

    Needs a connected Ray. The corpus never passes through this process: tasks read their rows from the table
    and write their shards to `index_uri`, which every node must reach (S3 or a shared folder when there are
    several). An index published there before stays readable until the new manifest replaces it in one atomic
    step; then its files are removed (a reader that has them open keeps them).

    A build that was killed goes on when it is started again with the same table and settings: the quantiser
    and the shards that are there are kept, and the manifest is the one that it would have been.

    Args:
        model_digest: the digest that the table must carry; default: whatever it carries.
        version: of the table; default: the newest.
        compacted: the index published there whose rows these are, with its updates: its trained index is used again,
            and the manifest names it as the origin.
        progress: receives one line per step.

    Raises:
        IndexArtefactError: no rows, more shards than rows, too few rows to train, another model, ids that
            occur twice, vectors with NaN. Nothing is published then.
    """
    started_s = time.monotonic()
    say = progress or logger.info
    if not ray.is_initialized():
        raise IndexArtefactError("not connected to Ray", where="index", fix="call inside `rayemb.cluster.connect()`")
    embeddings = EmbeddingsTable.open(embeddings_uri, version)
    _check_rows(embeddings, config, model_digest)
    require_cpus(1, "building an index")
    planned = config.factory == AUTO
    if planned:
        task = ray.remote(plan.choose).remote(embeddings.uri, embeddings.version, config)
        (config,) = _gather([task], lambda done: None, say, "planning")
        say(f"planned: {config.factory}")
    _check_factory(embeddings, config)
    index_uri = storage.normalise(index_uri)
    mark = fingerprint(embeddings.uri, embeddings.version, config, str(faiss.__version__))
    ledger = Ledger.open(index_uri, mark, _folders_of_published(index_uri))
    try:
        manifest = _run(embeddings, ledger, config, compacted, say, started_s)
        if planned:
            manifest = _tuned(manifest, config.plan.recall)
        outdated = _folders_of_published(index_uri)
        publish_manifest(index_uri, manifest)
    except IndexArtefactError:
        # It would fail again. After any other failure, the files stay for the run that goes on from them.
        storage.delete(storage.join(index_uri, ledger.folder))
        raise
    ledger.close()
    _clean(index_uri, keep=ledger.folder, outdated=outdated)
    recall = manifest.recall
    found = "" if recall is None else f", recall@{recall.k} {recall.recall:.3f}"
    say(f"index {manifest.version}: {embeddings.rows:,} rows in {len(manifest.shards)} shards{found}")
    if recall is not None and recall.recall < config.min_recall:
        logger.warning(
            "recall@%d of index %s is %.3f, below index.min_recall %g: raise index.nprobe, ef_search or rerank",
            *(recall.k, manifest.version, recall.recall, config.min_recall),
        )
    return manifest


def _run(
    embeddings: EmbeddingsTable,
    ledger: Ledger,
    config: IndexConfig,
    compacted: Manifest | None,
    say: Progress,
    started_s: float,
) -> Manifest:
    """Trains, places rows, writes the shards that the ledger lacks, measures."""
    source = (embeddings.uri, embeddings.version)
    reused = compacted.trained if compacted else None
    trained = ray.remote(tasks.train).remote(*source, config, ledger, reused)
    ids = ray.remote(tasks.check_ids).remote(*source)
    _gather([ids, trained], lambda done: None, say, "training and checking ids")
    quantiser = ledger.read("trained", Trained)
    if quantiser is None:
        raise _elsewhere(ledger, "the trained index")
    sample = 0 if reused else min(config.train_rows, embeddings.rows)
    how = "trained before" if reused else f"{sample:,} rows sampled"
    say(f"{config.factory} ready ({how}, {time.monotonic() - started_s:.1f} s)")
    keys: list[tuple[int, int | File]]
    routing: tuple[int, ...] = ()
    if config.by == "rows":
        bounds = np.linspace(0, embeddings.rows, config.shards + 1).astype(np.int64).tolist()
        keys = [(stop - start, start) for start, stop in pairwise(bounds)]
    else:
        placed = _place(embeddings, ledger, config, trained, quantiser, say)
        keys, routing = list(zip(placed.rows, placed.keys, strict=True)), placed.cells

    records = [ledger.read(f"shard-{number:05d}", Written) for number in range(config.shards)]
    there = {n: each for n, each in enumerate(records) if each is not None and each.trained == quantiser.sha256}
    if there:
        say(f"{len(there)} of {config.shards} shards are there from an earlier run")

    def written(done: Written) -> None:
        say(f"{done.shard.file.rsplit('/', 1)[-1]}: {done.shard.rows:,} rows, {done.shard.bytes / 1e6:.1f} MB")

    todo = [
        ray.remote(tasks.build_shard).remote(trained, quantiser.sha256, *source, ledger, number, rows, key)
        for number, (rows, key) in enumerate(keys)
        if number not in there
    ]
    made = iter(_gather(todo, written, say, "writing shards"))
    shards = tuple((there[n] if n in there else next(made)).shard for n in range(config.shards))
    words = _write_words(source, ledger, config.words, quantiser, shards, say) if config.words else None
    manifest = Manifest(
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        model_digest=embeddings.model_digest,
        embeddings=EmbeddingsRef(uri=embeddings.uri, version=embeddings.version, rows=embeddings.rows),
        metric=config.metric,
        dim=embeddings.dim,
        factory=config.factory,
        prefix=config.prefix,
        effort=config.effort,
        updates=updates_in(embeddings),
        origin=(compacted.origin or compacted.version) if compacted else None,
        sharding=Sharding(by=config.by, cells=routing),
        trained=File(**quantiser.model_dump()),
        shards=shards,
        words=words,
        build=BuildFigures(
            seconds=round(time.monotonic() - started_s, 3),
            train_rows=sample,
            seed=config.seed,
            faiss=str(faiss.__version__),
        ),
    )
    _check_written(ledger, manifest)
    if not config.recall_queries:
        return manifest
    task = ray.remote(tasks.recall).remote(ledger.index_uri, manifest, config)
    ((recall, curve),) = _gather([task], lambda done: None, say, "measuring recall")
    return manifest.model_copy(update={"recall": recall, "curve": curve})


def _tuned(manifest: Manifest, recall: float) -> Manifest:
    """`manifest` with the cheapest effort that reaches `recall`, now that all rows are there to measure with."""
    point = next((each for each in manifest.curve if each.recall >= recall), None)
    if point is None or manifest.recall is None:
        return manifest
    measured = manifest.recall.model_copy(update={"recall": point.recall})
    return manifest.model_copy(update={"effort": point.effort, "recall": measured})


def _place(
    embeddings: EmbeddingsTable, ledger: Ledger, config: IndexConfig, trained: Any, quantiser: Trained, say: Progress
) -> Placed:
    earlier = ledger.read("placed", Placed)
    if earlier is not None and earlier.trained == quantiser.sha256:
        return earlier
    source = (embeddings.uri, embeddings.version)
    guide = trained if config.by == "cell" else None
    parts = [
        ray.remote(tasks.cells).remote(guide, *source, low, min(low + _PLACED, embeddings.rows), config.shards)
        for low in range(0, embeddings.rows, _PLACED)
    ]
    _wait(parts, say, "placing rows")
    task = ray.remote(tasks.place).remote(guide, quantiser.sha256, config.shards, ledger, *parts)
    placed: Placed = _gather([task], lambda done: None, say, "writing keys")[0]
    return placed


def _write_words(
    source: tuple[str, int],
    ledger: Ledger,
    column: str,
    quantiser: Trained,
    shards: tuple[ShardFile, ...],
    say: Progress,
) -> Words:
    """The words of the shards' rows; those that the ledger has are kept."""
    records = [ledger.read(f"words-{number:05d}", Worded) for number in range(len(shards))]
    there = {n: each for n, each in enumerate(records) if each is not None and each.trained == quantiser.sha256}
    todo = [
        ray.remote(lexical_build.write_words).remote(quantiser.sha256, *source, column, ledger, number, shard)
        for number, shard in enumerate(shards)
        if number not in there
    ]
    made = iter(_gather(todo, lambda done: None, say, "writing words"))
    files = [(there[n] if n in there else next(made)).file for n in range(len(shards))]
    terms = None if todo else ledger.read("terms", Terms)
    if terms is None:
        task = ray.remote(lexical_build.write_terms).remote(ledger, *files)
        (terms,) = _gather([task], lambda done: None, say, "counting words")
        assert isinstance(terms, Terms)
    say(f"words of {column}: {terms.length:,}")
    named = File(**terms.model_dump(exclude={"length"}))
    return Words(column=column, length=terms.length, terms=named, shards=tuple(files))


def _check_rows(embeddings: EmbeddingsTable, config: IndexConfig, model_digest: str | None) -> None:
    """What can be known to fail before any work is done."""
    if config.words is not None:
        lexical_build.check_words(embeddings, config.words)
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


def _check_factory(embeddings: EmbeddingsTable, config: IndexConfig) -> None:
    """What of the type can be known to fail before any work is done."""
    try:
        needed = rows_to_train(make_index(embeddings.dim, config.factory, config.prefix))
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


# -- around the tasks ----------------------------------------------------------------------------------


def _wait(tasks: list[Any], say: Progress, what: str, done: Callable[[Any], None] | None = None) -> None:
    """Until `tasks` are through; the first failure cancels the rest and is raised as the task did."""
    pending = list(tasks)
    try:
        while pending:
            ready, pending = ray.wait(pending, num_returns=1, timeout=_HEARTBEAT_S, fetch_local=done is not None)
            for task in ready:
                if done is not None:
                    done(ray.get(task))
            if not ready:
                free = ray.available_resources().get("CPU", 0.0)
                say(f"{what}: {len(pending)} of {len(tasks)} tasks to go ({free:g} CPUs free)")
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


def _gather(tasks: list[Any], done: Callable[[Any], None], say: Progress, what: str) -> list[Any]:
    """The results of `tasks`, in order, after `_wait`."""
    _wait(tasks, say, what, done)
    return list(ray.get(tasks))


def _check_written(ledger: Ledger, manifest: Manifest) -> None:
    for file in manifest.files:
        if not storage.exists(storage.join(ledger.index_uri, file.file)):
            raise _elsewhere(ledger, file.file)


def _elsewhere(ledger: Ledger, what: str) -> IndexArtefactError:
    return IndexArtefactError(
        f"{what} was written on another machine or has been removed",
        where=ledger.index_uri,
        fix="use S3 or a folder that all nodes share",
    )


def _folders_of_published(index_uri: str) -> set[str]:
    try:
        return {shard.file.split("/")[0] for shard in load_manifest(index_uri).shards}
    except IndexArtefactError:
        return set()  # none yet, or one that cannot be read: then its files wait for their age


def _clean(index_uri: str, keep: str, outdated: set[str]) -> None:
    """Removes the files that the last manifest named, and those of builds that died long ago."""
    now = datetime.now(UTC)
    for folder in folders(index_uri):
        if folder != keep and (folder in outdated or now - started(folder) > _ABANDONED_AFTER):
            try:
                storage.delete(storage.join(index_uri, folder))
            except OSError as error:
                logger.warning("could not remove the outdated folder %s of %s: %s", folder, index_uri, error)
