"""Corpus and model to an embeddings table: the same vectors as the model alone gives, in the corpus's order."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rayemb.cluster import ClusterError
from rayemb.data import Corpus, CorpusError, EmbedConfig, EmbeddingsTable, embed_corpus
from rayemb.models import Model, ModelError
from tests.data.corpora import corrupt, write_corpus
from tests.models.tiny import tiny_model

pytestmark = pytest.mark.usefixtures("ray_cluster")

CONFIG = EmbedConfig(batch_size=16, workers=2, cpus_per_worker=0.5, rows_per_file=25)
ONE = EmbedConfig(batch_size=7, workers=1, cpus_per_worker=0.5, rows_per_file=1000)
SHARDS = {"train": [31, 40, 9], "val": [12]}
ROWS = 92


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("embed")
    write_corpus(root / "corpus", SHARDS, group_rows=3)
    tiny_model().save(str(root / "model"))
    return root


def embed(
    place: Path, table: str = "table.lance", model: str = "model", config: EmbedConfig = CONFIG, **options: Any
) -> EmbeddingsTable:
    return embed_corpus(str(place / "corpus"), str(place / model), str(place / table), config, **options)


@pytest.fixture(scope="module")
def table(place: Path, ray_cluster: str) -> EmbeddingsTable:
    seen: list[tuple[int, int]] = []
    made = embed(place, progress=lambda done, total, _: seen.append((done, total)))
    assert seen[-1] == (ROWS, ROWS)
    assert seen == sorted(seen)
    return made


def test_the_rows_are_the_corpus_in_its_order(table: EmbeddingsTable, place: Path) -> None:
    corpus = Corpus.open(str(place / "corpus"))
    columns = table.columns(0, ROWS, ["id", "image", "text", "concept", "style", "license", "split"]).to_pydict()
    for name in ("id", "image", "text", "concept", "style", "license"):
        assert columns[name] == corpus.column("train", name) + corpus.column("val", name)
    assert columns["split"] == ["train"] * 80 + ["val"] * 12


def test_the_vectors_are_what_the_model_gives(table: EmbeddingsTable, place: Path) -> None:
    images = table.columns(0, ROWS, ["image"])["image"].to_pylist()
    expected = Model.load(str(place / "model")).embed_images(images)
    vectors = table.vectors(0, ROWS)
    # Batches of other sizes add up in another order: equal to float32's rounding, not to the bit.
    np.testing.assert_allclose(vectors, expected, atol=2e-6)
    assert len(np.unique(vectors.round(4), axis=0)) > 80  # the pictures differ, and so must their vectors


def test_the_table_names_its_model(table: EmbeddingsTable, place: Path) -> None:
    assert table.model_digest == Model.load(str(place / "model")).digest
    assert table.dim == 8
    assert table.payload_columns == ["text", "concept", "style", "license", "split"]


def test_the_same_again_is_used_as_it_is(table: EmbeddingsTable, place: Path) -> None:
    again = embed(place, progress=lambda *_: pytest.fail("it was embedded again"))
    assert again.version == table.version


def test_another_model_makes_a_new_version_and_keeps_the_old(table: EmbeddingsTable, place: Path) -> None:
    tiny_model(seed=5).save(str(place / "other"))
    after = embed(place, model="other", config=ONE)
    assert after.version > table.version
    assert after.model_digest == Model.load(str(place / "other")).digest
    assert after.rows == ROWS
    old = EmbeddingsTable.open(table.uri, table.version)
    assert old.model_digest == table.model_digest
    assert np.array_equal(old.vectors(0, ROWS), table.vectors(0, ROWS))
    assert not np.allclose(old.vectors(0, ROWS), after.vectors(0, ROWS))


def test_one_split_without_images(place: Path) -> None:
    config = ONE.model_copy(update={"splits": ["val"], "keep_images": False})
    made = embed(place, "val.lance", config=config)
    assert made.rows == 12
    assert not made.has_images
    assert made.columns(0, 12, ["id"])["id"].to_pylist() == [f"row-{n}" for n in range(80, 92)]


def test_the_number_of_workers_and_the_batch_do_not_matter(table: EmbeddingsTable, place: Path) -> None:
    other = embed(place, "other-batches.lance", config=ONE)
    assert other.columns(0, ROWS, ["id"]) == table.columns(0, ROWS, ["id"])
    np.testing.assert_allclose(other.vectors(0, ROWS), table.vectors(0, ROWS), atol=2e-6)


def test_errors_come_before_any_work(place: Path, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="no split 'test'"):
        embed(place, "none.lance", config=CONFIG.model_copy(update={"splits": ["test"]}))
    with pytest.raises(CorpusError, match="no corpus here"):
        embed_corpus(str(tmp_path), str(place / "model"), str(tmp_path / "t"), CONFIG)
    with pytest.raises(ModelError, match="no model here"):
        embed_corpus(str(place / "corpus"), str(tmp_path), str(tmp_path / "t"), CONFIG)
    with pytest.raises(ClusterError, match="CPUs and the cluster has"):
        embed(place, "none.lance", config=CONFIG.model_copy(update={"workers": 500}))
    assert not (place / "none.lance").exists()
    assert not (tmp_path / "t").exists()


def test_a_corrupt_shard_publishes_nothing(place: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", {"train": [20]}, group_rows=20)
    corrupt(tmp_path / "corpus/split=train/shard-00000.parquet", 0)
    with pytest.raises(Exception, match="row group 0 is corrupt"):
        embed_corpus(str(tmp_path / "corpus"), str(place / "model"), str(tmp_path / "t.lance"), ONE)
    with pytest.raises(ValueError, match="no such embeddings table"):
        EmbeddingsTable.open(str(tmp_path / "t.lance"))
