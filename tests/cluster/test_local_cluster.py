"""`cluster/local.py` with real nodes: they take work, they can be lost, and nothing stays behind."""

import importlib.util
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "cluster/local.py"
# Generous: the nodes are up in 10 s on an idle machine, and in a minute on a crowded one.
DEADLINE_S = 240.0

# Connects with nothing but the environment, runs one task on each node, and stays.
PROBE = """
import json, os, time, ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="ERROR")
where = ray.remote(num_cpus=1)(lambda: ray.get_runtime_context().get_node_id())
nodes = [node for node in ray.nodes() if node["Alive"]]
tasks = [
    where.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
    for node in nodes
]
ran = ray.get(tasks, timeout=60)
seen = [[node["NodeID"], node["Resources"]["CPU"], at] for node, at in zip(nodes, ran)]
print(json.dumps(seen), flush=True)
time.sleep(1000)
"""


class Run:
    """`local.py` as a child, and every process that came from it."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.out, self.err = folder / "out", folder / "err"
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, str(SCRIPT), *arguments],
                stdout=out,
                stderr=err,
                start_new_session=True,
                # Tests that run in the background of a script have inherited "ignore Ctrl-C".
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        # (pid, start time): a pid alone may come back as somebody else's.
        self.family: set[tuple[int, int]] = set()

    def wait_for(self, done: Callable[[], bool]) -> None:
        deadline = time.monotonic() + DEADLINE_S
        while not done():
            if time.monotonic() > deadline:
                self.process.send_signal(signal.SIGTERM)
                raise AssertionError(f"not done within {DEADLINE_S:g} s: {self.err.read_text()}")
            self._note_children()
            time.sleep(0.1)

    def ended(self) -> int:
        self.wait_for(lambda: self.process.poll() is not None)
        return self.process.returncode

    def left(self) -> list[str]:
        # A moment for what was killed to be reaped by init.
        deadline = time.monotonic() + 5
        while (left := self.family & _alive().keys()) and time.monotonic() < deadline:
            time.sleep(0.1)
        return [Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid, _ in left]

    def _note_children(self) -> None:
        alive = _alive()
        known = {pid for pid, _ in self.family} | {self.process.pid}
        # Parents are noted before their children on the next round; the rounds are short.
        self.family |= {key for key, parent in alive.items() if parent in known}


def _alive() -> dict[tuple[int, int], int]:
    """Parent of each live process by (pid, start time); without zombies."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(") ")[2].split()
            except OSError:
                continue
            if fields[0] != "Z":
                found[int(entry.name), int(fields[19])] = int(fields[1])
    return found


@pytest.fixture(scope="module")
def local() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("cluster_local", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_command_on_three_nodes_until_sigterm(tmp_path: Path) -> None:
    run = Run(tmp_path, "--nodes", "3", "--cpus", "1", "--", sys.executable, "-c", PROBE)
    run.wait_for(lambda: run.out.read_text().endswith("\n") or run.process.poll() is not None)
    nodes = json.loads(run.out.read_text() or run.err.read_text())
    assert len({node for node, _, _ in nodes}) == 3
    assert all(cpus == 1 and ran_at == node for node, cpus, ran_at in nodes)
    # Nodes, raylets and workers, or the count below proves nothing.
    assert len(run.family) > 10
    run.process.send_signal(signal.SIGTERM)
    assert run.ended() == 128 + signal.SIGTERM, run.err.read_text()
    assert run.left() == []


def test_hold_lose_a_node_and_stop(tmp_path: Path) -> None:
    run = Run(tmp_path, "--nodes", "2", "--cpus", "1")
    run.wait_for(lambda: "Ctrl-C stops" in run.err.read_text() or run.process.poll() is not None)
    exports = dict(
        shlex.split(line)[1].split("=", 1) for line in run.out.read_text().splitlines() if line.startswith("export ")
    )
    assert {"RAY_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} <= exports.keys(), run.err.read_text()
    found = re.search(r"node-1: kill -9 -- -(\d+)", run.err.read_text())
    assert found
    os.killpg(int(found[1]), signal.SIGKILL)
    run.wait_for(lambda: "node-1 has stopped; nodes left: 1" in run.err.read_text())
    run.process.send_signal(signal.SIGINT)
    assert run.ended() == 0, run.err.read_text()
    assert run.left() == []


@pytest.mark.parametrize(("script", "status"), [("exit 7", 7), ("kill -9 $$", 128 + 9), ("exit 0", 0)])
def test_status_is_that_of_the_command(local: ModuleType, script: str, status: int) -> None:
    assert local._run(["sh", "-c", script], dict(os.environ)) == status


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--nodes", "0"], ("--nodes", "greater than or equal to 1")),
        (["--cpus", "two"], ("--cpus", "valid integer")),
        (["--object-store-mb", "8"], ("--object-store-mb", "greater than or equal to 80")),
        (["--node", "3"], ("No such option", "--nodes")),
        (["--", "no-such-program"], ("no-such-program", "no such command")),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], named: tuple[str, ...]) -> None:
    environment = {**os.environ, "COLUMNS": "200", "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env=environment, timeout=60
    )
    assert done.returncode == 2
    assert all(part in done.stderr for part in named), done.stderr
    assert "Traceback" not in done.stderr
