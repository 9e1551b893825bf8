"""Every format gives the same rows for the same table, on a disk and on S3; and a schema that does not fit is named."""

import json
import pickle
from pathlib import Path
from typing import Any

import lance
import pyarrow as pa
import pyarrow.feather
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from rayemb import storage
from rayemb.config import ConfigError, from_mapping
from rayemb.data import CorpusConfig
from rayemb.data.sources import RawRow, Source, SourceError
from tests.data.corpora import png
from tests.data.formats import FORMS, PACK, content, expected, tar_of, write
from tests.storage.conftest import s3, s3_endpoint  # noqa: F401


def source_of(config: dict[str, Any], root: str) -> Source:
    placed = json.loads(json.dumps(config).replace("{root}", root))
    return from_mapping(CorpusConfig, {"source": placed}).source


def read(source: Source) -> list[RawRow]:
    return [row for unit in source.units(0) for row in source.read(pickle.loads(pickle.dumps(unit)))]


def upload(folder: Path, uri: str) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            storage.write_bytes(storage.join(uri, path.relative_to(folder).as_posix()), path.read_bytes())


@pytest.mark.parametrize("place", ["disk", "s3"])
@pytest.mark.parametrize("form", FORMS)
def test_the_same_rows_come_out_of_every_format(
    form: str, place: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config = write(form, tmp_path / "data")
    root = str(tmp_path / "data")
    if place == "s3":
        root = f"{request.getfixturevalue('s3')}/some folder"
        upload(tmp_path / "data", root)
    rows = read(source_of(config, root))
    assert len({row.source for row in rows}) == len(rows)
    wanted = expected()
    if form == "datasets dict":  # its splits are its folders
        wanted = sorted((row for row in wanted if row["split"]), key=lambda row: row["split"])
    if form.startswith("folder"):  # it has images and captions, in an order of its own
        assert sorted((row.image or b"", row.text or "") for row in rows) == sorted(
            (row["image"], row["text"]) for row in wanted
        )
        return
    assert [content(row) for row in rows] == wanted


@pytest.mark.parametrize("form", [form for form in FORMS if not form.startswith("folder")])
def test_rows_without_an_id_column_are_named_by_file_and_number(form: str, tmp_path: Path) -> None:
    ids = []
    for place in ("here", "elsewhere/deeper"):  # the names are those of the data, not of its place
        config = write(form, tmp_path / place)
        config["columns"]["id"] = None
        source = source_of(config, str(tmp_path / place))
        ids.append([row.id for row in read(source)])
        assert [row.id for unit in source.units(0)[::-1] for row in source.read(unit)][-1] in ids[0]
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == len(ids[0])
    assert all("#" in id_ and "here" not in id_ for id_ in ids[0])


@pytest.mark.parametrize("unit_bytes", [1, 7, 100, 999, 10**6])
@pytest.mark.parametrize("ending", [b"\n", b"\r\n"])
def test_byte_ranges_of_a_file_hold_each_line_once(unit_bytes: int, ending: bytes, tmp_path: Path) -> None:
    lines = [json.dumps({"id": n, "text": "é" * (n * 7 % 50)}, ensure_ascii=False).encode() for n in range(40)]
    lines[13:13] = [b"", b"not json", b""]
    (tmp_path / "a.jsonl").write_bytes(ending.join(lines))
    config = {"name": "jsonl", "uri": str(tmp_path), "columns": {"image": None}, "unit_mb": unit_bytes / 2**20}
    source = source_of(config, "")
    assert len(source.units(0)) == -(-len(ending.join(lines)) // unit_bytes)
    rows = read(source)
    assert [row.id for row in rows if not row.problem] == [str(n) for n in range(40)]
    (bad,) = (row for row in rows if row.problem)
    assert bad.problem is not None
    assert bad.problem[0] == "bad_json"
    begin = ending.join(lines).index(b"not json")
    assert bad.source.endswith(f"byte {begin}" if begin >= unit_bytes else "line 15")


# -- kinds -----------------------------------------------------------------------------------------------------


def test_without_an_image_a_row_is_a_pair_of_texts_or_a_text(tmp_path: Path) -> None:
    row = {"id": 1, "ask": "what?", "text": "this", "wrong": ["that", None, ""], "fit": 0.5}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    columns = {"image": None, "query": "ask", "negatives": "wrong", "score": "fit"}
    source = source_of({"name": "jsonl", "uri": str(tmp_path), "columns": columns}, "")
    assert source.kind == "text_pair"
    (found,) = read(source)
    assert (found.query, found.text, found.negatives, found.score) == ("what?", "this", ["that"], 0.5)
    source = source_of({"name": "jsonl", "uri": str(tmp_path), "columns": {"image": None}}, "")
    assert source.kind == "text"
    assert read(source)[0].query is None
    with pytest.raises(ConfigError, match="an image or a query, not both"):
        source_of({"name": "jsonl", "uri": str(tmp_path), "columns": {"query": "ask"}}, "")
    with pytest.raises(ConfigError, match="text or texts must be a column"):
        source_of({"name": "jsonl", "uri": str(tmp_path), "columns": {"text": None}}, "")


def test_where_only_a_list_of_texts_is_the_first_one_is_the_text(tmp_path: Path) -> None:
    lines = [{"id": 1, "names": ["one", "two"]}, {"id": 2, "names": []}, {"id": 3}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    columns = {"image": None, "text": None, "texts": "names"}
    rows = read(source_of({"name": "jsonl", "uri": str(tmp_path), "columns": columns}, ""))
    assert [(row.text, row.texts) for row in rows] == [("one", ["one", "two"]), (None, []), (None, [])]


# -- which files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["disk", "s3"])
def test_files_folders_globs_and_lists(place: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    names = ["a/1.csv", "a/2.csv", "a/b/3.csv", "a/[x].csv", "a/4.csv.gz", "a/_tmp/5.csv", "a/.6.csv", "c/1.tsv"]
    for name in (*names, "a/notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        data = f"id\ttext\n{name}\tx\n" if name.endswith("tsv") else f"id,text\n{name},x\n"
        (tmp_path / name).write_bytes(PACK[".gz" if name.endswith("gz") else ""](data.encode()))
    root = str(tmp_path)
    if place == "s3":
        root = str(request.getfixturevalue("s3"))
        upload(tmp_path, root)

    def ids(*uris: str) -> list[str]:
        uri = [f"{root}/{uri}" for uri in uris]
        columns = {"image": None}
        return [
            r.id
            for r in read(source_of({"name": "csv", "uri": uri if len(uri) > 1 else uri[0], "columns": columns}, ""))
        ]

    assert ids("a/1.csv") == ["a/1.csv"]
    assert sorted(ids("a")) == sorted(["a/1.csv", "a/2.csv", "a/b/3.csv", "a/[x].csv", "a/4.csv.gz"])
    assert ids("a/[12].csv") == ["a/1.csv", "a/2.csv"]
    assert ids("a/[!1].csv") == ["a/2.csv"]
    assert ids("a/[x].csv") == ["a/[x].csv"]  # a file of that very name
    assert ids("*/1.?sv") == ["a/1.csv", "c/1.tsv"]
    assert ids("a/**/*.csv") == sorted(["a/1.csv", "a/2.csv", "a/b/3.csv", "a/[x].csv"])
    assert ids("c", "a/2.csv", "a/[12].csv") == ["c/1.tsv", "a/2.csv", "a/1.csv"]
    for nothing in ("a/*.parquet", "none", "a/none.csv"):
        with pytest.raises(SourceError, match="there are no files") as caught:
            ids("a/1.csv", nothing)
        assert nothing in caught.value.where


@pytest.mark.parametrize("kind", ["lance", "datasets"])
def test_globs_of_datasets(kind: str, tmp_path: Path) -> None:
    config = {}
    for name in ("one", "two", "other"):
        config = write(kind, tmp_path / name)
    folder = config["uri"].removeprefix("{root}/")
    config["uri"] = [f"{{root}}/o*e/{folder}", f"{{root}}/t[w]o/{folder}"]
    assert [row.id for row in read(source_of(config, str(tmp_path)))] == [row["id"] for row in expected()] * 2
    config["uri"] = "{root}/z*"
    with pytest.raises(SourceError, match="matches no dataset"):
        read(source_of(config, str(tmp_path)))
    for place in (tmp_path / "none", tmp_path):
        config["uri"] = str(place)
        with pytest.raises(SourceError, match=r"no Lance dataset|not a folder that `save_to_disk` wrote"):
            read(source_of(config, ""))


@pytest.mark.parametrize("compression", [None, "lz4", "zstd"])
def test_feather_files_listed_by_a_dataset(compression: str | None, tmp_path: Path) -> None:
    table = pa.table({"id": [f"{n}" for n in range(50)], "text": ["t"] * 50})
    pa.feather.write_feather(table, tmp_path / "x.arrow", compression=compression or "uncompressed", chunksize=20)
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "x.arrow"}]}))
    config = {"name": "datasets", "uri": str(tmp_path), "columns": {"image": None}}
    assert [row.id for row in read(source_of(config, ""))] == table["id"].to_pylist()


