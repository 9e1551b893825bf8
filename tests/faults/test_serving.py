"""Service goes on while parts of it are killed, hang or lose their storage; no answer is silently less than whole."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from rayemb.index import IndexArtefactError, load_manifest
from rayemb.index.shard import verified_path
from rayemb.serve import ServeConfig
from rayemb.serve.config import SpreadConfig
from rayemb.serve.deploy import APP_NAME, Server, start
from tests.environment import off_cluster
from tests.faults.test_training import small_disk as small_disk
from tests.serve.conftest import World
from tests.serve.conftest import world as world
from tests.storage.conftest import s3 as s3
from tests.storage.conftest import s3_endpoint as s3_endpoint

K, DEADLINE_S = 50, 4.0
# What the issue asks for, under its load.
PER_SECOND, WHOLE_AGAIN_S = 20, 15.0
CONFIG = ServeConfig(
    port=0,
    topology="spread",
    replicas=2,
    num_cpus=0.2,
    max_k=K,
    deadline_s=DEADLINE_S,
    spread=SpreadConfig(hedge_floor_s=0.05),
)


@dataclass(frozen=True)
class Answer:
    """What became of a request; `status` 0: no answer at all."""

    at: float
    seconds: float
    status: int
    missing: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()


def ask(url: str, text: str = "red circle") -> Answer:
    """One search, tried once."""
    began = time.monotonic()
    body = json.dumps({"text": text, "k": K}).encode()
    request = urllib.request.Request(f"{url}/v1/search", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            found, status = json.load(answer), answer.status
    except urllib.error.HTTPError as error:
        return Answer(began, time.monotonic() - began, error.code)
    except OSError:
        return Answer(began, time.monotonic() - began, 0)
    ids = tuple(hit["id"] for hit in found["hits"])
    return Answer(began, time.monotonic() - began, status, tuple(found["missing_shards"]), ids)


class Load:
    """Requests at a steady rate, whatever becomes of those before, while the block lasts."""

    def __init__(self, url: str) -> None:
        self._url, self.answers = url, list[Answer]()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Load":
        self._thread.start()
        time.sleep(1.0)
        return self

    def __exit__(self, *problem: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        with ThreadPoolExecutor(100) as pool:
            while not self._over.wait(1 / PER_SECOND):
                pool.submit(lambda: self.answers.append(ask(self._url)))

    @property
    def statuses(self) -> dict[int, int]:
        """How many answers have each status."""
        seen = [answer.status for answer in self.answers]
        return {status: seen.count(status) for status in sorted(set(seen))}


def replicas(part: str) -> list[psutil.Process]:
    """The processes of a deployment, of this session's own cluster."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline()[:1] and f"ServeReplica:{APP_NAME}:{part}" in process.cmdline()[0]:
                found.append(process)
        except psutil.Error:
            continue
    return found


def until(there: Callable[[], bool], within_s: float = 90.0) -> None:
    """Waits."""
    deadline = time.monotonic() + within_s
    while not there():
        assert time.monotonic() < deadline, "it did not come back"
        time.sleep(0.1)


def kill_one(part: str) -> float:
    """Kills one of two, and gives the time."""
    first, *_ = replicas(part)
    os.kill(first.pid, signal.SIGKILL)
    return time.monotonic()


def both(part: str) -> bool:
    return len(replicas(part)) == 2


@pytest.fixture(scope="module")
def service(ray_cluster: str, world: World) -> Iterator[Server]:
    with start(world.model_uri, world.index_uri, CONFIG) as server:
        for part in ("gateway", "embedder", "shard-0", "shard-1"):
            until(lambda part=part: both(part))  # type: ignore[misc]
        until(lambda: all(ask(server.url).status == 200 for _ in range(20)))
        yield server


@pytest.fixture(scope="module")
def whole(world: World) -> tuple[str, ...]:
    return tuple(world.expected(world.model.embed_texts(["red circle"])[0], K))


@pytest.mark.slow
@pytest.mark.parametrize("part", ["shard-1", "embedder"])
def test_one_of_two_replicas_killed_under_load_costs_no_answer(
    service: Server, whole: tuple[str, ...], part: str
) -> None:
    with Load(service.url) as load:
        killed = kill_one(part)
        time.sleep(4.0)
    assert load.statuses == {200: len(load.answers)}
    # Not even partial ones: a replica lives.
    assert [answer.missing for answer in load.answers if answer.missing] == []
    assert {answer.ids for answer in load.answers} == {whole}
    assert sum(answer.at > killed for answer in load.answers) > PER_SECOND
    until(lambda: both(part))


@pytest.mark.slow
def test_one_of_two_gateways_killed_under_load(service: Server, whole: tuple[str, ...]) -> None:
    with Load(service.url) as load:
        killed = kill_one("gateway")
        time.sleep(5.0)
    # What it was working on is lost with it, and what the proxy sends there until it knows.
    failed = [answer for answer in load.answers if answer.status != 200]
    assert all(answer.at < killed + 2.0 for answer in failed), load.statuses
    assert len(failed) <= PER_SECOND
    assert {answer.ids for answer in load.answers if answer.status == 200} == {whole}
    until(lambda: both("gateway"))


