"""A real corpus (drawings of the demo source) with planted noise, so that what a filter finds can be counted."""

import functools
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray.data
from PIL import Image

from rayemb.curate import Rows, Step
from rayemb.curate.base import VERDICT
from rayemb.curate.state import ORDER
from rayemb.data import Corpus
from rayemb.data.corpus import FORMAT, SCHEMA, Kind
from rayemb.data.keys import keys_of, text_keys
from rayemb.data.sources import DemoSource, RawRow

VERBS = ("quietly", "always", "almost", "barely", "often", "rarely", "simply", "really", "surely", "partly")
PLACES = ("a wooden table", "the old harbour", "my garden wall", "an empty street", "the blue bridge", "our kitchen")


@functools.cache
def drawings(limit: int, size: int = 64, style: str = "openmoji") -> list[RawRow]:
    """Emoji (or icons of one font) of the demo source; ids, images and names are its own."""
    source = DemoSource(limit=limit, image_size=size)
    rows = [row for unit in source.units(0) for row in source.read(unit)]
    return sorted((row for row in rows if row.style == style), key=lambda row: row.id)


def sentence(name: str, number: int) -> str:
    """A caption of 10 words or so, different for every number."""
    rng = np.random.default_rng(number)
    verb, place = VERBS[rng.integers(len(VERBS))], PLACES[rng.integers(len(PLACES))]
    return f"a {name} {verb} seen from {place} on day {rng.integers(10**6)} of the {rng.integers(10**4)} journey"


def typo(text: str, rng: np.random.Generator) -> str:
    """The text with one letter changed."""
    at = int(rng.integers(len(text)))
    return text[:at] + "xyzqj"[int(rng.integers(5))] + text[at + 1 :]


def picture(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def jpeg(data: bytes, quality: int) -> bytes:
    out = io.BytesIO()
    picture(data).save(out, "JPEG", quality=quality)
    return out.getvalue()


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def resized(data: bytes, side: int) -> bytes:
    return png(picture(data).resize((side, side), Image.Resampling.BICUBIC))


def cropped(data: bytes, margin: int) -> bytes:
    image = picture(data)
    return png(image.crop((margin, margin, image.width - margin, image.height - margin)))


def corpus_of(
    root: Path,
    splits: dict[str, list[RawRow]],
    *,
    shard_rows: int = 64,
    group_rows: int = 16,
    kind: Kind = "image_text",
) -> Corpus:
    """A corpus of these rows, written without the builder: rows keep their order, so ordinals are known."""
    described: dict[str, Any] = {}
    for split, rows in splits.items():
        files = []
        for number, at in enumerate(range(0, len(rows), shard_rows)):
            table = pa.Table.from_pylist([columns_of(row, kind) for row in rows[at : at + shard_rows]], schema=SCHEMA)
            file = f"split={split}/shard-{number:05d}.parquet"
            (root / file).parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(table, root / file, row_group_size=group_rows, write_page_checksum=True)
            digest = hashlib.sha256((root / file).read_bytes()).hexdigest()
            files.append({"file": file, "rows": len(table), "sha256": digest})
        described[split] = {"rows": len(rows), "files": files}
    sums = "".join(entry["sha256"] for name in sorted(described) for entry in described[name]["files"])
    digest = hashlib.sha256(sums.encode()).hexdigest()
    manifest = {"format": FORMAT, "kind": kind, "digest": digest, "fingerprint": "", "splits": described}
    manifest["rows"] = sum(map(len, splits.values()))
    (root / "_corpus.json").write_text(json.dumps(manifest))
    return Corpus.open(str(root))


def columns_of(row: RawRow, kind: Kind) -> dict[str, Any]:
    text = str(row.text)
    seen = {"text": text, "text_pair": row.query}.get(kind)
    return {
        "id": row.id,
        "image": row.image,
        "query": row.query,
        "text": text,
        "texts": row.texts or [text],
        "negatives": row.negatives,
        "concept": row.concept or text,
        "score": row.score,
        "style": row.style,
        "license": row.license,
        "query_key": int((text_keys([seen]) if seen is not None else keys_of([row.image or b""]))[0]),
        "text_key": int(text_keys([text])[0]),
        "concept_key": int(keys_of([row.concept or text])[0]),
    }


def pair(number: int | str, text: str, image: bytes = b"", **more: Any) -> RawRow:
    return RawRow(id=f"row-{number}", image=image, text=text, source="test", **more)


def judged(step: Step, corpus: Corpus, **more: Any) -> dict[int, dict[str, Any]]:
    """What a step says of each row by ordinal, its best verdict alone; rows it says nothing of are left out."""
    found = step.judge(Rows.of(corpus, step.splits, **more))
    if isinstance(found, ray.data.Dataset):
        found = [table for table in found.iter_batches(batch_format="pyarrow", batch_size=None) if table.num_rows]
    table = pa.concat_tables([VERDICT.empty_table(), *found]).sort_by(ORDER)
    return {verdict["row"]: verdict for verdict in reversed(table.to_pylist())}


def dropped(step: Step, corpus: Corpus, **more: Any) -> dict[int, dict[str, Any]]:
    """The same of dropped rows alone."""
    return {row: verdict for row, verdict in judged(step, corpus, **more).items() if verdict["drop"]}