# -- schemas ---------------------------------------------------------------------------------------------------

FORMATS = ["parquet", "lance", "datasets", "jsonl", "csv", "webdataset"]


@pytest.mark.parametrize("key", ["id", "text", "image", "query"])
@pytest.mark.parametrize("form", FORMATS)
def test_a_missing_column_names_the_key_and_the_file(form: str, key: str, tmp_path: Path) -> None:
    config = write(form, tmp_path / "data")
    if key == "query":
        config["columns"]["image"] = None
    config["columns"][key] = "nowhere"
    with pytest.raises(SourceError, match=r"has no column 'nowhere'") as caught:
        source_of(config, str(tmp_path / "data")).units(0)
    assert caught.value.where == f"corpus.source.columns.{key}"
    assert str(tmp_path / "data/rows") in caught.value.what
    assert "kind" in caught.value.fix


@pytest.mark.parametrize(
    ("form", "key", "column"),
    [
        *((form, "text", "names") for form in ("parquet", "lance", "datasets", "jsonl", "webdataset")),
        *((form, "texts", "fit") for form in ("parquet", "lance", "datasets", "jsonl", "webdataset")),
        *((form, "texts", "kind") for form in ("parquet", "lance", "datasets", "jsonl", "csv", "webdataset")),
        *((form, "score", "kind") for form in FORMATS),
        *((form, "concept", "fit") for form in ("parquet", "lance", "datasets", "jsonl", "webdataset")),
        *((form, "image", "fit") for form in ("parquet", "lance", "datasets", "jsonl", "webdataset")),
    ],
)
def test_a_column_of_another_type_names_the_key(form: str, key: str, column: str, tmp_path: Path) -> None:
    config = write(form, tmp_path / "data")
    config["columns"][key] = column
    source = source_of(config, str(tmp_path / "data"))
    if form == "csv":  # every value is a text: it shows in the rows
        problems = {row.problem and row.problem[0] for row in read(source)}
        assert problems == {"bad_type", None}
        return
    with pytest.raises(SourceError, match="expected") as caught:
        source.units(0)
    assert caught.value.where == f"corpus.source.columns.{key}"


