"""Synthetic embeddings tables, and the naive answers to search them by."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from rayemb.data.embeddings import ID, IMAGE, VECTOR, WHAT_KEY, EmbeddingsTable, embeddings_schema
from rayemb.index import IndexConfig, Manifest, lexical_build, tasks
from rayemb.index.ledger import Ledger, Trained
from rayemb.index.manifest import BuildFigures, EmbeddingsRef, File, Sharding, Words, publish_manifest

DIGEST = "0123456789abcdef" * 4


def random_vectors(rows: int, dim: int = 16, seed: int = 0) -> NDArray[np.float32]:
    x = np.random.default_rng(seed).normal(size=(rows, dim)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def exact_vectors(rows: int, dim: int = 8, seed: int = 0) -> NDArray[np.float32]:
    """Unit vectors of four halves: inner products are multiples of 1/4, exact in any order, full of ties."""
    rng = np.random.default_rng(seed)
    x = np.zeros((rows, dim), np.float32)
    for row in x:
        row[rng.choice(dim, 4, replace=False)] = rng.choice([-0.5, 0.5], 4)
    return x


def write_table(
    folder: Path | str,
    vectors: NDArray[np.float32],
    payload: Mapping[str, Any] | None = None,
    *,
    ids: Sequence[str] | None = None,
    images: Sequence[bytes | None] | None = None,
    digest: str = DIGEST,
    mode: str = "overwrite",
    what: str = "image",
) -> str:
    """Writes an embeddings table (of images, texts, queries) and gives its URI; `payload`: column name to values."""
    columns = {name: pa.array(values) for name, values in (payload or {}).items()}
    fields = [pa.field(name, array.type) for name, array in columns.items()]
    dim = vectors.shape[1]
    data: dict[str, Any] = {
        ID: pa.array(ids if ids is not None else [f"item-{i}" for i in range(len(vectors))], pa.string()),
        VECTOR: pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel(), pa.float32()), dim),
    }
    if images is not None:
        data[IMAGE] = pa.array(images, pa.binary())
    schema = embeddings_schema(fields, dim, digest, images=images is not None)
    schema = schema.with_metadata({**schema.metadata, WHAT_KEY: what})
    lance.write_dataset(pa.table({**data, **columns}, schema=schema), str(folder), mode=mode)
    return str(folder)


def build_here(embeddings: str, index: Path | str, config: IndexConfig) -> Manifest:
    """What `build_index` publishes, by the same tasks one after another in this process: no cluster needed."""
    table, uri = EmbeddingsTable.open(embeddings), str(index)
    ledger = Ledger(uri, "v-20260101T000000-00000000")
    source = (table.uri, table.version)
    trained = tasks.train(*source, config, ledger)
    quantiser = ledger.read("trained", Trained)
    assert quantiser is not None
    keys: list[tuple[int, Any]]
    cells: tuple[int, ...] = ()
    if config.by == "rows":
        bounds = np.linspace(0, table.rows, config.shards + 1).astype(int).tolist()
        keys = [(stop - start, start) for start, stop in pairwise(bounds)]
    else:
        guide = trained if config.by == "cell" else None
        middle = table.rows // 2
        parts = [
            tasks.cells(guide, *source, low, high, config.shards) for low, high in ((0, middle), (middle, table.rows))
        ]
        placed = tasks.place(guide, quantiser.sha256, config.shards, ledger, *parts)
        keys, cells = list(zip(placed.rows, placed.keys, strict=True)), placed.cells
    shards = [
        tasks.build_shard(trained, quantiser.sha256, *source, ledger, number, rows, key).shard
        for number, (rows, key) in enumerate(keys)
    ]
    words = None
    if config.words is not None:
        files = [
            lexical_build.write_words(quantiser.sha256, *source, config.words, ledger, number, shard).file
            for number, shard in enumerate(shards)
        ]
        terms = lexical_build.write_terms(ledger, *files)
        named = File(**terms.model_dump(exclude={"length"}))
        words = Words(column=config.words, length=terms.length, terms=named, shards=tuple(files))
    manifest = Manifest(
        created="2026-01-01T00:00:00+00:00",
        model_digest=table.model_digest,
        embeddings=EmbeddingsRef(uri=table.uri, version=table.version, rows=table.rows),
        metric="inner_product",
        dim=table.dim,
        factory=config.factory,
        prefix=config.prefix,
        effort=config.effort,
        sharding=Sharding(by=config.by, cells=cells),
        trained=File(**quantiser.model_dump()),
        shards=tuple(shards),
        words=words,
        build=BuildFigures(seconds=0, train_rows=0, faiss=""),
    )
    return publish_manifest(uri, manifest)


def naive_search(
    vectors: NDArray[np.float32], queries: NDArray[np.float32], k: int, keep: Sequence[bool] | None = None
) -> tuple[list[list[float]], list[list[int]]]:
    """Python's own sort over every pair: highest score first, lowest row first among equal scores."""
    all_scores, all_keys = [], []
    for query in queries:
        scored = [
            (-float(np.dot(query, vector)), key) for key, vector in enumerate(vectors) if keep is None or keep[key]
        ]
        best = sorted(scored)[:k]
        missing = k - len(best)
        all_scores.append([-score for score, _ in best] + [-np.inf] * missing)
        all_keys.append([key for _, key in best] + [-1] * missing)
    return all_scores, all_keys
