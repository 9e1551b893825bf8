"""The same behaviour on plain paths, `file://` and a real S3 server."""

import contextlib
import hashlib
import os
import socket
import threading
from pathlib import Path

import lance
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayemb import storage
from rayemb.storage import MissingError, StorageError

# -- on every kind of store ------------------------------------------------------------------------------------


def test_what_is_written_is_read(root: str) -> None:
    for data in (b"", b"abc", os.urandom(6_000_000)):
        uri = storage.join(root, "a/b.bin")
        storage.write_bytes(uri, data)
        assert storage.read_bytes(uri) == data
        assert storage.sha256_file(uri) == hashlib.sha256(data).hexdigest() == storage.sha256_bytes(data)


def test_json_goes_round(root: str) -> None:
    document = {"ключ": ["値", 1, 2.5, None, {"x": True}]}
    storage.write_json(storage.join(root, "doc.json"), document)
    assert storage.read_json(storage.join(root, "doc.json")) == document
    assert "値".encode() in storage.read_bytes(storage.join(root, "doc.json"))


def test_what_is_no_json_is_refused_and_named(root: str) -> None:
    uri = storage.join(root, "doc.json")
    for data in (b"{", b"", b"\xff\xfe"):
        storage.write_bytes(uri, data)
        with pytest.raises(StorageError, match="not a JSON document") as caught:
            storage.read_json(uri)
        assert caught.value.where == uri


def test_a_missing_file_is_named(root: str) -> None:
    uri = storage.join(root, "none")
    assert not storage.exists(uri)
    for read in (storage.read_bytes, storage.read_json, storage.sha256_file):
        with pytest.raises(MissingError, match="no such file") as caught:
            read(uri)
        assert caught.value.where == uri


def test_exists_for_files_and_folders(root: str) -> None:
    assert not storage.exists(root)
    storage.write_bytes(storage.join(root, "a/b"), b"1")
    assert storage.exists(root)
    assert storage.exists(storage.join(root, "a"))
    assert storage.exists(storage.join(root, "a/b"))
    assert not storage.exists(storage.join(root, "a/c"))


def test_list_files_gives_sorted_uris_that_can_be_read(root: str) -> None:
    assert storage.list_files(root) == []
    names = ["b.txt", "a/2.bin", "a/10.bin", "a/deep/x.bin"]
    for name in names:
        storage.write_bytes(storage.join(root, name), name.encode())
    files = storage.list_files(root)
    assert files == sorted(storage.join(root, name) for name in names)
    assert [storage.read_bytes(file).decode() for file in files] == sorted(names)
    assert storage.list_files(root, ".bin") == [file for file in files if file.endswith(".bin")]
    assert storage.list_files(storage.join(root, "a/deep")) == [storage.join(root, "a/deep/x.bin")]


def test_a_folder_is_no_prefix(root: str) -> None:
    storage.write_bytes(storage.join(root, "ab/x"), b"1")
    assert not storage.exists(storage.join(root, "a"))
    assert storage.list_files(storage.join(root, "a")) == []
    storage.delete(storage.join(root, "a"))
    assert storage.exists(storage.join(root, "ab/x"))


def test_delete_takes_files_folders_and_nothing(root: str) -> None:
    for name in ("keep", "gone", "folder/1", "folder/deep/2"):
        storage.write_bytes(storage.join(root, name), b"1")
    storage.delete(storage.join(root, "gone"))
    storage.delete(storage.join(root, "folder"))
    storage.delete(storage.join(root, "never was"))
    assert storage.list_files(root) == [storage.join(root, "keep")]


def test_overwriting_leaves_one_file(root: str) -> None:
    uri = storage.join(root, "a")
    for data in (b"old and long", b"new"):
        storage.write_bytes(uri, data)
    assert storage.read_bytes(uri) == b"new"
    assert storage.list_files(root) == [uri]


def test_a_folder_cannot_be_read_as_a_file(root: str) -> None:
    storage.write_bytes(storage.join(root, "a/b"), b"1")
    with pytest.raises(StorageError):
        storage.read_bytes(storage.join(root, "a"))


# -- URIs ------------------------------------------------------------------------------------------------------


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert storage.normalise("a/../b/") == str(tmp_path / "b")
    assert storage.normalise("~/x") == str(tmp_path / "home" / "x")


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("/a/b/", "/a/b"),
        ("file:///a/b/", "/a/b"),
        ("FILE:///a", "/a"),
        ("file://localhost/a", "/a"),
        ("file:///with%20space/%C3%BC", "/with space/ü"),
        ("s3://bucket/key/", "s3://bucket/key"),
        ("S3://Bucket/Key", "s3://Bucket/Key"),
        ("s3://bucket", "s3://bucket"),
    ],
)
def test_one_form_for_each_place(uri: str, expected: str) -> None:
    assert storage.normalise(uri) == expected
    assert storage.normalise(expected) == expected


@pytest.mark.parametrize("uri", ["gs://b/k", "http://h/p", "hdfs://n/p", "s3a://b/k"])
def test_an_unknown_scheme_is_refused(uri: str) -> None:
    with pytest.raises(StorageError, match="unknown scheme") as caught:
        storage.read_bytes(uri)
    assert caught.value.where == uri
    assert "s3://" in caught.value.fix


@pytest.mark.parametrize("uri", ["s3://", "s3:///key", "file://relative/path"])
def test_a_uri_that_names_no_place_is_refused(uri: str) -> None:
    with pytest.raises(StorageError):
        storage.exists(uri)


@pytest.mark.parametrize("part", ["..", "../x", "a/../../x", "a/..", "/etc/passwd", ""])
def test_a_part_that_climbs_out_is_refused(part: str) -> None:
    for base in ("/base", "s3://bucket/base"):
        with pytest.raises(StorageError, match="leaves its folder"):
            storage.join(base, "fine", part)


