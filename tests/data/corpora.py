"""Small corpora written by hand, so that readers are tested without the builder."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from rayemb.data import Corpus
from rayemb.data.corpus import SCHEMA
from rayemb.data.keys import keys_of, text_keys


def png(number: int, size: int = 8) -> bytes:
    """A picture of one colour that tells `number` (below 65,536)."""
    out = io.BytesIO()
    Image.new("RGB", (size, size), (number % 256, number // 256, 99)).save(out, "PNG")
    return out.getvalue()


def rows(start: int, count: int, concepts: int = 10_000, *, pairs: bool = False) -> list[dict[str, Any]]:
    """Rows of images and texts; `pairs`: of queries and texts, each with 0 to 3 hard negatives."""
    return [
        {
            "id": f"row-{n}",
            "image": None if pairs else png(n),
            "query": f"query {n}" if pairs else None,
            "text": f"text {n}",
            "texts": [f"text {n}", f"texte {n}", f"текст {n}"],
            "negatives": [f"wrong {n} {i}" for i in range(n % 4)] if pairs else [],
            "concept": f"concept {n % concepts}",
            "score": None,
            "query_key": int((text_keys([f"query {n}"]) if pairs else keys_of([png(n)]))[0]),
            "text_key": int(text_keys([f"text {n}"])[0]),
            "concept_key": int(keys_of([f"concept {n % concepts}"])[0]),
            "style": "plain",
            "license": "CC0",
        }
        for n in range(start, start + count)
    ]


def corrupt(shard: Path, group: int, column: str = "image") -> None:
    """Flips one bit near the end of a column of a row group: in a page's body, which its checksum covers."""
    metadata = pq.read_metadata(shard).row_group(group)
    (chunk,) = (c for c in map(metadata.column, range(metadata.num_columns)) if c.path_in_schema == column)
    content = bytearray(shard.read_bytes())
    content[(chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size - 3] ^= 1
    shard.write_bytes(content)


def write_corpus(
    root: Path, shards: dict[str, list[int]], group_rows: int = 5, concepts: int = 10_000, *, pairs: bool = False
) -> Corpus:
    """A corpus whose split `name` has a shard for each number of rows in `shards[name]`, rows numbered throughout."""
    splits: dict[str, Any] = {}
    start = 0
    for split, sizes in shards.items():
        files = []
        for number, size in enumerate(sizes):
            file = f"split={split}/shard-{number:05d}.parquet"
            path = root / file
            path.parent.mkdir(parents=True, exist_ok=True)
            table = pa.Table.from_pylist(rows(start, size, concepts, pairs=pairs), schema=SCHEMA)
            pq.write_table(table, path, row_group_size=group_rows, compression="zstd", write_page_checksum=True)
            files.append({"file": file, "rows": size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()})
            start += size
        splits[split] = {"rows": sum(sizes), "files": files}
    sums = "".join(entry["sha256"] for name in sorted(splits) for entry in splits[name]["files"])
    manifest = {
        "format": 2,
        "kind": "text_pair" if pairs else "image_text",
        "digest": hashlib.sha256(sums.encode()).hexdigest(),
        "fingerprint": "",
        "rows": start,
    }
    (root / "_corpus.json").write_text(json.dumps({**manifest, "splits": splits}))
    return Corpus.open(str(root))
