"""What a task found of one system, kept in the report's folder: for a suite that goes on, and to compare with later.

`items/<task>/<system>.parquet` has the items (`id`, `cluster` if any, then the columns); a JSON file beside it has the
rest, and under which key it was found.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from rayemb import storage
from rayemb.config import Config, ConfigError, from_mapping
from rayemb.data.corpus import parquet_bytes
from rayemb.evaluate.report import Confusion, Curve, Example, Similarities, Space
from rayemb.evaluate.tasks.base import Found, Items, Shown

FORMAT = 1
RESERVED = ("id", "cluster")


class _Shown(Config):
    space: Space | None
    similarities: Similarities | None
    curves: tuple[Curve, ...]
    confusion: Confusion | None
    examples: tuple[Example, ...]


def key_of(**parts: Any) -> str:
    """SHA-256 (hex) of all that what is found depends on."""
    return hashlib.sha256(json.dumps({"format": FORMAT, **parts}, sort_keys=True).encode()).hexdigest()


def items_uri(report: str, task: str, system: str) -> str:
    """Where the items lie."""
    return storage.join(report, "items", task, re.sub(r"[^A-Za-z0-9._-]", "_", system) + ".parquet")


def write(report: str, task: str, system: str, key: str, found: Found, *, data: str = "") -> None:
    """Keeps it; what is there of the same task and system is replaced. The JSON comes last: with it, all is there.

    `data`: the digest of the task's, so that a comparison knows whether another report is of the same.
    """
    uri = items_uri(report, task, system)
    items = found.items
    columns: dict[str, Any] = {"id": items.ids}
    if items.clusters is not None:
        columns["cluster"] = items.clusters
    storage.write_bytes(uri, parquet_bytes(pa.table({**columns, **items.columns}), 1 << 20))
    shown = _Shown(**vars(found.shown))
    document = {
        "key": key,
        "data": data,
        "candidates": found.candidates,
        "diagnostics": dict(found.diagnostics),
        "notes": list(found.notes),
        "shown": shown.model_dump(mode="json"),
        "images": [None if data is None else base64.b64encode(data).decode() for data in _images(found.shown)],
    }
    storage.write_json(_about(uri), document)


def read(report: str, task: str, system: str, key: str) -> Found | None:
    """What was found under that key; None if nothing was, or it cannot be read."""
    uri = items_uri(report, task, system)
    try:
        document = storage.read_json(_about(uri))
        if document["key"] != key:
            return None
        items = read_items(uri)
        shown = _with_images(document["shown"], document["images"])
    except (storage.MissingError, storage.UnreadableError, ConfigError, KeyError, TypeError, ValueError):
        return None
    return Found(items, document["candidates"], shown, document["diagnostics"], tuple(document["notes"]))


def read_items(uri: str) -> Items:
    """The items of a task and a system. Raises MissingError, and ValueError for a file that is none of ours."""
    table = pq.read_table(pa.BufferReader(storage.read_bytes(uri)), page_checksum_verification=True)
    columns = {name: table[name].to_numpy().astype(np.float64) for name in table.column_names if name not in RESERVED}
    clusters = table["cluster"].to_numpy().astype(np.int64) if "cluster" in table.column_names else None
    return Items(table["id"].to_pylist(), columns, clusters)


def data_digest(uri: str) -> str:
    """SHA-256 (hex) of the data that the items are of; empty where it is not known."""
    return str(storage.read_json(_about(uri)).get("data", ""))


def _about(items: str) -> str:
    return items.removesuffix(".parquet") + ".json"


def _images(shown: Shown) -> list[bytes | None]:
    images: list[bytes | None] = list(shown.space.images) if shown.space else []
    for example in shown.examples:
        images += [
            example.image,
            *(hit.image for hit in (*example.hits, *([example.wanted] if example.wanted else []))),
        ]
    return images


def _with_images(document: Mapping[str, Any], images: list[str | None]) -> Shown:
    """Pictures are no part of the reports' JSON, so they lie beside it, in the order in which they are met."""
    found = from_mapping(_Shown, document, source="kept")
    left = iter([None if text is None else base64.b64decode(text) for text in images])
    count = len(images) - sum(1 + len(each.hits) + (each.wanted is not None) for each in found.examples)
    space = found.space
    if space is not None and count:
        space = space.model_copy(update={"images": tuple(next(left) for _ in range(count))})
    examples = []
    for example in found.examples:
        image = next(left)
        hits = tuple(hit.model_copy(update={"image": next(left)}) for hit in example.hits)
        wanted = example.wanted and example.wanted.model_copy(update={"image": next(left)})
        examples.append(example.model_copy(update={"image": image, "hits": hits, "wanted": wanted}))
    return Shown(space, found.similarities, found.curves, found.confusion, tuple(examples))