@given(st.lists(st.text(alphabet="ab./_- ", min_size=1, max_size=6), min_size=1, max_size=3))
def test_join_never_leaves_its_folder(parts: list[str]) -> None:
    try:
        joined = storage.join("/base/folder", *parts)
    except StorageError:
        return
    assert os.path.abspath(joined).startswith("/base/folder")


def test_a_file_of_any_size_is_written_by_its_path(root: str) -> None:
    uri = storage.join(root, "deep/down/file")
    for data in (b"first", b"second, and longer"):
        with storage.writing(uri) as path:
            assert not storage.exists(uri) or storage.read_bytes(uri) == b"first"
            Path(path).write_bytes(data)
        assert storage.read_bytes(uri) == data
        assert not Path(path).exists()
    with contextlib.suppress(RuntimeError), storage.writing(uri) as path:
        Path(path).write_bytes(b"half of it")
        raise RuntimeError("halfway")
    assert storage.read_bytes(uri) == data
    assert not Path(path).exists()
    assert storage.list_files(root) == [uri]


# -- local writes are atomic -----------------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["replace", "fsync"])
def test_a_write_that_fails_leaves_the_old_content_and_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    uri = str(tmp_path / "file")
    storage.write_bytes(uri, b"old")

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, step, fails)
    with pytest.raises(StorageError, match="No space left on device") as caught:
        storage.write_bytes(uri, b"new")
    monkeypatch.undo()
    assert caught.value.where == uri
    assert storage.read_bytes(uri) == b"old"
    assert os.listdir(tmp_path) == ["file"]


def test_an_interrupted_write_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        storage.write_bytes(str(tmp_path / "file"), b"new")
    assert os.listdir(tmp_path) == []


def test_writing_below_a_file_is_named(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "file"), b"1")
    with pytest.raises(StorageError, match="cannot write it"):
        storage.write_bytes(str(tmp_path / "file/below"), b"2")


def test_readers_never_see_a_part(tmp_path: Path) -> None:
    uri, size = str(tmp_path / "file"), 300_000
    storage.write_bytes(uri, b"\0" * size)
    stop, seen, problems = threading.Event(), set(), []

    def read() -> None:
        while not stop.is_set():
            data = storage.read_bytes(uri)
            seen.add(data[:1])
            if len(data) != size or data != data[:1] * size:
                problems.append(len(data))

    reader = threading.Thread(target=read)
    reader.start()
    for value in range(120):
        storage.write_bytes(uri, bytes([value]) * size)
    stop.set()
    reader.join()
    assert not problems
    assert seen


# -- S3 --------------------------------------------------------------------------------------------------------


def test_a_bucket_that_is_not_there(s3: str) -> None:
    uri = "s3://no-such-bucket/key"
    assert not storage.exists(uri)
    with pytest.raises(StorageError, match="cannot write it") as caught:
        storage.write_bytes(uri, b"1")
    assert caught.value.where == uri
    with pytest.raises(StorageError):
        storage.read_bytes(uri)


def test_a_server_that_does_not_answer_is_an_error_and_not_an_absence(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:  # bound but not listening: every connection is refused
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        with pytest.raises(StorageError, match="cannot look at it") as caught:
            storage.exists(f"{s3}/key")
    assert not isinstance(caught.value, MissingError)


def test_local_path_of_a_local_file_is_the_file(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "a"), b"1")
    assert storage.local_path(str(tmp_path / "a")) == str(tmp_path / "a")
    assert storage.local_path((tmp_path / "a").as_uri()) == str(tmp_path / "a")


def test_local_path_fetches_once(s3: str, tmp_path: Path) -> None:
    uri, cache = f"{s3}/folder/shard.faiss", str(tmp_path / "cache")
    storage.write_bytes(uri, b"content")
    first = storage.local_path(uri, cache)
    assert Path(first).read_bytes() == b"content"
    assert first.endswith("shard.faiss")
    Path(first).write_bytes(b"touched")  # a second fetch would undo this
    assert storage.local_path(uri, cache) == first
    assert Path(first).read_bytes() == b"touched"
    assert os.listdir(cache) == [os.path.basename(first)]


def test_local_path_is_never_stale(s3: str, tmp_path: Path) -> None:
    uri, cache = f"{s3}/shard", str(tmp_path / "cache")
    for data in (b"first", b"other", b"third"):  # of one size, and most likely within one second
        storage.write_bytes(uri, data)
        assert Path(storage.local_path(uri, cache)).read_bytes() == data


def test_two_objects_of_one_name_do_not_meet_in_the_cache(s3: str, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        storage.write_bytes(f"{s3}/{folder}/shard", b"same")
    paths = {storage.local_path(f"{s3}/{folder}/shard", str(tmp_path)) for folder in ("a", "b")}
    assert len(paths) == 2


def test_local_path_of_nothing_is_an_error_and_leaves_nothing(s3: str, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no such file"):
        storage.local_path(f"{s3}/none", str(tmp_path / "cache"))
    assert not (tmp_path / "cache").exists()


def test_a_copy_that_fails_leaves_nothing(s3: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(f"{s3}/shard", b"1")

    def fails(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(StorageError, match="No space left"):
        storage.local_path(f"{s3}/shard", str(tmp_path / "cache"))
    assert os.listdir(tmp_path / "cache") == []


def test_lance_reads_and_writes_with_these_options(s3: str, tmp_path: Path) -> None:
    table = pa.table({"a": [1, 2, 3]})
    for uri in (f"{s3}/table.lance", str(tmp_path / "table.lance")):
        options = storage.lance_options(uri)
        lance.write_dataset(table, uri, storage_options=options)
        assert lance.dataset(uri, storage_options=options).to_table() == table
