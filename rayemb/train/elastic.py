"""How many workers a cluster has room for, now."""

import logging
import math
import socket
import time
from typing import Any

import ray
from ray._private.state import available_resources_per_node

from rayemb.cluster import ClusterError
from rayemb.train.config import TrainConfig

logger = logging.getLogger(__name__)

SETTLE_S = 2.0  # what an ended attempt held comes back over seconds


def room(config: TrainConfig) -> int:
    """Workers, and their decoders, that fit on what is free on the nodes that answer."""
    free = available_resources_per_node()
    alive = {node["NodeID"] for node in ray.nodes() if node["Alive"] and _answers(node)}
    found = [resources for node, resources in free.items() if node in alive]
    slots = sum(_slots(resources, config) for resources in found)
    # Decoders go to another node where a worker's own has no room for them.
    cpus = sum(float(resources.get("CPU", 0.0)) for resources in found)
    return min(slots, math.floor(cpus / config.cpus_of_one + 1e-6))


def wait_for_room(config: TrainConfig) -> int:
    """The number of workers to start with: as many as there is room for, at most `config.workers`.

    Waits up to `config.wait_seconds` for the least number. Raises ClusterError after that.
    """
    least = config.least_workers
    deadline = time.monotonic() + config.wait_seconds
    found, since = -1, time.monotonic()
    while True:
        now, count = time.monotonic(), min(room(config), config.workers)
        if count != found:
            found, since = count, now
        if count == config.workers or (count >= least and now - since >= SETTLE_S):
            return count
        if now > deadline:
            raise ClusterError(
                f"there is room for {count} workers and at least {least} are wanted",
                where="train.min_workers",
                fix="add nodes, or ask for fewer; the same command goes on from the last checkpoint",
            )
        time.sleep(0.5)


def lost_nodes() -> list[str]:
    """Nodes that do not answer although Ray has not given them up yet: its own check takes a while."""
    return [node["NodeID"] for node in ray.nodes() if node["Alive"] and not _answers(node)]


def _answers(node: dict[str, Any]) -> bool:
    try:
        with socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=1.0):
            return True
    except OSError:
        return False


def _slots(resources: dict[str, float], config: TrainConfig) -> int:
    count = resources.get("CPU", 0.0) / config.cpus_per_worker
    if config.gpus_per_worker:
        count = min(count, resources.get("GPU", 0.0) / config.gpus_per_worker)
    return math.floor(count + 1e-6)
