"""Corpus and model to an embeddings table: the same vectors as the model alone gives, in the corpus's order."""

from pathlib import Path
from typing import Any

import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rayemb.cluster import ClusterError
from rayemb.config import ConfigError
from rayemb.data import (
    Corpus,
    CorpusError,
    EmbedConfig,
    Embedded,
    EmbeddingsError,
    EmbeddingsTable,
    embed_corpus,
    encode_images,
)
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
) -> Embedded:
    return embed_corpus(str(place / "corpus"), str(place / model), str(place / table), config, **options)


@pytest.fixture(scope="module")
def made(place: Path, ray_cluster: str) -> Embedded:
    seen: list[tuple[int, int]] = []
    texts: list[str] = []

    def progress(done: int, total: int, text: str) -> None:
        seen.append((done, total))
        texts.append(text)

    made = embed(place, progress=progress)
    assert seen[-1] == (ROWS, ROWS)
    assert seen == sorted(seen)
    assert len(seen) == made.shards
    assert all(" rows/s, about " in text for text in texts[:-1])
    assert texts[-1].startswith("92 vectors, ")
    return made


@pytest.fixture(scope="module")
def table(made: Embedded) -> EmbeddingsTable:
    return made.table


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


def test_a_run_says_what_it_did(made: Embedded, place: Path) -> None:
    # Row groups of 3 (and a last one of 1) in files of 31, 40 and 9 rows; a shard may span files, but not splits.
    assert (made.rows, made.shards, made.resumed_rows, made.resumed_shards) == (ROWS, 5, 0, 0)
    assert made.rows_per_second == pytest.approx(ROWS / made.seconds)
    assert [f.count_rows() for f in made.table.dataset.get_fragments()] == [24, 25, 25, 6, 12]
    assert (made.table.what, made.table.set_aside) == ("image", {})
    assert sorted(path.name for path in place.glob("table.lance*")) == ["table.lance"]


def test_the_same_again_is_used_as_it_is(table: EmbeddingsTable, place: Path) -> None:
    again = embed(place, progress=lambda *_: pytest.fail("it was embedded again"))
    assert again.table.version == table.version
    assert (again.rows, again.shards, again.rows_per_second) == (0, 0, 0.0)


def test_another_model_makes_a_new_version_and_keeps_the_old(table: EmbeddingsTable, place: Path) -> None:
    tiny_model(seed=5).save(str(place / "other"))
    after = embed(place, model="other", config=ONE).table
    assert after.version > table.version
    assert after.model_digest == Model.load(str(place / "other")).digest
    assert after.rows == ROWS
    old = EmbeddingsTable.open(table.uri, table.version)
    assert old.model_digest == table.model_digest
    assert np.array_equal(old.vectors(0, ROWS), table.vectors(0, ROWS))
    assert not np.allclose(old.vectors(0, ROWS), after.vectors(0, ROWS))


def test_the_texts_of_one_split_without_images(place: Path) -> None:
    config = ONE.model_copy(update={"splits": ["val"], "keep_images": False, "what": "text"})
    made = embed(place, "val.lance", config=config).table
    assert made.rows == 12
    assert not made.has_images
    assert made.what == "text"
    assert made.columns(0, 12, ["id"])["id"].to_pylist() == [f"row-{n}" for n in range(80, 92)]
    expected = Model.load(str(place / "model")).embed_texts([f"text {n}" for n in range(80, 92)])
    np.testing.assert_allclose(made.vectors(0, 12), expected, atol=2e-6)


