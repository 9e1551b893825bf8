"""The tasks that write the lexical half of an index: the words of each shard's rows, then what all have in common."""

import pyarrow as pa

from rayemb import storage
from rayemb.data.embeddings import EmbeddingsTable
from rayemb.index.columns import kind_of
from rayemb.index.errors import IndexArtefactError
from rayemb.index.ledger import Ledger, Terms, Worded, file_of
from rayemb.index.lexical import mapped_table, postings, terms_of
from rayemb.index.manifest import File, ShardFile
from rayemb.index.shard import open_keys, read_columns, verified_path


def check_words(embeddings: EmbeddingsTable, column: str) -> None:
    """Raises IndexArtefactError if the table has no such column of texts."""
    schema = embeddings.dataset.schema
    texts = [name for name in embeddings.payload_columns if kind_of(schema.field(name).type) == "string"]
    if column not in texts:
        raise IndexArtefactError(
            f"there is no text column {column!r} in {embeddings.uri}",
            where="index.words",
            fix=f"texts: {', '.join(texts) or 'none'}",
        )


def write_words(
    trained_sha256: str, uri: str, version: int, column: str, ledger: Ledger, number: int, shard: ShardFile
) -> Worded:
    """Writes the words of one shard's rows. Memory: these texts, and their postings."""
    embeddings = EmbeddingsTable.open(uri, version)
    texts = read_columns(embeddings, open_keys(ledger.index_uri, shard), [column]).column(0)
    name = f"words-{number:05d}"
    record = Worded(trained=trained_sha256, file=_write(ledger, name, postings(texts.to_pylist())))
    ledger.write(name, record)
    return record


def write_terms(ledger: Ledger, *shards: File) -> Terms:
    """Writes the terms of all shards. Memory: the terms; postings are mapped."""
    found = [mapped_table(verified_path(ledger.index_uri, shard)) for shard in shards]
    length = sum(int(sum(chunk.values.to_numpy().sum() for chunk in part["counts"].chunks)) for part in found)
    record = Terms(**_write(ledger, "terms", terms_of(found)).model_dump(), length=length)
    ledger.write("terms", record)
    return record


def _write(ledger: Ledger, name: str, table: pa.Table) -> File:
    file = f"{ledger.folder}/{name}.arrow"
    table = table.combine_chunks()
    with storage.writing(storage.join(ledger.index_uri, file)) as path:
        with pa.OSFile(path, "wb") as out, pa.ipc.new_file(out, table.schema) as writer:
            writer.write_table(table)
        return file_of(file, path)
