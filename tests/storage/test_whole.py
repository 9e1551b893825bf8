"""Files that libraries write are there whole or not at all, on every kind of store."""

import pickle
import subprocess
import sys
from pathlib import Path

import pyarrow.fs as pafs
import pytest

from rayemb import storage
from tests.environment import off_cluster

WRITER = """
import os, signal, sys
from rayemb import storage
fs, path = storage.filesystem(sys.argv[1])
out = storage.whole_files(fs).open_output_stream(path)
out.write(b"new" * 100_000)
out.flush()
os.kill(os.getpid(), signal.SIGKILL)
"""

# Its files may have a MB: as on a full disk, writing fails in the middle.
FULL = """
import resource, sys
from rayemb import storage
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
fs, path = storage.filesystem(sys.argv[1])
with storage.whole_files(fs).open_output_stream(path) as out:
    out.write(b"new" * 1_000_000)
"""


def test_what_is_copied_there_is_read_whole_and_listed(root: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    files = {"a.json": b"{}", "deep/b.bin": b"b" * 3_000_000}
    for name, data in files.items():
        (source / name).write_bytes(data)
    fs, path = storage.filesystem(root)
    # As Ray hands it from one process to another.
    fs = pickle.loads(pickle.dumps(storage.whole_files(fs)))
    fs.create_dir(path, recursive=True)
    for _ in range(2):
        pafs.copy_files(str(source), path, destination_filesystem=fs)
        assert storage.list_files(root) == [storage.join(root, name) for name in files]
        assert [storage.read_bytes(storage.join(root, name)) for name in files] == list(files.values())
    with fs.open_input_stream(f"{path}/a.json") as file:
        assert file.read() == b"{}"


def test_who_is_killed_while_writing_leaves_what_was_there(root: str) -> None:
    uri = storage.join(root, "state.json")
    storage.write_bytes(uri, b"old")
    writer = subprocess.run([sys.executable, "-c", WRITER, uri], env=off_cluster(), check=False)
    assert writer.returncode == -9
    assert storage.read_bytes(uri) == b"old"


def test_a_file_that_cannot_be_finished_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(tmp_path / "state.json")
    storage.write_bytes(uri, b"old")
    fs, path = storage.filesystem(uri)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rayemb.storage.whole.os.fsync", full)
    out = storage.whole_files(fs).open_output_stream(path)
    out.write(b"new")
    with pytest.raises(OSError, match="No space left"):
        out.close()
    assert storage.read_bytes(uri) == b"old"
    assert storage.list_files(str(tmp_path)) == [uri]


def test_a_file_that_cannot_be_written_to_its_end_is_not_there(tmp_path: Path) -> None:
    uri = str(tmp_path / "state.json")
    storage.write_bytes(uri, b"old")
    writer = subprocess.run(
        [sys.executable, "-c", FULL, uri], env=off_cluster(), capture_output=True, text=True, check=False
    )
    assert writer.returncode == 1
    assert "File too large" in writer.stderr
    assert storage.read_bytes(uri) == b"old"
    assert storage.list_files(str(tmp_path)) == [uri]