@pytest.mark.slow
def test_a_replica_that_hangs_is_asked_around(service: Server, whole: tuple[str, ...]) -> None:
    until(lambda: all(ask(service.url).status == 200 for _ in range(20)))
    hung, *_ = replicas("shard-0")
    with Load(service.url) as load:
        os.kill(hung.pid, signal.SIGSTOP)
        try:
            time.sleep(4.0)
        finally:
            os.kill(hung.pid, signal.SIGCONT)
    assert load.statuses == {200: len(load.answers)}
    assert [answer.missing for answer in load.answers if answer.missing] == []
    assert {answer.ids for answer in load.answers} == {whole}


@pytest.mark.slow
def test_a_shard_that_hangs_is_missing_after_the_deadline_and_back_with_its_replicas(
    service: Server, whole: tuple[str, ...], world: World
) -> None:
    second = {row["id"] for row in world.rows[load_manifest(world.index_uri).shards[1].start :]}
    hung = replicas("shard-1")
    for process in hung:
        os.kill(process.pid, signal.SIGSTOP)
    try:
        answers = [ask(service.url) for _ in range(4)]
    finally:
        for process in hung:
            os.kill(process.pid, signal.SIGCONT)
    assert {answer.status for answer in answers} == {200}
    assert {answer.missing for answer in answers} == {("shard-1",)}
    assert all(second.isdisjoint(answer.ids) for answer in answers)
    assert all(answer.seconds < DEADLINE_S + 3.0 for answer in answers)
    began = time.monotonic()
    until(lambda: ask(service.url).missing == (), WHOLE_AGAIN_S)
    # Each gateway learns it by itself.
    until(lambda: all(ask(service.url).ids == whole for _ in range(10)), began + WHOLE_AGAIN_S - time.monotonic())


@pytest.mark.slow
def test_a_shard_without_replicas_is_missing_until_it_is_back(
    service: Server, whole: tuple[str, ...], world: World
) -> None:
    second = {row["id"] for row in world.rows[load_manifest(world.index_uri).shards[1].start :]}
    with Load(service.url) as load:
        for process in replicas("shard-1"):
            os.kill(process.pid, signal.SIGKILL)
        killed = time.monotonic()
        until(lambda: load.answers[-1].at > killed and ask(service.url).missing == ("shard-1",), 30)
        until(lambda: all(ask(service.url).missing == () for _ in range(6)))
    assert load.statuses == {200: len(load.answers)}
    assert {answer.missing for answer in load.answers} == {(), ("shard-1",)}
    assert {answer.ids for answer in load.answers if not answer.missing} == {whole}
    assert all(second.isdisjoint(answer.ids) for answer in load.answers if answer.missing)
    until(lambda: both("shard-1"))


def test_no_room_for_the_local_copy_of_a_shard_is_told(
    world: World, s3: str, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rayemb import storage

    shard = load_manifest(world.index_uri).shards[0]
    storage.write_bytes(f"{s3}/{shard.file}", bytes(8 << 20))
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    with pytest.raises(IndexArtefactError, match="No space left") as caught:
        verified_path(s3, shard)
    assert shard.file in caught.value.where
    assert "make room" in caught.value.fix
    assert not [path for path in small_disk.rglob("*") if path.is_file()]


@pytest.mark.slow
def test_a_lost_node_and_a_lost_store(tmp_path: Path) -> None:
    environment = off_cluster()
    command = [sys.executable, "-m", "tests.faults.serving_run", str(tmp_path)]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as child:
        try:
            _, said = child.communicate(timeout=400)
        except subprocess.TimeoutExpired:
            child.terminate()  # it stops its nodes on the way out
            _, said = child.communicate(timeout=60)
    assert child.returncode == 0, said[-3000:]
    found: dict[str, Any] = json.loads((tmp_path / "found.json").read_text())
    assert found["whole"] == found["expected"]
    # Else the loss of a node could take every replica of a shard.
    assert set(found["nodes"].values()) == {2}, found["nodes"]
    # Without the store all goes on but what reads vectors or pictures of it, and that says so.
    assert found["without_store"] == found["asked"]
    assert (found["diverse_with_store"], found["diverse_without_store"]) == (200, 503)
    # A gateway and a proxy were on the node: what these worked on is lost, no more.
    node = found["node"]
    assert node["wrong"] == 0
    assert node["whole_after_s"] < WHOLE_AGAIN_S
    assert set(node["statuses"]) <= {"0", "200", "500", "502", "503"}
    assert node["statuses"]["200"] > 2 * PER_SECOND
    sys.stdout.write(f"a node killed: {node}\n")
