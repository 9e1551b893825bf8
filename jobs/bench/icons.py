"""The icon corpus of the data benchmarks: ~127,000 real pairs of a drawing and its name, as Parquet and as WebDataset.

    npm pack @iconify/json@2.2.535 && pip install resvg-py==0.5.0
    python jobs/bench/icons.py iconify-json-2.2.535.tgz ICONS        # ~4 minutes on 2 cores

Sets under permissive licences, without logos (trademarks) and emoji; one drawing per concept of each set. Author and
licence of each set go with every row. They are drawings, not photographs.
"""

import argparse
import io
import json
import multiprocessing
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

ROWS_PER_SHARD = 2048
PERMISSIVE = {
    "MIT",
    "Apache-2.0",
    "CC-BY-4.0",
    "OFL-1.1",
    "CC0-1.0",
    "ISC",
    "MPL-2.0",
    "BSD-3-Clause",
    "Unlicense",
    "CC-BY-3.0",
}
Row = dict[str, Any]


def sets(archive: Path) -> Iterator[tuple[str, Row, Row]]:
    """Name, description and content of each set that is used."""
    with tarfile.open(archive) as tar:
        described = json.load(tar.extractfile("package/collections.json"))  # type: ignore[arg-type]
        for name, about in sorted(described.items()):
            if about.get("category") not in ("Logos", "Emoji") and about["license"].get("spdx") in PERMISSIVE:
                yield name, about, json.load(tar.extractfile(f"package/json/{name}.json"))  # type: ignore[arg-type]


def drawings(name: str, about: Row, content: Row) -> Iterator[tuple[str, str, Row]]:
    """Id, SVG and the row's other columns of one drawing per concept of a set."""
    seen = set()
    for icon, body in content["icons"].items():
        concept = " ".join(re.sub(r"[^a-z0-9]+", " ", icon.lower()).split())
        concept = re.sub(
            r" (outline|outlined|rounded|sharp|filled|fill|line|solid|twotone|duotone|bold|light|thin)$", "", concept
        )
        concept = re.sub(r"( \d+)+$", "", concept).strip()
        if not concept or concept in seen:
            continue
        seen.add(concept)
        box = [
            body.get(key, content.get(key, default))
            for key, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
        ]
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="64" '
            f'height="64" '
            f'viewBox="{" ".join(map(str, box))}">{body["body"].replace("currentColor", "#000")}</svg>'
        )
        author = (about.get("author") or {}).get("name", "")
        yield (
            f"{name}/{icon}",
            svg,
            {"text": concept, "style": name, "license": f"{about['license']['spdx']}, {author}"},
        )


def drawn(item: tuple[str, str, Row]) -> Row | None:
    """The row with its PNG; None where nothing can be drawn."""
    import resvg_py

    key, svg, columns = item
    try:
        image = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=64, height=64, background="white"))
    except (ValueError, BaseException) as error:  # a Rust panic is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return None
    return {"id": key, "image": image, **columns}


def write_shard(folder: Path, number: int, rows: list[Row]) -> None:
    """The same rows as a Parquet file and as a tar."""
    for kind in ("parquet", "webdataset"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / f"parquet/{number:05d}.parquet", row_group_size=256)
    with tarfile.open(folder / f"webdataset/{number:05d}.tar", "w") as tar:
        for index, row in enumerate(rows):
            about = {key: row[key] for key in ("id", "style", "license")}
            members = (("png", row["image"]), ("txt", row["text"].encode()), ("json", json.dumps(about).encode()))
            for suffix, data in members:
                info = tarfile.TarInfo(f"{number:05d}{index:05d}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))


def main() -> None:
    """Draws everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path, help="iconify-json-*.tgz")
    parser.add_argument("folder", type=Path, help="where parquet/ and webdataset/ go")
    parser.add_argument("--limit", type=int, help="stop after so many rows")
    args = parser.parse_args()
    items = (item for found in sets(args.archive) for item in drawings(*found))
    rows: list[Row] = []
    total = shard = 0
    with multiprocessing.Pool(2) as pool:
        for row in pool.imap(drawn, items, chunksize=64):
            if row is None:
                continue
            rows.append(row)
            total += 1
            if len(rows) == ROWS_PER_SHARD:
                write_shard(args.folder, shard, rows)
                rows, shard = [], shard + 1
                print(f"\r{total:,} rows", end="", flush=True)
            if args.limit and total >= args.limit:
                break
    if rows:
        write_shard(args.folder, shard, rows)
    print(f"\r{total:,} rows in {args.folder}")


if __name__ == "__main__":
    main()
