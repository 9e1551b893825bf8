import hashlib
import json
import pickle
from pathlib import Path
from typing import Any

import pydantic
import pytest

from rayemb.index import MANIFEST, IndexArtefactError, Manifest, load_manifest
from rayemb.index.manifest import publish_manifest

DOCUMENT: dict[str, Any] = {
    "format": 1,
    "created": "2025-01-01T00:00:00+00:00",
    "model_digest": "ab" * 32,
    "embeddings": {"uri": "/tables/e", "version": 3, "rows": 10},
    "metric": "inner_product",
    "dim": 4,
    "factory": "Flat",
    "nprobe": 16,
    "ef_search": 64,
    "shards": [
        {"file": "v-1/a.faiss", "start": 0, "stop": 4, "rows": 4, "bytes": 1, "sha256": "00"},
        {"file": "v-1/b.faiss", "start": 4, "stop": 10, "rows": 6, "bytes": 1, "sha256": "11"},
    ],
    "build": {"seconds": 1.5, "train_rows": 0, "faiss": "1.15.1"},
    "recall": None,
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
        ({"format": 2}, "format 2 and this rayemb reads 1"),
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
