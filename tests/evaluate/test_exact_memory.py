"""Memory that does not grow with the corpus: measured in processes of their own."""

import json
import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "jobs/bench/evaluate_memory.py"


def test_memory_is_a_block_whatever_the_rows(tmp_path: Path) -> None:
    """Four times the rows (100 MB more of vectors) take no more than a few MB more."""
    sys.path.insert(0, str(BENCH.parent))
    try:
        from evaluate_memory import table
    finally:
        sys.path.remove(str(BENCH.parent))
    peaks = {}
    for rows in (70_000, 280_000):
        folder = tmp_path / str(rows)
        folder.mkdir()
        command = [sys.executable, BENCH, "--queries", "64", "--part", "search", table(str(folder), rows, 128)]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        found = json.loads(done.stdout)
        assert found["first_is_own"] == 1
        peaks[rows] = found["peak_gb"]
    assert peaks[280_000] < peaks[70_000] + 0.06
