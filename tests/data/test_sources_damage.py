"""Damaged files and hostile rows: named, counted and left out; what was read before the damage stays."""

import gzip
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq
import pytest

from rayemb.data.sources import RawRow, Source, SourceError
from tests.data.corpora import corrupt, png
from tests.data.formats import FORMS, PACK, expected, tar_of, write
from tests.data.test_sources_formats import read, source_of
from tests.memory import traced_peak

PACKED = [form for form in FORMS if form.endswith((".gz", ".bz2", ".zst")) and not form.startswith("folder")]
TORN = ["parquet", "lance", "datasets", "webdataset", *PACKED]


def texts(name: str, folder: Path, **options: Any) -> Source:
    """A source of texts alone in `folder`."""
    columns = {"image": None, **options.pop("columns", {})}
    return source_of({"name": name, "uri": str(folder), "columns": columns, **options}, "")


def good(rows: list[RawRow]) -> list[str]:
    return [row.id for row in rows if row.problem is None]


def problems(rows: list[RawRow]) -> list[tuple[str, int]]:
    return [(row.problem[0], row.count) for row in rows if row.problem]


def second_file(folder: Path, form: str) -> Path:
    """The last data file of a source that `write` made."""
    pattern = {"lance": "rows.lance/data/*.lance", "datasets": "rows/*.arrow"}.get(form, "rows/*")
    found = sorted(folder.glob(pattern))
    if form == "lance":  # fragments in the order of the table, not of their random names
        import lance

        fragments = lance.dataset(str(folder / "rows.lance")).get_fragments()
        return folder / "rows.lance/data" / fragments[-1].data_files()[0].path
    return found[-1]


@pytest.mark.parametrize("share", [0.0, 0.2, 0.55])
@pytest.mark.parametrize("form", TORN)
def test_a_truncated_file_is_named_and_the_others_are_read(form: str, share: float, tmp_path: Path) -> None:
    config = write(form, tmp_path)
    path = second_file(tmp_path, form)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    rows = read(source_of(config, str(tmp_path)))
    ids = [row["id"] for row in expected()]
    found = good(rows)
    assert found == ids[: len(found)]  # nothing is made up, nothing is out of order
    before = {"lance": 8, "datasets": 5}.get(form, 6)
    assert len(found) >= before
    reasons = problems(rows)
    assert [reason for reason, _ in reasons] == ["corrupt_file"]
    assert reasons[0][1] == (2 if form == "lance" else 1)  # its manifest tells how many rows are lost
    place = str(path) if form != "lance" else str(tmp_path / "rows.lance")
    assert rows[-1].source.startswith(place)
    assert rows[-1].problem is not None
    assert rows[-1].problem[1]


@pytest.mark.parametrize("form", TORN)
def test_a_file_of_something_else_is_named(form: str, tmp_path: Path) -> None:
    config = write(form, tmp_path)
    path = second_file(tmp_path, form)
    path.write_bytes(b"<html>404 Not Found</html>" * 50)
    rows = read(source_of(config, str(tmp_path)))
    assert len(good(rows)) >= 5
    assert [reason for reason, _ in problems(rows)] == ["corrupt_file"]


@pytest.mark.parametrize("form", ["parquet", "datasets", "webdataset", "jsonl .gz", "csv .zst"])
def test_if_no_file_can_be_read_it_is_an_error(form: str, tmp_path: Path) -> None:
    config = write(form, tmp_path)
    for path in (tmp_path / "rows").iterdir():
        if path.suffix != ".json":
            path.write_bytes(b"gone bad" * 99)
    source = source_of(config, str(tmp_path))
    with pytest.raises(SourceError, match=r"none of the 2 files can be read; .*/rows/"):
        source.units(0)


