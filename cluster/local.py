"""Several Ray nodes on one machine: what a cluster does, without a cluster.

With a command, as in `python cluster/local.py --nodes 3 --cpus 2 -- rayemb demo`, it runs that and ends with it.
Without one it prints what to export elsewhere, and runs until Ctrl-C.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from pydantic import ValidationError

from rayemb.cluster import START_DEADLINE_S, STOP_DEADLINE_S, ClusterConfig, ClusterError, Head, local_head
from rayemb.errors import RayembError

POLL_S = 0.2


@dataclass(frozen=True)
class Worker:
    """A worker node of ours: its Ray node name, its process (leader of its own group) and its log."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path


@contextlib.contextmanager
def local_cluster(nodes: int, cpus: int, object_store_mb: int) -> Iterator[tuple[Head, list[Worker]]]:
    """A head and `nodes - 1` workers on this machine, each a Ray node with `cpus` CPUs; stopped on exit.

    The nodes share the machine's cores and memory: this shows scheduling and the loss of a node, not speed.
    Raises ClusterError with the end of a node's log if it is not up within 90 s.
    """
    with local_head(ClusterConfig(num_cpus=cpus, object_store_mb=object_store_mb)) as head:
        environment = client_environment(head)
        workers: list[Worker] = []
        try:
            for number in range(1, nodes):
                workers.append(_start_worker(f"node-{number}", head, environment, cpus, object_store_mb))
                # One after the other: two that start at once pick the same socket name, and one hangs.
                _wait_until_up(workers[-1])
            yield head, workers
        finally:
            _stop([worker.process for worker in workers])


def client_environment(head: Head) -> dict[str, str]:
    """The environment of a process that works on the cluster of `head`: ours, address, token, settings."""
    # `ray` and `rayemb` of this interpreter, also where its environment was not activated.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    return {**os.environ, **head.environment(), "PATH": path}


def _start_worker(name: str, head: Head, environment: Mapping[str, str], cpus: int, object_store_mb: int) -> Worker:
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--address={head.address}"),
        *("--node-ip-address=127.0.0.1", f"--node-name={name}", f"--num-cpus={cpus}"),
        f"--object-store-memory={object_store_mb << 20}",
        # Nodes of one machine share its ports: with fixed ranges two raylets give two workers the same port,
        # and only the first agent gets its default port. 0 lets the kernel choose.
        *("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"),
    ]
    log = head.log.parent / f"{name}.log"
    # Ray refuses several nodes on macOS and Windows unless told that it is meant.
    env = {**environment, "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True)
    return Worker(name, process, log)


def _wait_until_up(worker: Worker) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    # `ray start` writes this line after the head has listed the node as alive.
    while b"Ray runtime started" not in worker.log.read_bytes():
        ended = worker.process.poll() is not None
        if ended or time.monotonic() > deadline:
            what = "the node ended as it started" if ended else f"the node was not up within {START_DEADLINE_S:g} s"
            tail = worker.log.read_text(errors="replace")[-1500:]
            raise ClusterError(f"{what}; the end of its log:\n{tail}", where=worker.name)
        time.sleep(POLL_S)


def _stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    # By process id and group of our own children, all at once: `ray stop` would end every Ray of this user.
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
    deadline = time.monotonic() + STOP_DEADLINE_S
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.0, deadline - time.monotonic()))
        # What a killed node left behind (its raylet's workers) is still in its group.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """The exit status of `command`, as a shell would give it; ended with us if we are told to stop."""
    # In our own process group, so that it keeps the terminal: Ctrl-C reaches it directly, and we wait for it.
    process = subprocess.Popen(command, env=environment)
    try:
        while True:
            try:
                status = process.wait()
                return status if status >= 0 else 128 - status
            except KeyboardInterrupt:
                continue
    finally:
        _stop_command(process)


def _stop_command(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _hold(head: Head, workers: Sequence[Worker]) -> int:
    """Waits for Ctrl-C, telling of nodes that go. Returns 0, or 1 if the head is gone."""
    alive = list(workers)
    try:
        while head.process.poll() is None:
            for worker in [each for each in alive if each.process.poll() is not None]:
                alive.remove(worker)
                _say(f"{worker.name} has stopped; nodes left: {1 + len(alive)}")
            time.sleep(POLL_S)
    except KeyboardInterrupt:
        return 0
    _say("the head has stopped, and the cluster with it")
    return 1


def _say(message: str) -> None:
    # Standard output is for the command, or for the lines to export.
    print(message, file=sys.stderr, flush=True)


def _terminated(number: int, _frame: FrameType | None) -> None:
    # An exception rather than sudden death: the nodes are stopped on the way out. A second one is ignored.
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)


def main(
    command: Annotated[
        list[str] | None,
        typer.Argument(help="what to run on the cluster; its exit status is ours. Without it: run until Ctrl-C"),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, max=32, help="Ray nodes, the head included")] = 3,
    cpus: Annotated[int, typer.Option(min=1, help="logical CPUs of each node (may exceed the cores)")] = 2,
    object_store_mb: Annotated[int, typer.Option(min=80, help="object store of each node, MiB")] = 150,
) -> None:
    """Start several Ray nodes on this machine and run COMMAND on them, or wait until Ctrl-C.

    COMMAND gets RAY_ADDRESS, RAY_AUTH_MODE and RAY_AUTH_TOKEN; put -- before it if it has options of its own.
    Only processes started here are stopped: other Ray clusters of this machine are left alone.
    """
    if command and shutil.which(command[0]) is None:
        raise ClusterError("no such command", where=command[0], fix="give a program on PATH, or a path to one")
    for number in (signal.SIGTERM, signal.SIGHUP):
        # Ignored already: somebody used nohup.
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _terminated)
    _say(f"starting {nodes} Ray nodes with {cpus} CPUs each ...")
    with local_cluster(nodes, cpus, object_store_mb) as (head, workers):
        _say(f"{nodes} nodes at {head.address}, dashboard {head.dashboard}")
        if command:
            status = _run(command, client_environment(head))
        else:
            for key, value in head.environment().items():
                print(f"export {key}={shlex.quote(value)}", flush=True)
            for worker in workers:
                _say(f"{worker.name}: kill -9 -- -{worker.process.pid}   # to lose this node")
            _say("Ctrl-C stops all nodes")
            status = _hold(head, workers)
        # A second Ctrl-C would leave nodes behind.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        _say("stopping ...")
    raise SystemExit(status)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    # Options after COMMAND are the command's own.
    app.command(context_settings={"allow_interspersed_args": False})(main)
    try:
        app()
    except (RayembError, ValidationError) as problem:
        _say(f"error: {problem}")
        sys.exit(2)
