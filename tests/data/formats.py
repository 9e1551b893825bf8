"""One table, written in every format that can be read: whatever its form, it must come back the same."""

import bz2
import csv
import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import lance
import pyarrow as pa
import pyarrow.parquet as pq

from rayemb.data.sources import RawRow
from tests.data.corpora import png

COLUMNS = {
    "texts": "names",
    "negatives": "wrong",
    "concept": "kind",
    "score": "fit",
    "style": "drawn",
    "license": "by",
    "split": "part",
}
TEXTS = [
    "a red square",
    'with, comma and "quotes"',
    "two\nlines\r\nand a tab\t.",
    "ein Straßenschild über 東京 🗼",
    "  spaces around  ",
    "007",
    "null",
    "true",
    "'single'; semicolon",
    "x" * 300,
]


def table() -> list[dict[str, Any]]:
    """Ten rows; every optional column has values and holes."""
    return [
        {
            "id": f"row/{n}",
            "image": png(n),
            "file": f"deep/er folder/{n}.png",
            "text": text,
            "names": [text, f"name {n}", 'später, "so"'] if n % 3 else [],
            "wrong": [f"not {n}", "nor, this"] if n % 2 else [],
            "kind": f"kind {n % 4}" if n % 5 else None,
            "fit": n / 4 if n % 4 else None,
            "drawn": "plain" if n % 2 else None,
            "by": "CC0",
            "part": ["train", "val", None][n % 3],
        }
        for n, text in enumerate(TEXTS)
    ]


def expected() -> list[dict[str, Any]]:
    """What a source must make of the table, in its order."""
    return [
        {
            "id": row["id"],
            "image": row["image"],
            "text": row["text"],
            "query": None,
            "texts": row["names"],
            "negatives": row["wrong"],
            "concept": row["kind"] or "",
            "score": row["fit"],
            "style": row["drawn"] or "",
            "license": row["by"],
            "split": row["part"] or "",
        }
        for row in table()
    ]


def content(row: RawRow) -> dict[str, Any]:
    """A row without its place."""
    assert row.problem is None, row.problem
    return {key: value for key, value in row.__dict__.items() if key not in ("source", "problem", "count")}


PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".zst": lambda data: bytes(pa.compress(data, "zstd", asbytes=True)),
}
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("image", pa.binary()),
        ("text", pa.string()),
        ("names", pa.list_(pa.string())),
        ("wrong", pa.list_(pa.string())),
        ("kind", pa.string()),
        ("fit", pa.float64()),
        ("drawn", pa.string()),
        ("by", pa.string()),
        ("part", pa.string()),
    ]
)


def write(form: str, folder: Path) -> dict[str, Any]:
    """The table below `folder` in one of `FORMS`; gives the source's config with `{root}` for the folder's place."""
    kind, _, detail = form.partition(" ")
    folder.mkdir(parents=True, exist_ok=True)
    source: dict[str, Any] = {"name": kind, "uri": "{root}/rows", "columns": dict(COLUMNS)}
    _WRITERS[kind](folder, source, detail)
    return source