def test_a_corrupt_row_group_counts_as_its_rows(tmp_path: Path) -> None:
    table = pa.table({"id": [f"{n}" for n in range(30)], "text": [f"text {n}" for n in range(30)]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=10, write_page_checksum=True, compression="none")
    corrupt(tmp_path / "a.parquet", 1, "text")
    rows = read(texts("parquet", tmp_path))
    assert good(rows) == [f"{n}" for n in (*range(10), *range(20, 30))]
    (bad,) = (row for row in rows if row.problem)
    assert problems(rows) == [("corrupt_file", 10)]
    assert bad.source == f"{tmp_path}/a.parquet part 1"


def test_rows_before_a_corrupt_page_are_kept(tmp_path: Path) -> None:
    table = pa.table({"id": [f"{n}" for n in range(5000)], "text": [f"text {n}" for n in range(5000)]})
    pq.write_table(
        table,
        tmp_path / "a.parquet",
        write_page_checksum=True,
        compression="none",
        data_page_size=4096,
        write_batch_size=64,
    )
    corrupt(tmp_path / "a.parquet", 0, "text")
    rows = read(texts("parquet", tmp_path))
    found = good(rows)
    assert 0 < len(found) < 5000
    assert found == [f"{n}" for n in range(len(found))]
    assert problems(rows) == [("corrupt_file", 5000 - len(found))]
    assert rows[-1].source == f"{tmp_path}/a.parquet part 0 after row {len(found) - 1}"


def test_a_fragment_that_is_gone_counts_as_its_rows(tmp_path: Path) -> None:
    config = write("lance", tmp_path)
    second_file(tmp_path, "lance").unlink()
    rows = read(source_of(config, str(tmp_path)))
    assert len(good(rows)) == 8
    assert problems(rows) == [("corrupt_file", 2)]


def test_a_file_that_a_dataset_lists_and_is_gone_is_named(tmp_path: Path) -> None:
    config = write("datasets", tmp_path)
    second_file(tmp_path, "datasets").unlink()
    rows = read(source_of(config, str(tmp_path)))
    assert len(good(rows)) == 5
    assert [row.problem for row in rows if row.problem] == [("corrupt_file", "the file is missing")]


@pytest.mark.parametrize(
    "state",
    [b"{", b"[]", b"{}", b'{"_data_files": 3}', b'{"_data_files": [{}]}', b'{"_data_files": [{"filename": 1}]}'],
)
def test_a_dataset_whose_list_is_damaged_is_an_error(state: bytes, tmp_path: Path) -> None:
    config = write("datasets", tmp_path)
    (tmp_path / "rows/state.json").write_bytes(state)
    with pytest.raises(SourceError, match=r"state\.json|name its files") as caught:
        source_of(config, str(tmp_path)).units(0)
    assert caught.value.where == str(tmp_path / "rows")


def test_an_arrow_batch_with_wild_offsets_is_damage_and_no_crash(tmp_path: Path) -> None:
    table = pa.table({"id": ["aaaa", "bbbb", "cccc"], "text": ["x", "y", "z"]})
    with pa.ipc.new_stream(tmp_path / "a.arrow", table.schema) as out:
        out.write_table(table)
    offsets = b"".join(n.to_bytes(4, "little") for n in (0, 4, 8, 12))
    data = (tmp_path / "a.arrow").read_bytes()
    assert data.count(offsets) == 1
    (tmp_path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}]}))
    for wild in (2**30, -5, 11):
        damaged = offsets[:4] + wild.to_bytes(4, "little", signed=True) + offsets[8:]
        (tmp_path / "a.arrow").write_bytes(data.replace(offsets, damaged))
        rows = read(texts("datasets", tmp_path))
        assert problems(rows) == [("corrupt_file", 1)]


# -- text that is none -----------------------------------------------------------------------------------------


def test_bytes_that_are_no_utf8_are_bad_rows_in_columns(tmp_path: Path) -> None:
    text = pa.array([b"fine", b"\xff\xfe", None, b"caf\xc3\xa9"]).view(pa.string())
    names = pa.array([[b"a"], [b"b"], [b"\xc3"], []], pa.list_(pa.binary())).cast(pa.list_(pa.binary()))
    table = pa.table({"id": ["1", "2", "3", "4"], "text": text, "names": names})
    table = table.set_column(2, "names", pa.ListArray.from_arrays(names.offsets, names.values.view(pa.string())))
    pq.write_table(table, tmp_path / "a.parquet", store_schema=False)
    rows = read(texts("parquet", tmp_path, columns={"texts": "names"}))
    assert [(row.id, row.text, row.problem and row.problem[0]) for row in rows] == [
        ("1", "fine", None),
        ("2", None, "bad_utf8"),
        ("3", None, "bad_utf8"),
        ("4", "café", None),
    ]


JSON_LINES: list[tuple[bytes, str | None]] = [
    (b'{"id": 1, "text": "fine"}', None),
    (b'{"id": 2, "text": "cut', "bad_json"),
    (b"[1, 2]", "bad_json"),
    (b"null", "bad_json"),
    (b'{"id": 3, "text": "\xff"}', "bad_utf8"),
    (b'{"id": 123456789012345678901234567890, "text": "huge"}', None),
    (b'{"id": ' + b"9" * 5000 + b"}", "bad_json"),
    (b'{"id": 4, "text": "x", "fit": NaN}', None),
    (b'{"id": 5, "text": "x", "fit": 1e999}', "bad_type"),
    (b'{"id": 6, "text": NaN}', None),
    (b'{"id": 7, "text": 7}', "bad_type"),
    (b'{"id": 1.5, "text": "x"}', "bad_type"),
    (b'{"id": true, "text": "x"}', "bad_type"),
    (b'{"id": 8, "text": "x", "fit": "high"}', "bad_type"),
    (b'{"id": 9, "text": "x", "names": [1]}', "bad_type"),
    (b'{"id": 10, "text": "x", "names": {"a": 1}}', "bad_type"),
    (b"[" * 100_000, "bad_json"),
    (b"\x00\x00", "bad_json"),
    (b'{"id": 11, "text": "x", "fit": "0.5"}', None),
]


