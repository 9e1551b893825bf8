"""A Ray cluster to work on: the one at `RAY_ADDRESS`, or a private one on this machine for as long as it is needed."""

import contextlib
import ctypes
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from rayemb.config import Config
from rayemb.errors import RayembError
from rayemb.storage import environment as _environment

logger = logging.getLogger(__name__)

START_DEADLINE_S = 150.0
STOP_DEADLINE_S = 6.0
POLL_S = 0.2
# Settings that every process of a rayemb cluster shares; each one was measured to be needed or to hurt when absent.
ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    # Else every print of a training function shows up twice.
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",
    # How soon Train's controller sees a report or a dead worker.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_DEDUP_LOGS": "1",
    # Offline machines must not try the hub.
    "HF_HUB_OFFLINE": "1",
}


class ClusterError(RayembError):
    """No usable Ray cluster: not reachable, too small, or it did not start in time."""


class _GivenUpError(ClusterError):
    """Ray ended its own node since that was not up after 30 s, a limit of Ray's that nothing sets."""


class ClusterConfig(Config):
    """The cluster to work on."""

    address: str | None = Field(None, description="host:port of a running cluster; default RAY_ADDRESS, else a new one")
    num_cpus: int | None = Field(
        None, ge=1, description="logical CPUs of a new local cluster; default: the cores, at least 4"
    )
    object_store_mb: int = Field(500, ge=80, description="object store of a new local cluster, MiB")
    trial_slots: int = Field(2, ge=1, description="Tune trials that a new local cluster runs at once")


@dataclass(frozen=True)
class Head:
    """A running head node of ours: its GCS address, its dashboard (job server) and its process."""

    address: str
    dashboard: str
    token: str
    process: subprocess.Popen[bytes]
    log: Path

    def environment(self) -> dict[str, str]:
        """What a process must have in its environment to speak to this cluster."""
        return {**ENVIRONMENT, **_access(self.address, self.token)}


@contextlib.contextmanager
def local_head(
    config: ClusterConfig | None = None, env: Mapping[str, str] | None = None, *, jobs: bool = True
) -> Iterator[Head]:
    """A private Ray head on loopback, stopped on exit; with a dashboard and job server if it takes `jobs`.

    Without them it has nine processes and 0.4 GB less. `env` is inherited by every worker. A child process rather than
    `ray.init(address="local")`, because Train and Tune look up `RAY_ADDRESS` inside their workers and leak a stopped
    trial's resources where it is missing. Started again where Ray gave it up, as it does on a machine full of work.
    Raises ClusterError with the end of Ray's log if it is not up within 150 s.
    """
    config, deadline = config or ClusterConfig(), time.monotonic() + START_DEADLINE_S
    while True:
        try:
            head = _start(config, env or {}, jobs, deadline)
            break
        except _GivenUpError:
            if time.monotonic() > deadline:
                raise
            logger.info("Ray gave up its node after 30 s; another is started")
    try:
        yield head
    finally:
        _end(head)


def _start(config: ClusterConfig, env: Mapping[str, str], jobs: bool, deadline: float) -> Head:
    """A head that is up. Raises ClusterError, and leaves nothing, if there is none before `deadline`."""
    # Short: Ray's socket paths must stay under 107 bytes.
    folder = Path(tempfile.mkdtemp(prefix="rayemb-", dir="/tmp" if os.path.isdir("/tmp") else None))
    ports = _free_ports(5)
    address, dashboard = f"127.0.0.1:{ports[0]}", f"http://127.0.0.1:{ports[1]}"
    command = [
        *(sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--disable-usage-stats"),
        *("--node-ip-address=127.0.0.1", f"--port={ports[0]}", f"--dashboard-port={ports[1]}"),
        *(f"--dashboard-agent-listen-port={ports[2]}", f"--metrics-export-port={ports[3]}"),
        *(f"--ray-client-server-port={ports[4]}", f"--temp-dir={folder}"),
        f"--num-cpus={config.num_cpus or max(4, os.cpu_count() or 1)}",
        f"--object-store-memory={config.object_store_mb << 20}",
        f'--resources={{"trial_slot": {config.trial_slots}}}',
        *(() if jobs else ("--include-dashboard=false", "--include-log-monitor=false")),
    ]
    log, token = folder / "head.log", secrets.token_hex(32)
    bin_dir = str(Path(sys.executable).parent)
    environment = {
        # Ray has workers give way to everything else on their machine, by 15; a cluster of ours is there for them.
        "RAY_worker_niceness": "0",
        **os.environ,
        **ENVIRONMENT,
        **_access(address, token),
        "PATH": f"{bin_dir}{os.pathsep}{os.environ.get('PATH', '')}",
        **env,
    }
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            preexec_fn=_end_with_parent(),
        )
    head = Head(address, dashboard, token, process, log)
    try:
        _wait_until_up(head, ports[1] if jobs else None, deadline)
    except BaseException:
        _end(head)
        raise
    return head


def _end(head: Head) -> None:
    _stop(head.process)
    shutil.rmtree(head.log.parent, ignore_errors=True)


