"""`cluster/aws.yaml` against Ray's own schema and launcher code; what AWS itself would say is not tested."""

import copy
import itertools
import json
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import ray.autoscaler
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

from rayemb.cluster import ENVIRONMENT

COMMANDS = (
    "setup_commands",
    "head_setup_commands",
    "head_start_ray_commands",
    "worker_start_ray_commands",
)


@pytest.fixture
def config(repo: Path) -> dict[str, Any]:
    return yaml.safe_load((repo / "cluster/aws.yaml").read_text())


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft7Validator:
    path = Path(ray.autoscaler.__file__).parent / "ray-schema.json"
    return jsonschema.Draft7Validator(json.loads(path.read_text()))


def test_schema(config: dict[str, Any], schema: jsonschema.Draft7Validator) -> None:
    assert [error.message for error in schema.iter_errors(config)] == []


@pytest.mark.parametrize(
    "path", [("idle_timeout_minutes",), ("docker", "image"), ("available_node_types", "gpu", "docker")]
)
def test_schema_catches_a_typo(
    config: dict[str, Any], schema: jsonschema.Draft7Validator, path: tuple[str, ...]
) -> None:
    *parents, key = path
    place = config
    for parent in parents:
        place = place[parent]
    place[f"{key}x"] = place.pop(key)
    assert any(f"'{key}x' was unexpected" in error.message for error in schema.iter_errors(config))


def test_prepared_by_the_launcher(config: dict[str, Any]) -> None:
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    types = prepared["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0, "trial_slot": 4}
    assert [types[name]["min_workers"] for name in ("cpu", "gpu")] == [1, 0]
    assert sum(types[name]["max_workers"] for name in ("cpu", "gpu")) <= prepared["max_workers"]
    # CPU nodes get the common commands, the GPU node its own in their place.
    assert prepared["worker_setup_commands"] == ["bash ~/rayemb/cluster/install.sh cpu"]
    assert types["gpu"]["worker_setup_commands"] == ["bash ~/rayemb/cluster/install.sh gpu"]
    assert prepared["head_setup_commands"][0] == "bash ~/rayemb/cluster/install.sh cpu"


def test_launcher_catches_a_wrong_head_type(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="head_node_type"):
        validate_config(prepare_config({**config, "head_node_type": "haed"}))


def test_environment_is_that_of_rayemb(config: dict[str, Any]) -> None:
    options = shlex.split(" ".join(config["docker"]["run_options"]))
    given = dict(value.split("=", 1) for flag, value in itertools.pairwise(options) if flag == "-e")
    assert given.pop("AWS_REGION") == config["provider"]["region"]
    assert given == {**ENVIRONMENT, "RAY_AUTH_MODE": "token"}


def test_images_have_the_pinned_ray(config: dict[str, Any], ray_version: str) -> None:
    gpu = config["available_node_types"]["gpu"]["docker"]["worker_image"]
    assert config["docker"]["image"] == f"rayproject/ray:{ray_version}-py311-cpu"
    assert gpu == f"rayproject/ray:{ray_version}-py311-gpu"


def test_mounted_files_exist(config: dict[str, Any], repo: Path) -> None:
    mounts = dict(config["file_mounts"])
    assert mounts.pop("~/.ray/auth_token") == "~/.ray/auth_token"
    assert [source for source in mounts.values() if not (repo / source).exists()] == []
    assert [target for target, source in mounts.items() if target != f"~/rayemb/{source}"] == []


def test_commands_use_what_is_mounted(config: dict[str, Any], repo: Path) -> None:
    commands = [command for key in COMMANDS for command in config[key]]
    commands += config["available_node_types"]["gpu"]["worker_setup_commands"]
    used = {name for command in commands for name in re.findall(r"~/rayemb/(\S+)", command)}
    mounted = tuple(config["file_mounts"].values())
    assert used == {"cluster/install.sh", "constraints.txt"}
    assert all((repo / name).is_file() and name.startswith(mounted) for name in used)
    for command in commands:
        assert subprocess.run(["bash", "-n", "-c", command]).returncode == 0, command


@pytest.mark.parametrize("key", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_ray_start_takes_the_flags(config: dict[str, Any], key: str) -> None:
    command = config[key][-1]
    assert command.startswith("export RAY_ADDRESS=")
    arguments = shlex.split(command.split("ray start", 1)[1])
    values = start.make_context("start", arguments).params
    if key.startswith("head"):
        head = config["available_node_types"]["head"]["resources"]
        assert {"CPU": values["num_cpus"], **json.loads(values["resources"])} == head