@pytest.mark.parametrize("packed", ["", ".gz"])
def test_a_bad_line_is_one_bad_row_with_its_number(packed: str, tmp_path: Path) -> None:
    data = b"\xef\xbb\xbf" + b"\n".join(line for line, _ in JSON_LINES)
    (tmp_path / f"a.jsonl{packed}").write_bytes(PACK[packed](data))
    rows = read(texts("jsonl", tmp_path, columns={"texts": "names", "score": "fit"}))
    assert [row.problem and row.problem[0] for row in rows] == [reason for _, reason in JSON_LINES]
    assert [row.source.rpartition(" line ")[2] for row in rows] == [f"{n}" for n in range(1, len(rows) + 1)]
    by_id = {row.id: row for row in rows if not row.problem}
    assert set(by_id) == {"1", "123456789012345678901234567890", "4", "6", "11"}
    assert (by_id["4"].score, by_id["6"].text, by_id["11"].score) == (None, None, 0.5)


@pytest.mark.parametrize("unit_mb", [64, 0.001])
def test_a_line_without_end_is_not_held_in_memory(
    unit_mb: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rayemb.data.sources.jsonl.MAX_BYTES", 1000)
    lines = [b'{"id": 1, "text": "a"}', b'{"id": 2, "text": "' + b"x" * 5000 + b'"}', b'{"id": 3, "text": "c"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    rows = read(texts("jsonl", tmp_path, unit_mb=unit_mb))
    assert [(row.id, row.problem and row.problem[0]) for row in rows] == [("1", None), ("", "bad_json"), ("3", None)]


def test_csv_rows_that_are_none(tmp_path: Path) -> None:
    lines = [
        b"\xef\xbb\xbfid,text",
        b"1,fine",
        b'2,"with ""quotes"", a comma\nand a line"',
        b"3",
        b"4,too,many",
        b"5,\xff",
        b"",
        b"6,",
        b"7,nul\x00",
        b'8,"' + b"x" * 200_000 + b'"',
        b"9,after it",
        b'10,"never closed',
    ]
    (tmp_path / "a.csv").write_bytes(b"\n".join(lines))
    rows = read(texts("csv", tmp_path))
    found = {row.id: row.text for row in rows if not row.problem}
    assert found["1"] == "fine"
    assert found["2"] == 'with "quotes", a comma\nand a line'
    assert found["6"] is None
    assert found["7"] == "nul\0"  # judged by the builder
    assert [reason for reason, _ in problems(rows)][:3] == ["bad_csv", "bad_csv", "bad_utf8"]
    assert "has 1 values, the header 2" in str(rows[2].problem)
    assert rows[2].source == f"{tmp_path}/a.csv row 2"
    assert "quote" in str(rows[7].problem)


@pytest.mark.parametrize("data", [b"", b"\n\n", b"\xef\xbb\xbf"])
def test_a_csv_without_a_header_is_damaged(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(data)
    (tmp_path / "b.csv").write_bytes(b"id,text\n1,x\n")
    rows = read(texts("csv", tmp_path))
    assert good(rows) == ["1"]
    assert problems(rows) == [("corrupt_file", 1)]


def test_a_csv_with_one_column_twice_is_ambiguous(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"id,text,text\n1,x,y\n")
    with pytest.raises(SourceError, match=r"a\.csv has the column 'text' twice"):
        texts("csv", tmp_path).units(0)


# -- tar -------------------------------------------------------------------------------------------------------


def tar_source(folder: Path, data: bytes, **columns: Any) -> Source:
    (folder / "a.tar").write_bytes(data)
    return source_of({"name": "webdataset", "uri": str(folder), "columns": columns}, "")


def test_wherever_a_tar_breaks_off_what_was_whole_is_kept(tmp_path: Path) -> None:
    members = [(f"{n}.{end}", (png(n) if end == "png" else b"text %d" % n)) for n in range(4) for end in ("png", "txt")]
    data = tar_of(members)
    end = 512 * 2 * len(members) + 1024  # a header and a block for each, two blocks of zeros
    assert data[end - 1024 : end] == bytes(1024)
    source = tar_source(tmp_path, data)
    (unit,) = source.units(0)
    assert good(list(source.read(unit))) == ["0", "1", "2", "3"]
    for cut in [*range(0, end - 1024, 100), *range(512, end - 512, 512)]:
        (tmp_path / "a.tar").write_bytes(data[:cut])
        rows = list(source.read(unit))
        assert good(rows) == [f"{n}" for n in range(len(good(rows)))]
        assert len(good(rows)) >= (cut - 512) // 2048  # a sample has four blocks, and shows as whole by the next header
        assert problems(rows) == [("corrupt_file", 1)], cut


def test_a_damaged_header_is_not_taken_for_the_end(tmp_path: Path) -> None:
    data = bytearray(tar_of([(f"{n}.txt", b"x") for n in range(5)]))
    data[1024 * 3 + 5] ^= 1  # in the fourth name: only its checksum tells
    rows = read(tar_source(tmp_path, bytes(data), image=None))
    assert good(rows) == ["0", "1"]  # whether the third was whole, nobody can say
    assert problems(rows) == [("corrupt_file", 1)]
    assert "after sample 1 (1)" in rows[-1].source


def test_samples_of_every_shape(tmp_path: Path) -> None:
    members = [
        ("plain.png", png(0)),
        ("plain.txt", b"zero"),
        ("no-image.txt", b"one"),
        ("no-text.jpg", png(2)),
        ("../../climbs.png", png(3)),
        ("../../climbs.txt", b"three"),
        ("/absolute/name.PNG", png(4)),
        ("/absolute/name.TXT", b"four"),
        ("dir.with.dots/a.b.left.png", png(5)),
        ("dir.with.dots/a.txt", b"five"),
        ("twice.png", png(6)),
        ("twice.txt", b"six"),
        ("twice.png", png(7)),
        ("twice.txt", b"seven"),
        ("plain.png", png(8)),
        ("plain.txt", b"again, later"),
        ("__meta__.json", b"{}"),
        (".hidden.txt", b"no"),
        ("no-extension", b"no"),
        ("bad-json.png", png(9)),
        ("bad-json.json", b"{"),
        ("bad-json.txt", b"nine"),
        ("bad-text.txt", b"\xff"),
    ]
    out = io.BytesIO(tar_of(members))
    with tarfile.open(fileobj=out, mode="a") as archive:
        for name, kind in (
            ("link.txt", tarfile.SYMTYPE),
            ("hard.txt", tarfile.LNKTYPE),
            ("folder.txt", tarfile.DIRTYPE),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "plain.txt"
            archive.addfile(info)
    before = sorted(os.listdir(tmp_path.parent))
    rows = read(tar_source(tmp_path, out.getvalue()))
    found = [(row.id, row.image, row.text, row.problem and row.problem[0]) for row in rows]
    assert found == [
        ("plain", png(0), "zero", None),
        ("no-image", None, "one", None),
        ("no-text", png(2), None, None),
        ("../../climbs", png(3), "three", None),
        ("/absolute/name", png(4), "four", None),
        ("dir.with.dots/a", png(5), "five", None),
        ("twice", png(6), "six", None),
        ("twice", png(7), "seven", None),
        ("plain", png(8), "again, later", None),
        ("", None, None, "bad_json"),
        ("bad-text", None, None, "bad_utf8"),
    ]
    assert sorted(os.listdir(tmp_path.parent)) == before  # nothing was unpacked


def test_a_member_that_is_too_large_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayemb.data.sources.webdataset.MAX_BYTES", 1000)
    data = tar_of([("a.txt", b"a"), ("b.txt", b"x" * 1001), ("c.txt", b"c")])
    rows = read(tar_source(tmp_path, data, image=None))
    assert [(row.id, row.problem and row.problem[0]) for row in rows] == [
        ("a", None),
        ("", "large_member"),
        ("c", None),
    ]


def test_members_by_their_extension_and_fields(tmp_path: Path) -> None:
    fields = {"caption": "from json", "score": 0.5, "image": "a field", "cls": "never: there is a member"}
    data = tar_of(
        [("k.left.png", png(0)), ("k.right.png", png(1)), ("k.json", json.dumps(fields).encode()), ("k.cls", b"7")]
    )
    (row,) = read(tar_source(tmp_path, data, image="right.png", text="caption", concept="cls", score="score"))
    assert (row.id, row.image, row.text, row.concept, row.score) == ("k", png(1), "from json", "7", 0.5)
    (row,) = read(tar_source(tmp_path, data, text="caption"))
    assert row.image == png(0)


# -- memory ----------------------------------------------------------------------------------------------------


def test_a_packed_file_is_unpacked_as_it_is_read(tmp_path: Path) -> None:
    line = json.dumps({"id": 1, "text": "x" * 1000}).encode() + b"\n"
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(line * 100_000))  # 100 MB in 0.3
    source = texts("jsonl", tmp_path)
    (unit,) = source.units(0)
    rows = source.read(unit)
    arrow = pa.total_allocated_bytes()
    _, peak = traced_peak(lambda: [next(rows) for _ in range(5)])
    assert pa.total_allocated_bytes() - arrow + peak < 40 << 20
    rows.close()  # type: ignore[attr-defined]
