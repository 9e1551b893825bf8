"""Corpus and model to vectors, on Ray Data: decoding in tasks, encoders in an actor pool."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import ray
from lance.fragment import FragmentMetadata, write_fragments
from ray.data import ActorPoolStrategy

from rayemb import storage
from rayemb.cluster import require_cpus
from rayemb.data.config import EmbedConfig
from rayemb.data.corpus import PAYLOAD, SCHEMA, Corpus, CorpusError, RowGroup, read_row_group
from rayemb.data.embeddings import ID, IMAGE, VECTOR, EmbeddingsError, EmbeddingsTable, embeddings_schema
from rayemb.models import ImageLimits, Model, decode_image, image_tensor
from rayemb.progress import Progress

GROUPS_PER_TASK = 8
SOURCE_KEY = "rayemb.source"
PIXELS = "pixels"


def embed_corpus(
    corpus_uri: str, model_uri: str, table_uri: str, config: EmbedConfig, *, progress: Progress | None = None
) -> EmbeddingsTable:
    """The embeddings table of the corpus's images at `table_uri`, one row per pair, in the corpus's order.

    A table that was made from the same corpus by the same model is used as it is; otherwise a new version
    replaces the content, in one commit at the end. The rows stream through; the driver holds none of them.
    Needs a connected Ray. Raises CorpusError, ModelError or ClusterError before work starts.
    """
    corpus, model = Corpus.open(corpus_uri), Model.load(model_uri)
    splits = config.splits or list(corpus.splits)
    total = sum(corpus.rows(split) for split in splits)
    if not total:
        raise CorpusError("there are no rows to embed", where=corpus.uri)
    table_uri = storage.normalise(table_uri)
    source = storage.sha256_bytes(f"{corpus.digest}|{splits}|{config.keep_images}".encode())
    existing = _existing(table_uri, str(model.digest), source)
    if existing:
        return existing
    require_cpus(config.workers * config.cpus_per_worker + 1, "embedding (encoders and their data)")
    schema = embeddings_schema(PAYLOAD, model.dim, str(model.digest), images=config.keep_images)
    schema = schema.with_metadata({**schema.metadata, SOURCE_KEY: source})
    options = storage.lance_options(table_uri)

    def write(batch: pa.Table) -> dict[str, list[Any]]:
        table = pa.table({name: _column(batch, schema.field(name)) for name in schema.names}, schema=schema)
        written = write_fragments(table, table_uri, schema=schema, mode="overwrite", storage_options=options)
        return {"rows": [len(table)], "fragments": [json.dumps([f.to_json() for f in written])]}

    keep = [ID, *(field.name for field in PAYLOAD), *([IMAGE] if config.keep_images else [])]
    groups = {split: corpus.row_groups(split) for split in splits}
    size = model.network.config.image.image_size
    rows = encode_images(groups, [model_uri], config, keep=keep, image_size=size, limits=corpus.image_limits)
    rows = rows.repartition(target_num_rows_per_block=config.rows_per_file)
    written, done = [], 0
    for row in rows.map_batches(write, batch_size=None, batch_format="pyarrow", num_cpus=0.1).iter_rows():
        written += [FragmentMetadata.from_json(json.dumps(f)) for f in json.loads(row["fragments"])]
        done += int(row["rows"])
        if progress:
            progress(done, total, f"{done:,} vectors")
    if done != total:
        raise EmbeddingsError(f"{done} of {total} rows were embedded", where=table_uri, fix="run it again")
    lance.LanceDataset.commit(table_uri, lance.LanceOperation.Overwrite(schema, written), storage_options=options)
    return EmbeddingsTable.open(table_uri)


def encode_images(
    groups: dict[str, list[RowGroup]],
    model_uris: Sequence[str],
    config: EmbedConfig,
    *,
    keep: Sequence[str],
    image_size: int,
    limits: ImageLimits,
) -> ray.data.Dataset:
    """A lazy dataset of `keep` columns (`split` among them if named) and one vector column per model.

    The columns are `vector`, `vector_1`, ... in the order of `model_uris`; all models see the same pixels of side
    `image_size`. Rows come in the order of `groups`.
    """

    def decode(batch: dict[str, Any]) -> pa.Table:
        (unit,) = (json.loads(text) for text in batch["unit"])
        columns = list(dict.fromkeys([IMAGE, *(name for name in keep if name in SCHEMA.names)]))
        table = pa.concat_tables([read_row_group(RowGroup(**group), columns) for group in unit["groups"]])
        pixels = np.stack([image_tensor(decode_image(data, limits), image_size) for data in table[IMAGE].to_pylist()])
        if "split" in keep:
            table = table.append_column("split", pa.array([unit["split"]] * len(table)))
        flat = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(pixels[0].size), len(pixels), [None, pa.py_buffer(np.ascontiguousarray(pixels))]
        )
        return table.select(list(keep)).append_column(PIXELS, flat)

    units = [
        {"unit": json.dumps({"split": split, "groups": [asdict(g) for g in part[at : at + GROUPS_PER_TASK]]})}
        for split, part in groups.items()
        for at in range(0, len(part), GROUPS_PER_TASK)
    ]
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    rows = ray.data.from_items(units, override_num_blocks=len(units)).map_batches(decode, batch_size=1, num_cpus=0.5)
    return rows.map_batches(
        Encoder,
        fn_constructor_args=(list(model_uris), image_size, "cuda" if config.gpus_per_worker else "cpu"),
        batch_size=config.batch_size,
        batch_format="pyarrow",
        num_cpus=config.cpus_per_worker,
        num_gpus=config.gpus_per_worker or None,
        compute=ActorPoolStrategy(size=config.workers),
    )


class Encoder:
    """One encoder of the pool: pixels in, a vector column per model out."""

    def __init__(self, model_uris: list[str], image_size: int, device: str) -> None:
        import torch

        torch.set_num_threads(1)
        self.models = [Model.load(uri) for uri in model_uris]
        self.shape = (3, image_size, image_size)
        for model in self.models:
            model.network.to(device)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Replaces the pixels by `vector`, `vector_1`, ... of each model."""
        raw = b"".join(batch[PIXELS].to_pylist())
        pixels = np.frombuffer(raw, np.uint8).reshape(-1, *self.shape).copy()
        batch = batch.drop_columns([PIXELS])
        for number, model in enumerate(self.models):
            vectors = model.embed_pixels(pixels)
            name = f"{VECTOR}_{number}" if number else VECTOR
            column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), model.dim)
            batch = batch.append_column(name, column)
        return batch


def _column(batch: pa.Table, field: pa.Field) -> pa.ChunkedArray:
    column = batch[field.name]
    if field.name == VECTOR and not pa.types.is_fixed_size_list(column.type):
        column = pa.chunked_array([chunk.storage for chunk in column.chunks])
    return column.cast(field.type)


def _existing(table_uri: str, digest: str, source: str) -> EmbeddingsTable | None:
    try:
        table = EmbeddingsTable.open(table_uri)
    except EmbeddingsError:
        return None
    made_from = (table.dataset.schema.metadata or {}).get(SOURCE_KEY.encode(), b"").decode()
    return table if (table.model_digest, made_from) == (digest, source) else None
