"""Clusters and neighbours beside a corpus, as samplers read them."""

from pathlib import Path

import numpy as np
import pytest

from rayemb.config import ConfigError, load
from rayemb.data import Corpus, CorpusError
from rayemb.data.attributes import Attributes
from rayemb.index import IndexArtefactError, IndexConfig, build_index
from rayemb.index.attributes import AttributesConfig, cluster_attributes, neighbour_attributes
from tests.data.corpora import write_corpus

from .tables import random_vectors, write_table

SPLITS = {"val": 30, "train": 90}


@pytest.fixture(scope="module")
def made(ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Corpus, str, str, np.ndarray]:
    folder = tmp_path_factory.mktemp("attributes")
    corpus = write_corpus(folder / "corpus", {name: [rows] for name, rows in SPLITS.items()})
    vectors = random_vectors(120)
    splits = [name for name, rows in SPLITS.items() for _ in range(rows)]
    table = write_table(folder / "embeddings", vectors, {"split": splits}, ids=[f"row-{n}" for n in range(120)])
    build_index(table, str(folder / "index"), IndexConfig(factory="Flat", shards=2))
    return corpus, table, str(folder / "index"), vectors


def read(uri: str, corpus: Corpus, column: str) -> np.ndarray:
    attributes = Attributes(uri, corpus, "train")
    return np.concatenate([attributes.read(group, column) for group in corpus.row_groups("train")])


def test_neighbours_are_those_of_brute_force_among_the_splits_own_rows(
    made: tuple[Corpus, str, str, np.ndarray], tmp_path: Path
) -> None:
    corpus, _, index, vectors = made
    config = AttributesConfig(first_rank=3, last_rank=7, rows_per_task=40)
    found = read(neighbour_attributes(corpus.uri, index, f"{tmp_path}/n.parquet", config), corpus, "neighbours")
    own = vectors[SPLITS["val"] :]
    similar = own @ own.T
    np.fill_diagonal(similar, -np.inf)
    assert np.array_equal(found, np.argsort(-similar, axis=1)[:, 2:7])


def test_more_ranks_than_rows_are_padded(made: tuple[Corpus, str, str, np.ndarray], tmp_path: Path) -> None:
    corpus, _, index, _ = made
    config = AttributesConfig(last_rank=100)
    found = read(neighbour_attributes(corpus.uri, index, f"{tmp_path}/n.parquet", config), corpus, "neighbours")
    assert found.shape == (90, 100)
    assert np.all(found[:, 89:] == -1)
    assert all(sorted(row[:89]) == [n for n in range(90) if n != own] for own, row in enumerate(found))


def test_clusters_are_nearest_centroids_and_the_seed_decides_them(
    made: tuple[Corpus, str, str, np.ndarray], tmp_path: Path
) -> None:
    corpus, table, _, vectors = made
    runs = [
        read(cluster_attributes(corpus.uri, table, f"{tmp_path}/{n}.parquet", config), corpus, "cluster")
        for n, config in enumerate(AttributesConfig(clusters=6, rows_per_task=rows) for rows in (90, 17))
    ]
    assert np.array_equal(runs[0], runs[1])
    assert set(runs[0]) == set(range(6))
    own = vectors[SPLITS["val"] :]
    within = np.mean([own[runs[0] == c].mean(0) @ own[runs[0] == c].mean(0) for c in range(6)])
    shuffled = np.random.default_rng(0).permutation(runs[0])
    assert within > 2 * np.mean([own[shuffled == c].mean(0) @ own[shuffled == c].mean(0) for c in range(6)])


def test_what_does_not_fit_is_named(made: tuple[Corpus, str, str, np.ndarray], tmp_path: Path) -> None:
    corpus, _, index, _ = made
    with pytest.raises(IndexArtefactError, match="no row of split 'test'"):
        neighbour_attributes(corpus.uri, index, f"{tmp_path}/n.parquet", AttributesConfig(split="test"))
    other = write_corpus(tmp_path / "other", {"val": [30], "train": [80]})
    with pytest.raises(CorpusError, match="not for the rows of split 'train'"):
        neighbour_attributes(other.uri, index, f"{tmp_path}/n.parquet", AttributesConfig())
    with pytest.raises(ConfigError, match=r"first_rank \(9\) is after last_rank \(3\)"):
        load(AttributesConfig, None, ["first_rank=9", "last_rank=3"])