@pytest.mark.parametrize("form", FORMATS)
def test_one_file_of_another_schema_is_named(form: str, tmp_path: Path) -> None:
    config = write(form, tmp_path / "data")
    rows, table = tmp_path / "data/rows", pa.table({"other": ["x"], "id": ["y"]})
    rows.mkdir(exist_ok=True)
    if form == "parquet":
        pq.write_table(table, rows / "z.parquet")
    elif form == "lance":
        lance.write_dataset(table, str(tmp_path / "data/z.lance"))
        config["uri"] = "{root}/*.lance"
    elif form == "datasets":
        with pa.ipc.new_stream(rows / "z.arrow", table.schema) as out:
            out.write_table(table)
        state = json.loads((rows / "state.json").read_text())
        state["_data_files"].append({"filename": "z.arrow"})
        (rows / "state.json").write_text(json.dumps(state))
    else:
        data = {
            "jsonl": b'{"other": "x", "id": "y"}',
            "csv": b"other,id\nx,y",
            "webdataset": tar_of([("a.json", b'{"other": "x", "id": "y"}')]),
        }
        (rows / f"z.{form.replace('webdataset', 'tar')}").write_bytes(data[form])
    with pytest.raises(SourceError, match=r"/z\.\w+ has no column 'file|/z\.\w+ has no column 'image'"):
        source_of(config, str(tmp_path / "data")).units(0)


def test_a_column_that_is_null_throughout_fits_every_key(tmp_path: Path) -> None:
    nothing = pa.nulls(2)
    pq.write_table(pa.table({"id": ["a", "b"], "text": ["x", "y"], "none": nothing}), tmp_path / "a.parquet")
    columns = {"image": "none", **dict.fromkeys(("texts", "negatives", "concept", "score", "split"), "none")}
    rows = read(source_of({"name": "parquet", "uri": str(tmp_path), "columns": columns}, ""))
    assert [(row.image, row.texts, row.concept, row.score) for row in rows] == [(None, [], "", None)] * 2


def test_a_dictionary_and_large_types_are_texts(tmp_path: Path) -> None:
    table = pa.table(
        {
            "id": pa.array([1, 2], pa.int64()),
            "image": pa.array([png(0), png(1)], pa.large_binary()),
            "text": pa.array(["x", "y"]).dictionary_encode(),
            "kind": pa.array(["k", None], pa.large_string()).dictionary_encode(),
        }
    )
    lance.write_dataset(table.drop_columns(["kind"]), str(tmp_path / "t.lance"))
    pq.write_table(table, tmp_path / "a.parquet")
    config = {"name": "parquet", "uri": str(tmp_path), "columns": {"concept": "kind"}}
    assert [(row.id, row.text, row.concept) for row in read(source_of(config, ""))] == [("1", "x", "k"), ("2", "y", "")]
    config = {"name": "lance", "uri": str(tmp_path / "t.lance")}
    assert [(row.id, row.text, row.image) for row in read(source_of(config, ""))] == [
        ("1", "x", png(0)),
        ("2", "y", png(1)),
    ]
