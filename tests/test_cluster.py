"""Clusters: the private one starts, is used and leaves nothing behind."""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest

from rayemb.cluster import ClusterConfig, ClusterError, _environment, _free_ports, connect, local_head, require_cpus
from rayemb.config import ConfigError, from_mapping


def processes() -> dict[int, str]:
    """The command line of every live process, by its id."""
    found = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if (folder / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                    found[int(folder.name)] = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except (FileNotFoundError, ProcessLookupError):
                continue
    return found


def test_what_is_there_is_enough(ray_cluster: str) -> None:
    require_cpus(4, "a test")


def test_more_cpus_than_there_are_is_an_error(ray_cluster: str) -> None:
    with pytest.raises(ClusterError, match="a test needs 5 CPUs and the cluster has 4") as caught:
        require_cpus(5, "a test")
    assert "fewer workers" in caught.value.fix


def test_inside_a_connected_process_that_connection_is_used(ray_cluster: str) -> None:
    import ray

    with connect(ClusterConfig(num_cpus=1)) as address:
        # Ray writes a loopback address as the node's own; the port tells the cluster.
        assert address.rpartition(":")[2] == ray_cluster.rpartition(":")[2]
    assert ray.is_initialized()


def test_the_config_is_checked() -> None:
    with pytest.raises(ConfigError, match="num_cpus"):
        from_mapping(ClusterConfig, {"num_cpus": 0})
    with pytest.raises(ConfigError, match="object_store_mb"):
        from_mapping(ClusterConfig, {"object_store_mb": 10})


def test_ports_are_distinct_and_above_rays_own() -> None:
    ports = _free_ports(20)
    assert len(set(ports)) == 20
    assert all(port > 20000 for port in ports)


def test_the_environment_is_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYEMB_TEST_A", "before")
    monkeypatch.delenv("RAYEMB_TEST_B", raising=False)
    inside = None
    with contextlib.suppress(RuntimeError), _environment({"RAYEMB_TEST_A": "1", "RAYEMB_TEST_B": "2"}):
        inside = (os.environ["RAYEMB_TEST_A"], os.environ["RAYEMB_TEST_B"])
        raise RuntimeError
    assert inside == ("1", "2")
    assert os.environ["RAYEMB_TEST_A"] == "before"
    assert "RAYEMB_TEST_B" not in os.environ


def jobs_status(dashboard: str, token: str | None) -> int:
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(f"{dashboard}/api/jobs/", headers=headers)) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


# In a process of its own: this one may be connected to the session's cluster already.
USE = """
import ray
from rayemb.cluster import connect
with connect() as address:
    print("at", address, ray.get(ray.remote(lambda: 6 * 7).remote()), ray.cluster_resources()["trial_slot"])
print("done", ray.is_initialized())
"""


@pytest.mark.slow
def test_a_private_head_starts_is_used_and_leaves_nothing() -> None:
    before = processes()
    with local_head(ClusterConfig(num_cpus=1, object_store_mb=80, trial_slots=3), env={"RAYEMB_TEST": "1"}) as head:
        folder = head.log.parent
        assert head.process.poll() is None
        # Its job server runs whatever it is sent: only for those who hold the token.
        assert jobs_status(head.dashboard, token=None) in (401, 403)
        assert jobs_status(head.dashboard, token="0" * 64) in (401, 403)
        assert jobs_status(head.dashboard, token=head.token) == 200
        environment = {**os.environ, **head.environment()}
        run = subprocess.run([sys.executable, "-c", USE], env=environment, capture_output=True, text=True, check=False)
        assert f"at {head.address} 42 3.0\ndone False" in run.stdout, run.stderr
        assert any(str(folder) in command for command in processes().values())
    assert head.process.poll() is not None
    assert not folder.exists()
    left = {pid: command for pid, command in processes().items() if pid not in before and str(folder) in command}
    assert not left


START = """
import time
from rayemb.cluster import ClusterConfig, local_head
with local_head(ClusterConfig(num_cpus=1, object_store_mb=80), jobs=False) as head:
    print(head.log.parent, flush=True)
    time.sleep(600)
"""


@pytest.mark.slow
def test_a_head_ends_with_the_process_that_started_it() -> None:
    with subprocess.Popen([sys.executable, "-c", START], stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        folder = Path(owner.stdout.readline().strip())
        try:
            assert any(str(folder) in command for command in processes().values())
            owner.kill()  # it cannot tidy up
            deadline = time.monotonic() + 60
            while left := [command for command in processes().values() if str(folder) in command]:
                assert time.monotonic() < deadline, left
                time.sleep(0.5)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def test_a_head_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rayemb.cluster.sys.executable", "/bin/false")
    with pytest.raises(ClusterError, match="ended as it started"), local_head():
        raise AssertionError("it cannot have started")


@pytest.mark.slow
def test_a_head_that_ray_gives_up_is_started_again() -> None:
    stopped: list[psutil.Process] = []
    named: list[str] = []

    def nodes() -> set[psutil.Process]:
        return {each for each in psutil.Process().children(recursive=True) if each.name() == "raylet"}

    before = nodes()  # the cluster that the tests share

    def stop_the_first_node() -> None:
        while not stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                stopped.extend(nodes() - before)
            time.sleep(0.01)
        stopped[0].suspend()
        named.extend(re.findall(r"/tmp/rayemb-\w+", " ".join(stopped[0].cmdline())))

    slow = threading.Thread(target=stop_the_first_node, daemon=True)
    slow.start()
    with local_head(ClusterConfig(num_cpus=1, object_store_mb=80), jobs=False) as head:
        slow.join()
        environment = {**os.environ, **head.environment()}
        run = subprocess.run([sys.executable, "-c", USE], env=environment, capture_output=True, text=True, check=False)
        assert f"at {head.address} 42 2.0\ndone False" in run.stdout, run.stderr
    given_up = named[0]
    assert str(head.log.parent) != given_up
    assert not os.path.exists(given_up)
    assert not [command for command in processes().values() if given_up in command]
