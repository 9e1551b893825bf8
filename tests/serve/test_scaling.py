"""How many replicas each part gets, and how they come to be more."""

from typing import Any

import pytest
from pydantic import ValidationError

from rayemb.serve.config import ServeConfig
from rayemb.serve.deploy import application
from tests.serve.conftest import World

SHARDS: Any = {"min_replicas": 2, "max_replicas": 5, "target_ongoing": 0.7}


def test_parts_have_the_replicas_they_were_given() -> None:
    config = ServeConfig(topology="spread", replicas=2, num_cpus=0.5, scaling={"shards": SHARDS})
    assert [config.least(part) for part in ("gateway", "embedder", "shards")] == [2, 2, 2]
    assert [config.most(part) for part in ("gateway", "embedder", "shards")] == [2, 2, 5]
    assert config.cpus_needed(4) == (2 + 2 + 4 * 2) * 0.5
    assert ServeConfig(replicas=3, num_cpus=1).cpus_needed(4) == 3
    wrong: Any
    for wrong in ({"router": SHARDS}, {"shards": {}}, {"shards": {"min_replicas": 3, "max_replicas": 2}}):
        with pytest.raises(ValidationError, match="scaling"):
            ServeConfig(scaling=wrong)


def test_serve_scales_what_is_named_and_nothing_else(world: World) -> None:
    config = ServeConfig(topology="spread", replicas=2, scaling={"shards": SHARDS})
    app: Any = application(world.model_uri, world.index_uri, config)
    gateway = app._bound_deployment
    *_, embedder, shards = gateway.init_args
    parts = [gateway, embedder._bound_deployment, *(shard._bound_deployment for shard in shards)]
    scaled = {part.name: part._deployment_config.autoscaling_config for part in parts}
    assert {name for name, found in scaled.items() if found} == {"shard-0", "shard-1"}
    found = scaled["shard-0"]
    assert (found.min_replicas, found.max_replicas, found.target_ongoing_requests) == (2, 5, 0.7)
    assert {part.num_replicas for part in parts[:2]} == {2}
