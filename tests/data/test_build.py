"""The builder: every row of the source ends up in a shard or, counted by reason, in the quarantine."""

import hashlib
import io
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import ray
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rayemb.config import from_mapping
from rayemb.data import Corpus, CorpusConfig, CorpusError, build_corpus
from rayemb.data.build import _SPLIT, _clear
from rayemb.data.sources import SourceError
from tests.data.corpora import corrupt, png

pytestmark = pytest.mark.usefixtures("ray_cluster")

BAD: list[tuple[str, dict[str, Any]]] = [
    ("unreadable_image", {"image": b"not an image"}),
    ("truncated_image", {"image": None}),  # filled in below
    ("empty_image", {"image": b""}),
    ("missing_image", {"image": None}),
    ("empty_text", {"text": ""}),
    ("empty_text", {"text": " \n\t"}),
    ("empty_text", {"text": None}),
    ("long_text", {"text": "x" * 101}),
    ("too_large_image", {"image": png(3, size=41)}),
    ("missing_id", {"id": None}),
    ("bad_split", {"split": "../../up"}),
    ("duplicate_id", {"id": "good-3"}),
    ("duplicate_id", {"id": "good-3"}),
    ("duplicate_id", {"id": "good-12"}),
]
GOOD = 40
CONFIG = {
    "max_bad_fraction": 0.5,
    "max_text_chars": 100,
    "image_limits": {"max_pixels": 1600},
    "row_group_rows": 4,
    "test_fraction": 0.45,
}


def source_rows() -> list[dict[str, Any]]:
    """Good rows first, a bad one after every second of the later ones."""
    good = [
        {"id": f"good-{n}", "image": png(n), "text": f"  text {n} ", "kind": f"kind {n % 20}", "split": None}
        for n in range(GOOD)
    ]
    rows = good[: GOOD - len(BAD)]
    for number, (row, (reason, change)) in enumerate(zip(good[GOOD - len(BAD) :], BAD, strict=True)):
        bad = {
            "id": f"bad-{number}",
            "image": png(1000 + number),
            "text": "bad",
            "kind": "kind 1",
            "split": None,
            **change,
        }
        if reason == "truncated_image":
            bad["image"] = jpeg_cut_short()
        rows += [row, bad]
    return rows


def jpeg_cut_short() -> bytes:
    out = io.BytesIO()
    Image.effect_noise((30, 30), 80).save(out, "JPEG")
    return out.getvalue()[:-200]


def write_source(folder: Path, rows: list[dict[str, Any]], files: int = 2, group_rows: int = 15) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    per_file = -(-len(rows) // files)
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("image", pa.binary()),
            ("text", pa.string()),
            ("kind", pa.string()),
            ("split", pa.string()),
        ]
    )
    for number in range(files):
        part = rows[number * per_file : (number + 1) * per_file]
        pq.write_table(pa.Table.from_pylist(part, schema), folder / f"{number}.parquet", row_group_size=group_rows)


def config_for(folder: Path, **changes: Any) -> CorpusConfig:
    source = {"name": "parquet", "uri": str(folder), "columns": {"concept": "kind", "split": "split"}}
    return from_mapping(CorpusConfig, {"source": source, **CONFIG, **changes})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "rows"
    write_source(folder, source_rows())
    return folder


