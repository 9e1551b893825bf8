"""A node is killed, a node is added: the run goes on with fewer workers, then with more, over the same batches."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.environment import off_cluster


@pytest.mark.slow
def test_a_lost_node_and_a_new_one_change_the_number_of_workers_and_nothing_else(tmp_path: Path) -> None:
    environment = off_cluster()
    command = [sys.executable, "-m", "tests.faults.elastic_run", str(tmp_path)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as child:
        try:
            _, said = child.communicate(timeout=800)
        except subprocess.TimeoutExpired:
            child.terminate()  # it stops its nodes on the way out
            _, said = child.communicate(timeout=60)
    assert child.returncode == 0, said[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["steps"] == list(range(1, 101))
    assert found["losses"] == pytest.approx(found["whole"], rel=1e-5)
    workers = found["workers"]
    # Three, then two, then three again.
    assert [a for a, b in zip(workers, [*workers[1:], 0], strict=True) if a != b] == [3, 2, 3]
    for what in ("killed", "added"):
        at = found["times"][what]
        done = max(step for time, step in found["rows"] if time <= at)
        pause = _pause(found["rows"], at)
        sys.stdout.write(f"{what} at step {done}; longest time without a step after it: {pause:.1f} s\n")


def _pause(rows: list[tuple[float, int]], at: float) -> float:
    """The longest time between two reports that differ, after `at`."""
    moments = [time for (time, step), (_, before) in zip(rows[1:], rows[:-1], strict=True) if step != before]
    later = [time for time in moments if time >= at]
    return max(b - a for a, b in zip([at, *later], later, strict=False))
