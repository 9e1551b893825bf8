"""The map of an index: a faithful picture of a sample, of one version, beside it."""

import json
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors
from typer.testing import CliRunner

from rayemb.cli import app
from rayemb.index import IndexArtefactError, IndexConfig, MapConfig, build_map, load_manifest, load_map
from rayemb.index.manifest import publish_manifest
from rayemb.index.map import map_uri
from tests.index.tables import build_here, random_vectors, write_table

ROWS = 120


def make(folder: Path, rows: int = ROWS, dim: int = 16) -> str:
    """An index over three bundles of vectors, far from each other."""
    rng = np.random.default_rng(1)
    vectors = random_vectors(3, dim)[np.arange(rows) % 3] + rng.normal(0, 0.05, (rows, dim))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    moments = [datetime(2026, 1, 1 + row % 28, tzinfo=UTC) if row else None for row in range(rows)]
    payload = {
        "bundle": pa.array([f"bundle {row % 3}" for row in range(rows)]).dictionary_encode(),
        "long": ["ä" * (60 + row) for row in range(rows)],
        "price": pa.array([float("nan") if row == 1 else row / 3 for row in range(rows)], pa.float32()),
        "added": pa.array(moments, pa.timestamp("ns", "UTC")),
        "tags": [["a"]] * rows,
    }
    write_table(folder / "embeddings.lance", vectors, payload)
    build_here(str(folder / "embeddings.lance"), folder / "index", IndexConfig(factory="Flat", shards=2))
    return str(folder / "index")


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make(tmp_path_factory.mktemp("map"))


def test_umap_keeps_bundles_apart_and_the_command_makes_it(index: str, tmp_path: Path) -> None:
    pytest.importorskip("umap", reason="umap-learn is not installed")
    done = CliRunner().invoke(app, ["index", "map", f"artefacts.index={index}", "index.map.rows=90", "--json"])
    assert done.exit_code == 0, done.output
    manifest = load_manifest(index)
    told = json.loads(done.stdout)
    assert (told["points"], told["rows"], told["method"], told["index_version"]) == (90, ROWS, "umap", manifest.version)
    found = load_map(index, manifest)
    assert found is not None
    at, bundles = np.column_stack((found.x, found.y)), np.array(found.columns["bundle"])
    assert at.min() >= 0
    assert at.max() <= 1
    assert np.isclose((at.max(axis=0) - at.min(axis=0)).max(), 1, atol=1e-3)
    # Nearest points are of the same bundle, each row is what the table says, and few were left out.
    _, near = NearestNeighbors(n_neighbors=6).fit(at).kneighbors(at)
    assert (bundles[near[:, 1:]] == bundles[:, None]).mean() > 0.98
    numbers = [int(each.removeprefix("item-")) for each in found.ids]
    assert len(set(numbers)) == 90
    assert [f"bundle {row % 3}" for row in numbers] == bundles.tolist()


def test_principal_components_are_those_of_scikit_learn(index: str) -> None:
    found = build_map(index, MapConfig(method="pca", rows=10_000))
    manifest = load_manifest(index)
    assert load_map(index, manifest) == found
    assert (len(found.ids), found.method, found.rows) == (ROWS, "pca", ROWS)
    rows = [int(each.removeprefix("item-")) for each in found.ids]
    rng = np.random.default_rng(1)
    vectors = random_vectors(3)[np.arange(ROWS) % 3] + rng.normal(0, 0.05, (ROWS, 16))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)[rows]
    expected = PCA(2).fit_transform(vectors)
    ours = np.column_stack((found.x, found.y)) - 0.5
    for axis in (0, 1):
        assert abs(np.corrcoef(ours[:, axis], expected[:, axis])[0, 1]) > 0.9999
    # One scale for both axes.
    assert np.isclose(
        np.ptp(ours[:, 1]) / np.ptp(ours[:, 0]), np.ptp(expected[:, 1]) / np.ptp(expected[:, 0]), rtol=1e-3
    )
    assert set(found.columns) == {"bundle", "long", "price", "added"}
    by_row = {row: {name: values[i] for name, values in found.columns.items()} for i, row in enumerate(rows)}
    assert by_row[0]["added"] is None
    assert by_row[5]["added"] == "2026-01-06T00:00:00+00:00"
    assert by_row[1]["price"] is None
    assert by_row[7]["price"] == pytest.approx(7 / 3, rel=1e-6)
    assert by_row[100]["long"] == "ä" * 80


def test_a_map_of_another_version_is_never_given(tmp_path: Path) -> None:
    index = make(tmp_path, rows=30)
    old = load_manifest(index)
    assert load_map(index, old) is None
    build_map(index, MapConfig(method="pca"))
    new = publish_manifest(index, old.model_copy(update={"updates": 1}))
    new = load_manifest(index)
    assert new.version != old.version
    assert load_map(index, new) is None
    assert load_map(index, old) is not None
    # Not even under its name; and what is no map is said to be none.
    path = Path(map_uri(index, new))
    path.write_bytes(Path(map_uri(index, old)).read_bytes())
    with pytest.raises(IndexArtefactError, match=old.version):
        load_map(index, new)
    document = json.loads(path.read_text()) | {"index_version": new.version}
    document["x"].pop()
    for text in (json.dumps(document), "{", "[]"):
        path.write_text(text)
        with pytest.raises(IndexArtefactError, match="no map"):
            load_map(index, new)


@pytest.mark.parametrize(("rows", "dim"), [(2, 16), (5, 1), (15, 4)])
def test_a_few_rows_have_a_map(tmp_path: Path, rows: int, dim: int) -> None:
    pytest.importorskip("umap", reason="umap-learn is not installed")
    vectors = np.ones((rows, dim), np.float32) if dim == 1 else random_vectors(rows, dim)
    write_table(tmp_path / "embeddings.lance", vectors)
    build_here(str(tmp_path / "embeddings.lance"), tmp_path / "index", IndexConfig(factory="Flat", shards=1))
    found = build_map(str(tmp_path / "index"))
    assert (found.method, len(found.ids)) == ("pca", rows)
    assert all(0 <= each <= 1 for each in (*found.x, *found.y))