def test_the_queries_of_text_pairs(place: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", {"train": [10, 9]}, group_rows=4, pairs=True)
    config = ONE.model_copy(update={"what": "query"})
    made = embed_corpus(str(tmp_path / "corpus"), str(place / "model"), str(tmp_path / "t.lance"), config).table
    assert made.payload_columns == ["query", "text", "concept", "style", "license", "split"]
    assert not made.has_images
    columns = made.columns(0, 19, ["id", "query", "text"]).to_pydict()
    assert columns["query"] == [f"query {n}" for n in range(19)]
    assert columns["text"] == [f"text {n}" for n in range(19)]
    expected = Model.load(str(place / "model")).embed_texts(columns["query"])
    np.testing.assert_allclose(made.vectors(0, 19), expected, atol=2e-6)
    with pytest.raises(ConfigError, match="a text_pair corpus has no image to embed"):
        embed_corpus(
            str(tmp_path / "corpus"),
            str(place / "model"),
            str(tmp_path / "t.lance"),
            ONE.model_copy(update={"what": "image"}),
        )


def test_the_number_of_workers_and_the_batch_do_not_matter(table: EmbeddingsTable, place: Path) -> None:
    other = embed(place, "other-batches.lance", config=ONE).table
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


def test_somebody_elses_table_is_left_alone(place: Path, tmp_path: Path) -> None:
    lance.write_dataset(pa.table({"id": ["a"]}), str(tmp_path / "t.lance"))
    with pytest.raises(EmbeddingsError, match="does not name its model"):
        embed_corpus(str(place / "corpus"), str(place / "model"), str(tmp_path / "t.lance"), ONE)
    assert lance.dataset(str(tmp_path / "t.lance")).version == 1


def change(shard: Path, rows: dict[int, bytes | None], group_rows: int) -> None:
    """Puts other images into rows of a shard."""
    table = pq.read_table(shard)
    images = table["image"].to_pylist()
    for row, image in rows.items():
        images[row] = image
    table = table.set_column(table.schema.get_field_index("image"), table.schema.field("image"), [images])
    pq.write_table(table, shard, row_group_size=group_rows, compression="zstd", write_page_checksum=True)


def test_bad_rows_are_set_aside_and_too_many_of_them_stop_the_job(place: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", {"train": [20, 20, 10]}, group_rows=5)
    first, second, third = (tmp_path / f"corpus/split=train/shard-{n:05d}.parquet" for n in range(3))
    change(first, {3: b"not an image", 7: None}, 5)
    corrupt(second, 2)
    third.write_bytes(third.read_bytes()[:-9])  # cut off: its footer is gone
    uris = [str(tmp_path / "corpus"), str(place / "model"), str(tmp_path / "t.lance")]
    config = CONFIG.model_copy(update={"rows_per_file": 10})

    with pytest.raises(EmbeddingsError, match="of 50 rows cannot be embedded") as caught:
        embed_corpus(*uris, config)
    assert "t.lance.quarantine" in caught.value.fix
    with pytest.raises(EmbeddingsError, match="no such embeddings table"):
        EmbeddingsTable.open(uris[2])

    made = embed_corpus(*uris, config.model_copy(update={"max_bad_fraction": 0.34}))
    assert made.resumed_shards >= 1
    assert made.resumed_shards + made.shards == 5
    good = [n for n in range(40) if n not in (3, 7, *range(30, 35))]
    assert made.table.columns(0, 33, ["id"])["id"].to_pylist() == [f"row-{n}" for n in good]
    assert made.table.set_aside == {
        "unreadable_image": 1,
        "missing_image": 1,
        "corrupt_row_group": 5,
        "corrupt_file": 10,
    }
    images = made.table.columns(0, 33, ["image"])["image"].to_pylist()
    expected = Model.load(str(place / "model")).embed_images(images)
    np.testing.assert_allclose(made.table.vectors(0, 33), expected, atol=2e-6)

    quarantine = pq.read_table(tmp_path / "t.lance.quarantine").sort_by("source").to_pylist()
    places = [(Path(row["source"]), row["row_group"], row["row"], row["rows"], row["id"]) for row in quarantine]
    assert places == [
        (first, 0, 3, 1, "row-3"),
        (first, 1, 2, 1, "row-7"),
        (second, 2, None, 5, None),
        (third, None, None, 10, None),
    ]
    assert {row["split"] for row in quarantine} == {"train"}
    assert "row group 2 is corrupt" in quarantine[2]["what"]


def test_a_missing_shard_is_no_bad_row(place: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "corpus", {"train": [20, 20]})
    (tmp_path / "corpus/split=train/shard-00001.parquet").unlink()
    config = ONE.model_copy(update={"max_bad_fraction": 1.0})
    with pytest.raises(CorpusError, match="the shard is missing"):
        embed_corpus(str(tmp_path / "corpus"), str(place / "model"), str(tmp_path / "t.lance"), config)


def test_two_models_over_the_same_pixels_in_order(place: Path) -> None:
    tiny_model(seed=7).save(str(place / "second"))
    corpus = Corpus.open(str(place / "corpus"))
    uris = [str(place / "model"), str(place / "second")]
    groups = {split: corpus.row_groups(split) for split in ("val", "train")}
    dataset = encode_images(groups, uris, CONFIG, keep=("split", "id"), image_size=16, limits=corpus.image_limits)
    table = pa.concat_tables(dataset.iter_batches(batch_size=None, batch_format="pyarrow"))
    assert table["id"].to_pylist() == [f"row-{n}" for n in [*range(80, 92), *range(80)]]
    assert table["split"].to_pylist() == ["val"] * 12 + ["train"] * 80
    images = corpus.column("val", "image") + corpus.column("train", "image")
    for uri, name in zip(uris, ("vector", "vector_1"), strict=True):
        vectors = np.array(table[name].to_pylist())
        np.testing.assert_allclose(vectors, Model.load(uri).embed_images(images), atol=2e-6)
