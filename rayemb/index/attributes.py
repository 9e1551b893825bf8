"""Columns beside a corpus for samplers, from its embeddings: each row's cluster, and its nearest other rows."""

from collections.abc import Iterator
from typing import Any

import faiss
import numpy as np
import ray
from numpy.typing import NDArray
from pydantic import Field, model_validator
from ray.data import ActorPoolStrategy

from rayemb import storage
from rayemb.config import Config
from rayemb.data.attributes import write_attributes
from rayemb.data.corpus import Corpus
from rayemb.data.embeddings import ID, VECTOR, EmbeddingsTable
from rayemb.index.errors import IndexArtefactError
from rayemb.index.searcher import Index
from rayemb.progress import Progress

SPLIT = "split"


class AttributesConfig(Config):
    """Clusters and neighbours of the rows of one split."""

    split: str = Field("train", description="split of the corpus that they are for")
    clusters: int = Field(256, ge=1, description="pseudo-clusters of k-means")
    sample: int = Field(100_000, ge=1, description="rows that k-means is trained on")
    first_rank: int = Field(1, ge=1, description="nearest candidate that is kept; nearer ones may be false negatives")
    last_rank: int = Field(50, ge=1, description="furthest candidate that is kept; 1 is the row's nearest other row")
    workers: int = Field(1, ge=1, description="processes that search at once")
    rows_per_task: int = Field(8192, ge=1, description="rows of each piece of work")
    seed: int = Field(0, ge=0, description="decides the sample and where k-means begins")

    @model_validator(mode="after")
    def _ranks(self) -> "AttributesConfig":
        if self.first_rank > self.last_rank:
            raise ValueError(f"first_rank ({self.first_rank}) is after last_rank ({self.last_rank})")
        return self


def cluster_attributes(
    corpus_uri: str, embeddings_uri: str, uri: str, config: AttributesConfig, *, progress: Progress | None = None
) -> str:
    """The attribute table `cluster` `(N,)` int64 of a split at `uri`, by k-means over its vectors.

    Trained on a seeded sample, assigned piece by piece in Ray tasks. Needs a connected Ray.
    """
    table = EmbeddingsTable.open(embeddings_uri)
    start, stop = _rows_of(table, config.split)
    sample = np.random.default_rng(config.seed).permutation(stop - start)[: config.sample] + start
    rows = table.take(np.sort(sample).tolist(), [VECTOR])
    vectors = np.array([row[VECTOR] for row in rows], np.float32)
    count = min(config.clusters, len(vectors))
    # FAISS warns below 39 points a centroid and draws a subsample above 256: the sample is ours already.
    kmeans = faiss.Kmeans(
        table.dim,
        count,
        seed=config.seed,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=max(1, len(vectors)),
    )
    kmeans.train(vectors)
    centroids = np.asarray(kmeans.centroids, np.float32)

    class Assign:
        def __init__(self) -> None:
            self.table = EmbeddingsTable.open(table.uri, table.version)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            found = self.table.columns(int(batch["start"][0]), int(batch["stop"][0]), [ID, VECTOR])
            x_ND = found.column(VECTOR).combine_chunks().flatten().to_numpy().reshape(-1, table.dim)
            return {ID: found.column(ID).to_pylist(), "cluster": (x_ND @ centroids.T).argmax(1)}

    return _written(corpus_uri, uri, config, Assign, (start, stop), "cluster", progress)


def neighbour_attributes(
    corpus_uri: str, index_uri: str, uri: str, config: AttributesConfig, *, progress: Progress | None = None
) -> str:
    """The attribute table `neighbours` `(N, k)` int64: ordinals of the rows of a split that the index finds for each.

    Ranks `first_rank .. last_rank` among the other rows of the split, padded with -1. Each worker holds the index.
    Raises IndexArtefactError if the index does not hold the split. Needs a connected Ray.
    """
    with Index.open(index_uri) as index:
        table = index.embeddings
    start, stop = _rows_of(table, config.split)
    # Rows of other splits and the row itself take places too.
    depth = config.last_rank + 1

    class Neighbours:
        def __init__(self) -> None:
            self.index = Index.open(index_uri)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            low, high = int(batch["start"][0]), int(batch["stop"][0])
            found = self.index.embeddings.columns(low, high, [ID, VECTOR])
            x_ND = found.column(VECTOR).combine_chunks().flatten().to_numpy().reshape(-1, table.dim)
            wanted, k = config.last_rank, depth
            while True:
                keys = self.index.search(x_ND, min(k, self.index.rows)).keys
                own = np.arange(low, high)[:, None]
                ok = (keys >= start) & (keys < stop) & (keys != own)
                if k >= self.index.rows or int(ok.sum(1).min()) >= wanted:
                    break
                k *= 4
            rows = [(row[use] - start)[config.first_rank - 1 : wanted] for row, use in zip(keys, ok, strict=True)]
            width = wanted - config.first_rank + 1
            padded = [np.pad(row, (0, width - len(row)), constant_values=-1) for row in rows]
            return {ID: found.column(ID).to_pylist(), "neighbours": np.stack(padded).astype(np.int64)}

    return _written(corpus_uri, uri, config, Neighbours, (start, stop), "neighbours", progress)


def _written(
    corpus_uri: str,
    uri: str,
    config: AttributesConfig,
    work: type,
    rows: tuple[int, int],
    column: str,
    progress: Progress | None,
) -> str:
    start, stop = rows
    pieces = [
        {"start": at, "stop": min(at + config.rows_per_task, stop)} for at in range(start, stop, config.rows_per_task)
    ]
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    dataset = ray.data.from_items(pieces, override_num_blocks=len(pieces)).map_batches(
        work, batch_size=1, num_cpus=1, compute=ActorPoolStrategy(size=min(config.workers, len(pieces)))
    )

    def chunks() -> Iterator[tuple[list[str], dict[str, NDArray[np.generic]]]]:
        done = 0
        for batch in dataset.iter_batches(batch_size=None, batch_format="numpy"):
            done += len(batch[ID])
            if progress:
                progress(done, stop - start, f"{done:,} rows")
            yield batch[ID].tolist(), {column: np.asarray(batch[column], np.int64)}

    return write_attributes(storage.normalise(uri), Corpus.open(corpus_uri), config.split, chunks())


def _rows_of(table: EmbeddingsTable, split: str) -> tuple[int, int]:
    """Where the rows of a split begin and end: an embeddings table has the corpus's order, split by split."""
    start, rows = None, 0
    at = 0
    for batch in table.dataset.to_batches(columns=[SPLIT]):
        own = np.asarray(batch.column(0).to_pylist()) == split
        if own.any() and start is None:
            start = at + int(np.argmax(own))
        rows += int(own.sum())
        at += len(own)
    if start is None:
        raise IndexArtefactError(f"the embeddings have no row of split {split!r}", where=table.uri)
    return start, start + rows
