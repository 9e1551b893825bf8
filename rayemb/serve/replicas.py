"""How many replicas each deployment has, and that they lie on different nodes.

Serve's scheduler may put two replicas of a shard on one node; while that node is gone, answers lack the shard.
"""

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import ray

from rayemb.serve.config import Part, ServeConfig

_MOST = 100  # that Serve takes for a bound


def replica_options(parts: Mapping[str, Part], config: ServeConfig) -> dict[str, dict[str, Any]]:
    """Serve's options of each deployment. `parts`: the deployments by name, and which part each is.

    On the cluster that this process is connected to, if it is, a node gets no more replicas than its even share.
    """
    cpus = [node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"]] if ray.is_initialized() else []
    bounds = per_node({name: config.most(part) for name, part in parts.items()}, config.num_cpus, cpus)
    return {name: _options(part, config, bounds.get(name)) for name, part in parts.items()}


def per_node(replicas: Mapping[str, int], num_cpus: float, cpus: Sequence[float]) -> dict[str, int]:
    """How many replicas of each deployment one node may hold; empty: no bound.

    `replicas`: of each deployment, at most; `num_cpus`: of a replica; `cpus`: of each node. They are spread over as
    many nodes as can hold an even share of everything, so that with the bound all of them still find room.
    """
    ranked = sorted(cpus, reverse=True)
    for nodes in range(len(ranked), 1, -1):
        share = {name: ceil(count / nodes) for name, count in replicas.items()}
        if sum(share.values()) * num_cpus <= ranked[nodes - 1] and max(share.values()) <= _MOST:
            return share
    return {}


def _options(part: Part, config: ServeConfig, on_a_node: int | None) -> dict[str, Any]:
    scaling = config.scaling.get(part)
    replicas: dict[str, Any] = {"num_replicas": config.replicas}
    if scaling is not None:
        bounds = {"min_replicas": scaling.min_replicas, "max_replicas": scaling.max_replicas}
        replicas = {"autoscaling_config": {**bounds, "target_ongoing_requests": scaling.target_ongoing}}
    return {
        **replicas,
        "max_replicas_per_node": on_a_node,
        "ray_actor_options": {"num_cpus": config.num_cpus},
        "graceful_shutdown_timeout_s": 5,
        # By default a replica that died at rest is missed after 10 s, and one that hangs after 30 s more.
        "health_check_period_s": 2,
        "health_check_timeout_s": 20,
    }