def _write_images(folder: Path, source: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    for row in rows:
        path = folder / "pictures" / row["file"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row["image"])
    source["image_root"] = "{root}/pictures"
    source["columns"]["image"] = "file"


def _parquet(folder: Path, source: dict[str, Any], detail: str) -> None:
    rows = table()
    arrow = pa.Table.from_pylist(rows, SCHEMA)
    if detail == "struct":
        images = [{"bytes": row["image"], "path": row["file"]} for row in rows]
        arrow = arrow.set_column(1, "image", pa.array(images))
    elif detail == "uri":
        _write_images(folder, source, rows)
        arrow = arrow.append_column("file", pa.array([row["file"] for row in rows]))
    elif detail == "struct with paths":
        _write_images(folder, source, rows)
        images = [{"bytes": row["image"] if n % 2 else None, "path": row["file"]} for n, row in enumerate(rows)]
        arrow = arrow.append_column("file", pa.array(images))
    (folder / "rows").mkdir()
    pq.write_table(arrow.slice(0, 6), folder / "rows/a.parquet", row_group_size=4)
    pq.write_table(arrow.slice(6), folder / "rows/b.parquet", row_group_size=4)


def _lance(folder: Path, source: dict[str, Any], detail: str) -> None:
    source["uri"] = "{root}/rows.lance"
    lance.write_dataset(pa.Table.from_pylist(table(), SCHEMA), str(folder / "rows.lance"), max_rows_per_file=4)


def _datasets(folder: Path, source: dict[str, Any], detail: str) -> None:
    texts = datasets.Value("string")
    features = datasets.Features(
        {
            **dict.fromkeys(("id", "text", "kind", "drawn", "by", "part"), texts),
            "image": datasets.Image(),
            "names": datasets.List(texts),
            "wrong": datasets.List(texts),
            "fit": datasets.Value("float64"),
        }
    )
    rows = [{**row, "image": {"bytes": row["image"], "path": None}} for row in table()]
    for row in rows:
        row.pop("file")
    datasets.disable_progress_bars()
    if detail == "dict":
        source["columns"].pop("split")
        parts = {part: [row for row in rows if row["part"] == part] for part in ("train", "val")}
        named = {part: datasets.Dataset.from_list(some, features=features) for part, some in parts.items()}
        datasets.DatasetDict(named).save_to_disk(str(folder / "rows"))
    else:
        datasets.Dataset.from_list(rows, features=features).save_to_disk(str(folder / "rows"), num_shards=2)


def _jsonl(folder: Path, source: dict[str, Any], detail: str) -> None:
    rows = table()
    _write_images(folder, source, rows)
    for row in rows:
        row.pop("image")
    lines = [json.dumps(row, ensure_ascii=n % 2 == 0).encode() + b"\n" for n, row in enumerate(rows)]
    (folder / "rows").mkdir()
    (folder / f"rows/a.jsonl{detail}").write_bytes(PACK[detail](b"".join(lines[:6])))
    (folder / f"rows/b.jsonl{detail}").write_bytes(PACK[detail](b"".join(lines[6:]).rstrip(b"\n")))


def _csv(folder: Path, source: dict[str, Any], detail: str) -> None:
    rows = table()
    _write_images(folder, source, rows)
    suffix, packed = (".tsv", "") if detail == "tabs" else (".csv", detail)
    names = [name for name in rows[0] if name != "image"]
    (folder / "rows").mkdir()
    for file, part in (("a", rows[:6]), ("b", rows[6:])):
        out = io.StringIO(newline="")
        writer = csv.DictWriter(out, names, delimiter="\t" if detail == "tabs" else ",", extrasaction="ignore")
        writer.writeheader()
        for row in part:
            lists = {name: json.dumps(row[name]) if row[name] else "" for name in ("names", "wrong")}
            writer.writerow({**row, **lists})
        data = ("\ufeff" if file == "a" else "") + out.getvalue()  # a byte order mark, as Excel writes it
        (folder / f"rows/{file}{suffix}{packed}").write_bytes(PACK[packed](data.encode()))


def tar_of(members: list[tuple[str, bytes]]) -> bytes:
    """A tar with these files in this order."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def _webdataset(folder: Path, source: dict[str, Any], detail: str) -> None:
    rows = table()
    (folder / "rows").mkdir()
    source["columns"].update(id="id")
    for file, part in (("a", rows[:6]), ("b", rows[6:])):
        members = []
        for n, row in enumerate(part):
            fields = {name: row[name] for name in (*COLUMNS.values(), "id")}
            members += [
                (f"deep/er/{file}{n}.png", row["image"]),
                (f"deep/er/{file}{n}.txt", row["text"].encode()),
                (f"deep/er/{file}{n}.json", json.dumps(fields).encode()),
            ]
        (folder / f"rows/{file}.tar{detail}").write_bytes(PACK[detail](tar_of(members)))


def _folder(folder: Path, source: dict[str, Any], detail: str) -> None:
    rows = table()
    ignored: dict[str, Any] = {"columns": {}}
    _write_images(folder, ignored, rows)
    captions = [{"file": row["file"], "text": row["text"]} for row in rows]
    data = "".join(json.dumps(caption) + "\n" for caption in captions).encode()
    (folder / f"captions.jsonl{detail}").write_bytes(PACK[detail](data))
    source.update(uri="{root}/pictures", captions=f"{{root}}/captions.jsonl{detail}")
    del source["columns"]


_WRITERS: dict[str, Callable[[Path, dict[str, Any], str], None]] = {
    "parquet": _parquet,
    "lance": _lance,
    "datasets": _datasets,
    "jsonl": _jsonl,
    "csv": _csv,
    "webdataset": _webdataset,
    "folder": _folder,
}
FORMS = [
    *("parquet", "parquet struct", "parquet uri", "parquet struct with paths"),
    *("lance", "datasets", "datasets dict"),
    *(f"{kind} {packed}".strip() for kind in ("jsonl", "csv", "webdataset") for packed in PACK),
    *("csv tabs", "folder", "folder .gz"),
]