@pytest.fixture(scope="module")
def built(source: Path, ray_cluster: str, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    seen: list[tuple[int, int]] = []
    corpus = build_corpus(
        config_for(source),
        str(tmp_path_factory.mktemp("built") / "corpus"),
        progress=lambda done, total, _: seen.append((done, total)),
    )
    assert [done for done, _ in seen] == list(range(1, seen[0][1] + 1))
    return corpus


def shard_rows(corpus: Corpus) -> dict[str, dict[str, Any]]:
    rows = {}
    for name, split in corpus.manifest["splits"].items():
        for entry in split["files"]:
            for row in pq.ParquetFile(Path(corpus.uri) / entry["file"]).read().to_pylist():
                assert row["id"] not in rows
                rows[row["id"]] = {**row, "split": name}
    return rows


def test_every_good_row_is_there_once_with_its_content(built: Corpus) -> None:
    rows = shard_rows(built)
    assert set(rows) == {f"good-{n}" for n in range(GOOD)}
    for n in range(GOOD):
        row = rows[f"good-{n}"]
        assert row["image"] == png(n)
        assert (row["text"], row["texts"], row["concept"]) == (f"text {n}", [f"text {n}"], f"kind {n % 20}")


def test_bad_rows_are_counted_by_reason(built: Corpus) -> None:
    quarantine = built.manifest["quarantine"]
    assert quarantine["reasons"] == dict(Counter(reason for reason, _ in BAD))
    assert quarantine["rows"] == len(BAD)
    assert built.manifest["rows"] == GOOD


def test_bad_rows_are_found_in_the_quarantine_with_their_place(built: Corpus, source: Path) -> None:
    files = sorted((Path(built.uri) / "_quarantine").glob("*.parquet"))
    found = [row for file in files for row in pq.read_table(file).to_pylist()]
    assert Counter(row["reason"] for row in found) == Counter(reason for reason, _ in BAD)
    for row in found:
        assert row["what"]
        if row["reason"] == "duplicate_id":
            assert row["id"] in ("good-3", "good-12")
            assert (Path(built.uri) / row["source"]).exists()
            continue
        file, _, number = row["source"].rpartition(" row ")
        original = pq.read_table(file).to_pylist()[int(number)]
        assert (original["id"] or "") == row["id"]


def test_of_duplicates_the_first_stays(built: Corpus) -> None:
    rows = shard_rows(built)
    assert rows["good-3"]["image"] == png(3)
    assert rows["good-12"]["text"] == "text 12"


def test_the_manifest_tells_what_is_on_disk(built: Corpus) -> None:
    for split in built.manifest["splits"].values():
        assert split["rows"] == sum(entry["rows"] for entry in split["files"])
        for entry in split["files"]:
            path = Path(built.uri) / entry["file"]
            assert hashlib.sha256(path.read_bytes()).hexdigest() == entry["sha256"]
            parquet = pq.ParquetFile(path)
            assert parquet.metadata.num_rows == entry["rows"] > 0
            assert max(parquet.metadata.row_group(g).num_rows for g in range(parquet.num_row_groups)) <= 4
    built.verify()


def test_a_concept_is_on_one_side(built: Corpus) -> None:
    sides: dict[str, set[str]] = {}
    for row in shard_rows(built).values():
        sides.setdefault(row["concept"], set()).add(row["split"])
    assert all(len(splits) == 1 for splits in sides.values())
    assert len(built.splits) > 1


def test_others_read_the_folder_without_the_quarantine(built: Corpus) -> None:
    table = pyarrow.dataset.dataset(built.uri, partitioning="hive", exclude_invalid_files=True).to_table()
    assert table.num_rows == GOOD
    assert set(table["split"].to_pylist()) == set(built.splits)


def test_the_same_config_is_used_as_it_is(built: Corpus, source: Path) -> None:
    def times() -> dict[str, int]:
        return {str(path): path.stat().st_mtime_ns for path in Path(built.uri).rglob("*") if path.is_file()}

    before = times()
    again = build_corpus(config_for(source), built.uri, progress=lambda *_: pytest.fail("it was built again"))
    assert again.digest == built.digest
    assert times() == before


def test_the_same_config_at_another_place_gives_the_same_corpus(built: Corpus, source: Path, tmp_path: Path) -> None:
    again = build_corpus(config_for(source), str(tmp_path / "again"))
    assert again.digest == built.digest
    assert again.manifest["splits"] == built.manifest["splits"]


def test_another_config_at_the_same_place_is_refused(built: Corpus, source: Path) -> None:
    with pytest.raises(CorpusError, match="another corpus is already here") as caught:
        build_corpus(config_for(source, seed=1), built.uri)
    assert caught.value.where == built.uri
    assert Corpus.open(built.uri).digest == built.digest


def test_too_many_bad_rows_are_an_error_that_names_the_reasons(source: Path, tmp_path: Path) -> None:
    place = tmp_path / "corpus"
    with pytest.raises(CorpusError, match=rf"{len(BAD)} of {GOOD + len(BAD)} rows are bad.*duplicate_id 3") as caught:
        build_corpus(config_for(source, max_bad_fraction=0.1), str(place))
    assert caught.value.where == "corpus.max_bad_fraction"
    assert list((place / "_quarantine").glob("*.parquet"))
    with pytest.raises(CorpusError, match="no corpus here"):
        Corpus.open(str(place))
    # The same place can be used again, and nothing of the first attempt is left.
    (place / "split=train").mkdir(exist_ok=True)
    (place / "split=train/shard-09999.parquet").write_bytes(b"from a build that was killed")
    corpus = build_corpus(config_for(source), str(place))
    assert corpus.manifest["rows"] == GOOD
    assert not (place / "split=train/shard-09999.parquet").exists()


def test_a_source_without_rows_is_an_error(tmp_path: Path) -> None:
    write_source(tmp_path / "empty", [], files=1)
    with pytest.raises(CorpusError, match=r"no rows|no usable row"):
        build_corpus(config_for(tmp_path / "empty"), str(tmp_path / "corpus"))


def test_a_source_without_a_usable_row_is_an_error(tmp_path: Path) -> None:
    row = {"id": "a", "image": b"x", "text": "t"}
    write_source(tmp_path / "bad", [row, {**row, "text": ""}], files=1)
    with pytest.raises(CorpusError, match=r"no usable row \(.*unreadable_image 1"):
        build_corpus(config_for(tmp_path / "bad", max_bad_fraction=1.0), str(tmp_path / "corpus"))


def quarantine(place: Path | str) -> list[dict[str, Any]]:
    files = sorted((Path(place) / "_quarantine").glob("*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def ordered(corpus: Corpus) -> dict[str, list[dict[str, Any]]]:
    """The rows of each split in the order of the manifest, without what depends on the source's place."""
    return {
        name: [
            row
            for entry in split["files"]
            for row in pq.ParquetFile(Path(corpus.uri) / entry["file"]).read().to_pylist()
        ]
        for name, split in corpus.manifest["splits"].items()
    }


def test_damaged_files_are_set_aside_and_counted_like_rows(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    write_source(folder, source_rows()[:26], files=2, group_rows=13)  # 26 good rows
    whole = (folder / "1.parquet").read_bytes()
    (folder / "2.parquet").write_bytes(whole[: len(whole) // 2])
    (folder / "3.parquet").write_bytes(b"")
    table = pa.table({"id": [f"x-{n}" for n in range(4)], "image": [png(n) for n in range(4)], "text": ["t"] * 4})
    table = table.append_column("kind", pa.nulls(4, pa.string())).append_column("split", pa.nulls(4, pa.string()))
    pq.write_table(table, folder / "4.parquet", write_page_checksum=True, compression="none")
    corrupt(folder / "4.parquet", 0)
    corpus = build_corpus(config_for(folder), str(tmp_path / "corpus"))
    assert corpus.manifest["rows"] == 26
    assert corpus.manifest["quarantine"] == {"rows": 6, "reasons": {"corrupt_file": 6}}
    found = {row["source"]: row["rows"] for row in quarantine(corpus.uri)}
    assert found == {f"{folder}/2.parquet": 1, f"{folder}/3.parquet": 1, f"{folder}/4.parquet part 0": 4}
    with pytest.raises(CorpusError, match=r"6 of 32 rows are bad \(corrupt_file 6\)") as caught:
        build_corpus(config_for(folder, max_bad_fraction=0.15), str(tmp_path / "strict"))
    assert f"{tmp_path}/strict/_quarantine" in caught.value.fix


def test_shards_are_cut_and_hold_the_same_rows(built: Corpus, source: Path, tmp_path: Path) -> None:
    size = len(png(1)) + 120  # of a row, about
    by_rows = build_corpus(config_for(source, shard_rows=3), str(tmp_path / "rows"))
    by_size = build_corpus(config_for(source, shard_mb=3.5 * size / 2**20), str(tmp_path / "size"))
    for corpus in (by_rows, by_size):
        assert ordered(corpus) == ordered(built)
        assert corpus.manifest["quarantine"] == built.manifest["quarantine"]
        corpus.verify()
        entries = [entry for split in corpus.manifest["splits"].values() for entry in split["files"]]
        assert max(entry["rows"] for entry in entries) <= 4
    rows = [entry["rows"] for entry in by_rows.manifest["splits"]["train"]["files"]]
    assert max(rows) == 3
    assert rows.count(3) > 1
    assert len(quarantine(by_rows.uri)) == len(BAD)
    assert len(list((tmp_path / "rows/_quarantine").iterdir())) > len(list(Path(built.uri, "_quarantine").iterdir()))


def test_the_corpus_does_not_depend_on_the_number_of_workers(built: Corpus, source: Path, tmp_path: Path) -> None:
    options = ray.data.DataContext.get_current().execution_options
    before = options.resource_limits
    options.resource_limits = options.resource_limits.copy(cpu=1)
    try:
        alone = build_corpus(config_for(source), str(tmp_path / "alone"))
    finally:
        options.resource_limits = before
    assert alone.digest == built.digest
    assert alone.manifest["splits"] == built.manifest["splits"]


def test_small_units_share_a_shard(tmp_path: Path) -> None:
    rows = [{"id": f"{n}", "text": f"text {n}", "concept": f"{n % 7}", "split": "train"} for n in range(95)]
    (tmp_path / "source").mkdir()
    for number in range(5):
        part = pa.Table.from_pylist(rows[number * 19 : number * 19 + 19])
        pq.write_table(part, tmp_path / f"source/{number}.parquet", row_group_size=3)
    source = {"name": "parquet", "uri": str(tmp_path / "source")}
    source["columns"] = {"image": None, "concept": "concept", "split": "split"}  # type: ignore[assignment]
    config = from_mapping(CorpusConfig, {"source": source, "shard_rows": 50, "row_group_rows": 10})
    corpus = build_corpus(config, str(tmp_path / "corpus"))
    assert [entry["rows"] for entry in corpus.manifest["splits"]["train"]["files"]] == [50, 45]
    assert corpus.column("train", "id") == [str(n) for n in range(95)]


def test_a_folder_with_captions(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    lines = []
    for n in range(12):
        (pictures / f"{n}.png").write_bytes(png(n))
        lines.append({"file": f"{n}.png", "text": f"picture {n}"})
    lines += [{"file": "none.png", "text": "not there"}, {"file": "0.png", "text": "once more"}]
    (tmp_path / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    source = {"name": "folder", "uri": str(pictures), "captions": str(tmp_path / "captions.jsonl"), "rows_per_unit": 5}
    config = from_mapping(CorpusConfig, {"source": source, "max_bad_fraction": 0.2, "test_fraction": 0.0})
    corpus = build_corpus(config, str(tmp_path / "corpus"))
    assert corpus.manifest["rows"] == 12
    assert corpus.manifest["quarantine"]["reasons"] == {"missing_image": 1, "duplicate_id": 1}
    files = sorted((tmp_path / "corpus/_quarantine").glob("*.parquet"))
    found = {row["reason"]: row for file in files for row in pq.read_table(file).to_pylist()}
    assert found["missing_image"]["source"] == "none.png"
    assert found["duplicate_id"]["id"] == "0.png"


def test_a_corpus_can_be_the_source_of_another(built: Corpus, tmp_path: Path) -> None:
    source = {"name": "parquet", "uri": built.uri, "columns": {"concept": "concept"}}
    again = build_corpus(from_mapping(CorpusConfig, {"source": source, **CONFIG}), str(tmp_path / "again"))
    assert again.manifest["rows"] == GOOD
    assert {k: v["split"] for k, v in shard_rows(again).items()} == {
        k: v["split"] for k, v in shard_rows(built).items()
    }


# -- the place -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["holiday.jpg", "split=train/part-0.parquet", "_quarantine/notes.txt", "sub/_corpus.json"]
)
def test_a_folder_with_other_files_is_refused_and_left_alone(source: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / "mine" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"precious")
    with pytest.raises(CorpusError, match=f"other files \\({name}\\)") as caught:
        build_corpus(config_for(source), str(tmp_path / "mine"))
    assert caught.value.where == str(tmp_path / "mine")
    assert path.read_bytes() == b"precious"


def test_the_sources_own_folder_is_refused(source: Path) -> None:
    before = sorted(os.listdir(source))
    with pytest.raises(CorpusError, match="other files"):
        build_corpus(config_for(source), str(source))
    assert sorted(os.listdir(source)) == before


def test_leftovers_of_every_kind_are_cleared(tmp_path: Path) -> None:
    for name in (
        "split=a b/shard-00001.parquet",
        "split=x/shard-00001.parquet.0f.tmp",
        "_quarantine/shard-00001.parquet",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    _clear(str(tmp_path))
    assert os.listdir(tmp_path) == []


@given(st.text(max_size=12))
def test_a_split_that_is_accepted_is_one_plain_folder(split: str) -> None:
    if _SPLIT.fullmatch(split):
        assert os.path.normpath(f"/corpus/split={split}") == f"/corpus/split={split}"
        assert os.path.dirname(f"/corpus/split={split}") == "/corpus"


def test_spaces_around_a_text_do_not_move_it_to_another_split(tmp_path: Path) -> None:
    texts = [f"{space}word {n}{space}" for n in range(30) for space in ("", " ", "\n")]
    rows = [{"id": str(i), "image": png(i), "text": text, "kind": None, "split": None} for i, text in enumerate(texts)]
    write_source(tmp_path / "rows", rows, files=1, group_rows=1000)
    corpus = build_corpus(config_for(tmp_path / "rows", test_fraction=0.5), str(tmp_path / "corpus"))
    sides: dict[str, set[str]] = {}
    for row in shard_rows(corpus).values():
        sides.setdefault(row["text"], set()).add(row["split"])
    assert len(sides) == 30
    assert all(len(splits) == 1 for splits in sides.values())


def test_source_errors_come_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(SourceError):
        build_corpus(config_for(tmp_path / "none"), str(tmp_path / "corpus"))
    assert not (tmp_path / "corpus").exists()
