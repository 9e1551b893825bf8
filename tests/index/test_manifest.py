import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pydantic
import pytest

from rayemb.index import MANIFEST, Effort, IndexArtefactError, Manifest, QueryError, load_manifest
from rayemb.index.manifest import publish_manifest

DOCUMENT: dict[str, Any] = {
    "format": 2,
    "created": "2025-01-01T00:00:00+00:00",
    "model_digest": "ab" * 32,
    "embeddings": {"uri": "/tables/e", "version": 3, "rows": 10},
    "metric": "inner_product",
    "dim": 4,
    "factory": "Flat",
    "prefix": None,
    "effort": {"nprobe": 16, "ef_search": 64, "rerank": 4},
    "updates": 0,
    "origin": None,
    "sharding": {"by": "rows", "cells": []},
    "trained": {"file": "v-1/trained.faiss", "bytes": 1, "sha256": "22"},
    "shards": [
        {"file": "v-1/a.faiss", "bytes": 1, "sha256": "00", "rows": 4, "start": 0, "keys": None},
        {"file": "v-1/b.faiss", "bytes": 1, "sha256": "11", "rows": 6, "start": 4, "keys": None},
    ],
    "words": None,
    "build": {"seconds": 1.5, "train_rows": 0, "seed": 0, "faiss": "1.15.1"},
    "recall": {"k": 10, "queries": 9, "recall": 0.9},
    "curve": [
        {"effort": {"nprobe": 4, "ef_search": 64, "rerank": 4}, "recall": 0.7, "ms": 0.1},
        {"effort": {"nprobe": 16, "ef_search": 64, "rerank": 4}, "recall": 0.9, "ms": 0.3},
    ],
}


def test_what_is_published_is_what_is_loaded(tmp_path: Path) -> None:
    manifest = publish_manifest(str(tmp_path), Manifest.model_validate(DOCUMENT))
    loaded = load_manifest(str(tmp_path))
    assert loaded.model_dump() == manifest.model_dump()
    assert loaded.model_dump(mode="json") == DOCUMENT
    data = (tmp_path / MANIFEST).read_bytes()
    assert manifest.version == loaded.version == hashlib.sha256(data).hexdigest()[:12]
    assert b'version": "' not in data  # a file cannot hold its own digest


def test_the_version_is_of_the_bytes_as_they_lie_there(tmp_path: Path) -> None:
    data = json.dumps(DOCUMENT, separators=(",", ":")).encode()
    (tmp_path / MANIFEST).write_bytes(data)
    loaded = load_manifest(str(tmp_path))
    assert loaded.version == hashlib.sha256(data).hexdigest()[:12]
    assert pickle.loads(pickle.dumps(loaded)).version == loaded.version


def test_a_manifest_is_frozen() -> None:
    with pytest.raises(pydantic.ValidationError):
        Manifest.model_validate(DOCUMENT).dim = 3  # type: ignore[misc]


def test_a_missing_manifest_says_that_there_is_no_index(tmp_path: Path) -> None:
    with pytest.raises(IndexArtefactError, match="there is no index here") as caught:
        load_manifest(str(tmp_path))
    assert caught.value.where == str(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 1}, "format 1 and this rayemb reads 2"),
        ({"sharding": {"by": "hash"}}, "v-1/a.faiss does not begin"),
        ({"sharding": {"by": "rows", "cells": [0, 2]}}, "names a shard beyond the 2"),
        ({"shards": [{**DOCUMENT["shards"][0], "start": None}]}, "either `start` or `keys`"),
        ({"effort": {"nprobe": 0}}, "effort.nprobe: must be at least 1"),
        ({"dim": None}, "dim"),
        ({"shards": DOCUMENT["shards"][:1]}, "the shards hold 4 rows and the embeddings 10"),
        ({"shards": DOCUMENT["shards"][::-1]}, "v-1/b.faiss does not begin at row 0"),
        ({"shards": []}, "shards"),
    ],
)
def test_a_manifest_that_is_not_whole_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    (tmp_path / MANIFEST).write_text(json.dumps({**DOCUMENT, **change}))
    with pytest.raises(IndexArtefactError, match=message):
        load_manifest(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_what_is_no_manifest_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / MANIFEST).write_bytes(text.encode("latin-1"))
    with pytest.raises(IndexArtefactError, match=r"manifest\.json"):
        load_manifest(str(tmp_path))


def test_a_routing_table_takes_a_line() -> None:
    listed = [{"file": f"{i}.faiss", "bytes": 1, "sha256": "", "rows": 5, "keys": DOCUMENT["trained"]} for i in "ab"]
    cells = [i % 2 for i in range(300)]
    manifest = Manifest.model_validate({**DOCUMENT, "sharding": {"by": "cell", "cells": cells}, "shards": listed})
    data = manifest.to_bytes()
    assert max(len(line) for line in data.splitlines()) > 600
    assert Manifest.from_bytes(data).sharding.cells == tuple(cells)


def test_a_recall_asked_for_is_the_cheapest_effort_that_reached_it() -> None:
    manifest = Manifest.model_validate(DOCUMENT)
    assert manifest.chosen_effort(None, 0.5) == manifest.chosen_effort(None, 0.7) == Effort(nprobe=4)
    assert manifest.chosen_effort(None, 0.71) == Effort(nprobe=16)
    with pytest.raises(QueryError, match=r"reaches 0\.95; the best is 0\.9"):
        manifest.chosen_effort(None, 0.95)
    with pytest.raises(QueryError, match="was not measured"):
        manifest.model_copy(update={"curve": ()}).chosen_effort(None, 0.1)
