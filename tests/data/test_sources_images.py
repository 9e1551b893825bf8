"""Images that rows name by URI: read from below one root, and from nowhere else."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayemb import storage
from rayemb.data.sources import RawRow, SourceError, images
from rayemb.data.sources.images import ForbiddenError, locate
from tests.data.corpora import png
from tests.data.test_sources_formats import read, source_of
from tests.storage.conftest import s3, s3_endpoint  # noqa: F401

OUTSIDE = [
    "../secret.png",
    "a/../../secret.png",
    "/etc/passwd",
    "file:///etc/passwd",
    "file://localhost/etc/passwd",
    "file:///{root}/../secret.png",
    "{root}/../secret.png",
    "{root}x/1.png",
    "file://{root}/%2e%2e/secret.png",
    "http://169.254.169.254/latest/meta-data",
    "https://example.org/1.png",
    "s3://other-bucket/1.png",
    "data:image/png;base64,AAAA",
    "ftp://x/y",
    "//server/share.png",
    "link-out.png",
    "folder-out/secret.png",
    "a\0.png",
    "C:\\1.png",
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "a b").mkdir(parents=True)
    (folder / "1.png").write_bytes(png(1))
    (folder / "a b/2%20.png").write_bytes(png(2))
    (folder / "link-in.png").symlink_to(folder / "1.png")
    (tmp_path / "secret.png").write_bytes(png(66))
    (folder / "link-out.png").symlink_to(tmp_path / "secret.png")
    (folder / "folder-out").symlink_to(tmp_path)
    (folder / "empty.png").touch()
    os.mkfifo(folder / "pipe.png")
    (folder / "locked.png").write_bytes(png(3))
    return folder


def by_uri(folder: Path, uris: list[Any], image_root: str | None) -> list[RawRow]:
    (folder / "uris.jsonl").write_text(
        "\n".join(json.dumps({"id": n, "image": u, "text": "t"}) for n, u in enumerate(uris))
    )
    source = {"name": "jsonl", "uri": str(folder / "uris.jsonl"), "image_root": image_root}
    return read(source_of(source, ""))


def test_uris_below_the_root_are_read(root: Path, tmp_path: Path) -> None:
    uris = [
        "1.png",
        "a b/2%20.png",
        "./1.png",
        "a b/.//../1.png",
        f"{root}/1.png",
        f"file://{root}/1.png",
        "link-in.png",
    ]
    rows = by_uri(tmp_path, [*uris, "empty.png", f"file://{root}/a%20b/2%2520.png"], str(root))
    assert [row.image for row in rows[:3]] == [png(1), png(2), png(1)]
    assert rows[3].problem is not None  # it climbs, even if it would end inside
    assert [row.image for row in rows[4:]] == [png(1)] * 3 + [b"", png(2)]


@pytest.mark.parametrize("form", ["path", "uri"])
def test_whatever_leads_out_of_the_root_is_forbidden(root: Path, tmp_path: Path, form: str) -> None:
    uris = [uri.replace("{root}", str(root)) for uri in OUTSIDE]
    rows = by_uri(tmp_path, uris, str(root) if form == "path" else root.as_uri())
    assert [(uri, row.problem and row.problem[0]) for uri, row in zip(uris, rows, strict=True)] == [
        (uri, "forbidden_uri") for uri in uris
    ]
    assert not any(row.image for row in rows)


def test_what_is_not_there_is_missing(root: Path, tmp_path: Path) -> None:
    uris = ["none.png", "a b", "1.png/x", "x" * 300 + ".png", "pipe.png", "", None]
    rows = by_uri(tmp_path, uris, str(root))
    assert [row.problem and row.problem[0] for row in rows] == ["missing_image"] * 5 + [None] * 2
    assert [row.image for row in rows] == [None] * 7


def test_an_image_beyond_all_bounds_is_not_read(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_BYTES", 50)
    (root / "large.png").write_bytes(b"x" * 51)
    (root / "small.png").write_bytes(b"x" * 50)
    rows = by_uri(tmp_path, ["large.png", "small.png"], str(root))
    assert [row.problem and row.problem[0] for row in rows] == ["too_large_image", None]


def test_uris_without_a_root_are_an_error(root: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="no image_root is set") as caught:
        by_uri(tmp_path, ["1.png"], None)
    assert caught.value.where == "corpus.source.image_root"


def test_uris_on_s3(s3: str, tmp_path: Path) -> None:  # noqa: F811
    for name in ("in/1.png", "in/a/2.png", "secret.png", "in x/3.png"):
        storage.write_bytes(f"{s3}/{name}", png(7))
    uris = ["1.png", "a/2.png", f"{s3}/in/1.png", "none.png", "../secret.png", f"{s3}/secret.png", f"{s3}/in x/3.png"]
    rows = by_uri(tmp_path, [*uris, f"{s3}/in/../secret.png", "/etc/passwd"], f"{s3}/in/")
    assert [row.image for row in rows[:3]] == [png(7)] * 3
    assert [row.problem and row.problem[0] for row in rows[3:]] == ["missing_image"] + ["forbidden_uri"] * 5


@given(st.text(max_size=30) | st.lists(st.sampled_from(["..", ".", "", "a", "%2e", "~", "\\"])).map("/".join))
def test_no_uri_leaves_the_root(uri: str) -> None:
    for root in ("/data/images", "s3://bucket/images"):
        try:
            place = locate(root, uri)
        except ForbiddenError:
            continue
        assert place.startswith(f"{root}/")
        assert ".." not in place.split("/")
