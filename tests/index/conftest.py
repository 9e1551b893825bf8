"""One index for the tests that only read: built once, copied by those that damage it."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from rayemb.index import IndexConfig, Manifest, build_index

from .tables import exact_vectors, write_table

ROWS = 1000


@dataclass(frozen=True)
class Built:
    """An index of three shards over `vectors`, whose inner products are full of ties."""

    uri: str
    embeddings: str
    vectors: NDArray[np.float32]
    manifest: Manifest

    def copy(self, folder: Path) -> "Built":
        shutil.copytree(self.uri, folder / "copy")
        return Built(str(folder / "copy"), self.embeddings, self.vectors, self.manifest)

    def shard_path(self, i: int) -> Path:
        return Path(self.uri) / self.manifest.shards[i].file


def payload_of(row: int) -> dict[str, object]:
    return {"group": f"g{row % 100}", "parity": row % 2, "price": row / 4, "sold": row % 3 == 0}


@pytest.fixture(scope="session")
def flat(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Built:
    folder = tmp_path_factory.mktemp("flat")
    vectors = exact_vectors(ROWS)
    rows = [payload_of(row) for row in range(ROWS)]
    payload = {name: [row[name] for row in rows] for name in rows[0]}
    images = [f"image {row}".encode() if row != 7 else None for row in range(ROWS)]
    embeddings = write_table(folder / "embeddings", vectors, payload, images=images)
    config = IndexConfig(factory="Flat", shards=3, recall_queries=50)
    manifest = build_index(embeddings, str(folder / "index"), config)
    return Built(str(folder / "index"), embeddings, vectors, manifest)