@contextlib.contextmanager
def connect(
    config: ClusterConfig | None = None, env: Mapping[str, str] | None = None, *, dashboard: bool = False
) -> Iterator[str]:
    """This process connected to Ray; gives the cluster's address.

    Uses `config.address`, else `RAY_ADDRESS`, else starts a private local cluster and stops it on exit. Inside a
    process that is already connected (a Ray job, a test) that connection is used and left as it is.
    `env` is set here and in every worker of this connection. `dashboard`: a private cluster has one, as sweeps need it:
    Train asks it whether the controller of a stopped trial lives, and keeps its CPUs where nobody answers.
    Raises ClusterError if the cluster cannot be reached.
    """
    config, env = config or ClusterConfig(), dict(env or {})
    import ray

    if ray.is_initialized():
        if any(os.environ.get(name) != value for name, value in env.items()):
            logger.warning("already connected: %s reach this process but not its workers", ", ".join(sorted(env)))
        with _environment(env):
            yield ray.get_runtime_context().gcs_address
        return
    address = config.address or os.environ.get("RAY_ADDRESS")
    with contextlib.ExitStack() as stack:
        options: dict[str, Any] = {}
        if address:
            settings: dict[str, str] = {}
            if env:
                # Not `env_vars`: Ray writes those to its log, and a key to a store may be among them.
                options["runtime_env"] = {"worker_process_setup_hook": _sets(env)}
        else:
            head = stack.enter_context(local_head(config, env, jobs=dashboard))
            address, settings = head.address, head.environment()
        # The driver alone: an actor pool of Ray Data writes an error of no consequence to the terminal (ray #53727).
        driver = {"RAY_BACKEND_LOG_LEVEL": os.environ.get("RAY_BACKEND_LOG_LEVEL", "fatal")}
        stack.enter_context(_environment({**ENVIRONMENT, **settings, **driver, **env}))
        _reload_ray_settings()
        try:
            with _muted_stderr():  # Ray's C++ side announces the log level that is set above
                ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **options)
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ClusterError(
                f"no Ray cluster answers ({' '.join(str(error).split())[:300]})",
                where=address,
                fix="start one, mend RAY_ADDRESS, or unset it to get a private local cluster",
            ) from error
        stack.callback(ray.shutdown)
        _quiet_ray_data()
        yield address


def require_cpus(needed: float, purpose: str) -> None:
    """Checks that the connected cluster has `needed` CPUs at all, free or not. Raises ClusterError if not.

    Ray itself would wait for them without limit.
    """
    import ray

    total = float(ray.cluster_resources().get("CPU", 0.0))
    if total + 1e-9 < needed:
        raise ClusterError(
            f"{purpose} needs {needed:g} CPUs and the cluster has {total:g}",
            where="cluster",
            fix="ask for fewer workers, lower their CPUs, or add nodes (cluster.num_cpus for a local cluster)",
        )


def _sets(env: Mapping[str, str]) -> Callable[[], None]:
    def apply() -> None:
        os.environ.update(env)

    return apply


def _access(address: str, token: str) -> dict[str, str]:
    # A token of its own for each private cluster: nobody else on the machine can submit work to it.
    return {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}


def _free_ports(count: int) -> list[int]:
    """Free loopback ports outside Ray's worker range 10002-19999 (the kernel's ephemeral range lies above it)."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _wait_until_up(head: Head, dashboard_port: int | None, deadline: float) -> None:
    while not (ended := head.process.poll() is not None) and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            if dashboard_port is not None:
                socket.create_connection(("127.0.0.1", dashboard_port), timeout=1).close()
            if b"Ray runtime started" in head.log.read_bytes():
                return
        time.sleep(POLL_S)
    tail = head.log.read_text(errors="replace")[-1500:]
    kind = _GivenUpError if "timed out during startup" in tail else ClusterError
    what = "ended as it started" if ended else f"did not start within {START_DEADLINE_S:g} s"
    raise kind(f"the local Ray head {what}:\n{tail}", where="cluster")


def _end_with_parent() -> Callable[[], object] | None:
    """For a child to call before it runs: SIGTERM comes to it when this process ends, however that ends."""
    # Linux sends it when the thread that made the child ends, and no thread but the main one is sure to last.
    if sys.platform != "linux" or threading.current_thread() is not threading.main_thread():
        return None
    prctl, set_parent_death_signal = ctypes.CDLL(None).prctl, 1
    return lambda: prctl(set_parent_death_signal, signal.SIGTERM)


def _stop(process: subprocess.Popen[bytes]) -> None:
    # SIGTERM to our own child only: `ray stop` would kill every Ray process of this user.
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_DEADLINE_S)
        except subprocess.TimeoutExpired:
            logger.debug("the local Ray head did not stop within %g s; killing it", STOP_DEADLINE_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def _muted_stderr() -> Iterator[None]:
    """Nothing that native code writes to file descriptor 2 shows; what Python raises still does."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as sink:
            os.dup2(sink.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _quiet_ray_data() -> None:
    # Its bars and plans would write over our own progress, one block per dataset.
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    for name in ("ray.data", "ray.train", "ray.tune", "ray.serve"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _reload_ray_settings() -> None:
    # Ray reads its environment once, at import; a token that came later is seen only after this.
    from ray._raylet import AuthenticationTokenLoader  # type: ignore[attr-defined]
    from ray._raylet import Config as RayConfig  # type: ignore[attr-defined]

    RayConfig.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()
