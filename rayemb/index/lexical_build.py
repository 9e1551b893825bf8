"""Building the lexical half of an index: one Ray task per shard, the terms summed, the manifest last."""

import logging
import uuid
from typing import Any

import pyarrow as pa
import ray

from rayemb import storage
from rayemb.data.embeddings import EmbeddingsTable
from rayemb.index.columns import kind_of
from rayemb.index.errors import IndexArtefactError
from rayemb.index.lexical import LEXICAL, LexicalManifest, TermsFile, load_lexical, mapped_table, postings, terms_of
from rayemb.index.manifest import ShardFile, load_manifest
from rayemb.index.shard import open_embeddings, verified_path

logger = logging.getLogger(__name__)


def build_lexical(index_uri: str, column: str) -> LexicalManifest:
    """Builds BM25 over `column` beside the published index at `index_uri`, and gives its manifest.

    Needs a connected Ray. Whatever was there before is replaced in one step, then removed.
    Raises IndexArtefactError if there is no index, or no such column of texts.
    """
    index_uri = storage.normalise(index_uri)
    manifest = load_manifest(index_uri)
    embeddings = open_embeddings(manifest)
    texts = [name for name in embeddings.payload_columns
             if kind_of(embeddings.dataset.schema.field(name).type) == "string"]  # fmt: skip
    if column not in texts:
        there = ", ".join(texts) or "none"
        raise IndexArtefactError(f"there is no text column {column!r}", where=embeddings.uri, fix=f"texts: {there}")
    folder = f"lexical-{uuid.uuid4().hex[:8]}"
    try:
        tasks = [
            ray.remote(_write_shard).remote(
                *(embeddings.uri, embeddings.version, column, index_uri, f"{folder}/shard-{i:05d}.arrow"),
                *(shard.start, shard.stop),
            )
            for i, shard in enumerate(manifest.shards)
        ]
        shards: list[ShardFile] = ray.get(tasks)
        terms, length = ray.get(ray.remote(_write_terms).remote(index_uri, folder, shards))
        built = LexicalManifest(
            embeddings=manifest.embeddings, column=column, length=length, terms=terms, shards=tuple(shards)
        )
        before = load_lexical(index_uri, manifest)
        storage.write_bytes(storage.join(index_uri, LEXICAL), (built.model_dump_json(indent=2) + "\n").encode())
    except BaseException:
        storage.delete(storage.join(index_uri, folder))
        raise
    if before is not None:
        storage.delete(storage.join(index_uri, before.terms.file.split("/")[0]))
    logger.info("lexical index of %s: %d words in %d rows", column, length, manifest.embeddings.rows)
    return built


def _write_shard(uri: str, version: int, column: str, index_uri: str, file: str, start: int, stop: int) -> ShardFile:
    texts = EmbeddingsTable.open(uri, version).columns(start, stop, [column]).column(0)
    size, digest = _write(index_uri, file, postings(texts.to_pylist()))
    return ShardFile(file=file, start=start, stop=stop, rows=stop - start, bytes=size, sha256=digest)


def _write_terms(index_uri: str, folder: str, shards: list[ShardFile]) -> tuple[TermsFile, int]:
    found = [mapped_table(verified_path(index_uri, shard)) for shard in shards]
    length = sum(int(sum(chunk.values.to_numpy().sum() for chunk in part["counts"].chunks)) for part in found)
    file = f"{folder}/terms.arrow"
    size, digest = _write(index_uri, file, terms_of(found))
    return TermsFile(file=file, bytes=size, sha256=digest), length


def _write(index_uri: str, file: str, table: pa.Table) -> tuple[int, str]:
    sink = pa.BufferOutputStream()
    table = table.combine_chunks()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    data: Any = sink.getvalue()
    storage.write_bytes(storage.join(index_uri, file), data)
    return data.size, storage.sha256_bytes(data)
