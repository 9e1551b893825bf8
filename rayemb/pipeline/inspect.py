"""What is in a corpus, for `rayemb data inspect`. Reads one row group per split beyond the manifest."""

import statistics

from rich.console import Console
from rich.table import Table

from rayemb.data import Corpus
from rayemb.data.corpus import SCHEMA, read_row_group
from rayemb.models import decode_image

SAMPLE = 5


def inspect_corpus(uri: str, console: Console) -> None:
    """Prints counts, schema, bad rows, lengths, sizes and a sample. Verifies every checksum."""
    corpus = Corpus.open(uri)
    corpus.verify()
    manifest = corpus.manifest
    console.print(f"corpus {corpus.uri}", markup=False)
    console.print(f"  digest {corpus.digest[:12]}, built {manifest['created']}, every checksum right", markup=False)
    bad = manifest["quarantine"]
    reasons = ", ".join(f"{reason} {count}" for reason, count in bad["reasons"].items()) or "none"
    console.print(f"  {manifest['rows']:,} rows; set aside {bad['rows']:,} ({reasons})", markup=False)
    console.print("  schema " + ", ".join(f"{field.name}: {field.type}" for field in SCHEMA), markup=False)
    splits = Table("split", "rows", "files", "text length, median", "image size, median (sample)")
    for name, split in manifest["splits"].items():
        group = corpus.row_groups(name)[0]
        rows = read_row_group(group, ("text", "image")).to_pylist()
        width = statistics.median(len(row["text"]) for row in rows)
        sizes = [decode_image(row["image"]).size for row in rows]
        size = f"{statistics.median(w for w, _ in sizes):g} x {statistics.median(h for _, h in sizes):g}"
        splits.add_row(name, f"{split['rows']:,}", str(len(split["files"])), f"{width:g}", size)
    console.print(splits)
    sample = Table("id", "text", "captions", "concept", "style", "license")
    first = next(iter(corpus.splits))
    columns = ("id", "text", "texts", "concept", "style", "license")
    for row in read_row_group(corpus.row_groups(first)[0], columns).slice(0, SAMPLE).to_pylist():
        captions = str(len(row["texts"] or []))
        sample.add_row(row["id"], row["text"], captions, row["concept"], row["style"], row["license"])
    console.print(sample)
