"""The KubeRay manifests: a compact schema of the fields used, Ray's own readers of them, and our names."""

import copy
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.serve.schema import ServeDeploySchema

from rayemb.config import from_mapping, load

KINDS = ("raycluster", "rayjob", "rayservice")
# Where the cluster lies in each kind's spec.
CLUSTER = {"raycluster": None, "rayjob": "rayClusterSpec", "rayservice": "rayClusterConfig"}


def _object(required: dict[str, Any], optional: dict[str, Any] | None = None) -> dict[str, Any]:
    """The schema of a mapping with these keys and no others."""
    properties = {**required, **(optional or {})}
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items, "minItems": 1}


STRING = {"type": "string", "minLength": 1}
COUNT = {"type": "integer", "minimum": 0}
SECONDS = {"type": "integer", "minimum": 1}
PORT = {"type": "integer", "minimum": 1, "maximum": 65535}
AMOUNTS = _object(
    {
        "cpu": {"type": "string", "pattern": r"^[0-9]+m?$"},
        "memory": {"type": "string", "pattern": r"^[0-9]+(Mi|Gi)$"},
    },
    {"nvidia.com/gpu": {"type": "string", "pattern": "^[0-9]+$"}},
)
RESOURCES = _object({"requests": AMOUNTS, "limits": AMOUNTS})
PROBE = _object(
    {
        "httpGet": _object({"path": {"type": "string", "pattern": "^/"}, "port": PORT}),
        "initialDelaySeconds": SECONDS,
        "periodSeconds": SECONDS,
        "timeoutSeconds": SECONDS,
        "failureThreshold": SECONDS,
    }
)
CONTAINER = _object(
    {
        "name": {"enum": ["ray-head", "ray-worker"]},
        "image": STRING,
        "envFrom": _list(_object({"secretRef": _object({"name": STRING})})),
        "resources": RESOURCES,
        "livenessProbe": PROBE,
    },
    {
        "ports": _list(_object({"name": STRING, "containerPort": PORT})),
        "env": _list(_object({"name": STRING, "value": STRING})),
    },
)
SPREAD = _object(
    {
        "maxSkew": SECONDS,
        "topologyKey": STRING,
        "whenUnsatisfiable": {"enum": ["ScheduleAnyway", "DoNotSchedule"]},
        "labelSelector": _object({"matchLabels": {"type": "object", "additionalProperties": STRING}}),
    }
)
POD = _object(
    {
        "spec": _object(
            {
                # Autoscaler v2 asks for it.
                "restartPolicy": {"const": "Never"},
                "securityContext": _object(
                    {
                        "runAsNonRoot": {"const": True},
                        "runAsUser": SECONDS,
                        "runAsGroup": COUNT,
                        "fsGroup": COUNT,
                    }
                ),
                "containers": {**_list(CONTAINER), "maxItems": 1},
            },
            {
                "tolerations": _list(_object({"key": STRING, "operator": STRING, "effect": STRING})),
                "topologySpreadConstraints": _list(SPREAD),
            },
        )
    }
)
# Ray start parameters are strings in KubeRay, numbers included.
PARAMETERS = _object({}, {"num-cpus": STRING, "resources": STRING})
RAY_CLUSTER = _object(
    {
        "rayVersion": STRING,
        "authOptions": _object({"mode": {"const": "token"}}),
        "enableInTreeAutoscaling": {"const": True},
        "autoscalerOptions": _object(
            {"version": {"const": "v2"}, "idleTimeoutSeconds": SECONDS, "resources": RESOURCES}
        ),
        "headGroupSpec": _object({"rayStartParams": PARAMETERS, "template": POD}),
        "workerGroupSpecs": _list(
            _object(
                {
                    "groupName": STRING,
                    "replicas": COUNT,
                    "minReplicas": COUNT,
                    "maxReplicas": COUNT,
                    "rayStartParams": PARAMETERS,
                    "template": POD,
                }
            )
        ),
    }
)
RAY_JOB = _object(
    {
        "entrypoint": STRING,
        "submissionMode": {"enum": ["K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"]},
        "backoffLimit": COUNT,
        "activeDeadlineSeconds": SECONDS,
        "shutdownAfterJobFinishes": {"type": "boolean"},
        "ttlSecondsAfterFinished": COUNT,
        "rayClusterSpec": RAY_CLUSTER,
    }
)
RAY_SERVICE = _object(
    {
        "upgradeStrategy": _object({"type": {"const": "NewCluster"}}),
        "excludeHeadPodFromServeSvc": {"type": "boolean"},
        "serveConfigV2": STRING,
        "rayClusterConfig": RAY_CLUSTER,
    }
)
SERVE_CONFIG = _object(
    {
        "proxy_location": {"const": "EveryNode"},
        "http_options": _object({"host": STRING, "port": PORT}),
        "applications": _list(
            _object(
                {
                    "name": STRING,
                    "route_prefix": STRING,
                    "import_path": {"type": "string", "pattern": r"^[\w.]+:\w+$"},
                    "args": _object({"model": STRING, "index": STRING}, {"serve": {"type": "object"}}),
                }
            )
        ),
    }
)


def _manifest(kind: str, spec: dict[str, Any]) -> dict[str, Any]:
    metadata = _object({"name": {"type": "string", "pattern": "^[a-z][a-z0-9-]{0,40}$"}})
    return _object({"apiVersion": {"const": "ray.io/v1"}, "kind": {"const": kind}, "metadata": metadata, "spec": spec})


SCHEMAS = {
    "raycluster": _manifest("RayCluster", RAY_CLUSTER),
    "rayjob": _manifest("RayJob", RAY_JOB),
    "rayservice": _manifest("RayService", RAY_SERVICE),
}


def _problems(document: Any, schema: dict[str, Any]) -> list[str]:
    return [
        f"{'/'.join(map(str, error.path))}: {error.message}"
        for error in jsonschema.Draft7Validator(schema).iter_errors(document)
    ]


@pytest.fixture
def documents(repo: Path) -> dict[str, dict[str, Any]]:
    return {kind: yaml.safe_load((repo / f"cluster/kuberay/{kind}.yaml").read_text()) for kind in KINDS}


def _cluster(documents: dict[str, dict[str, Any]], kind: str) -> dict[str, Any]:
    spec = documents[kind]["spec"]
    return spec[CLUSTER[kind]] if CLUSTER[kind] else spec


def _containers(cluster: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        yield from group["template"]["spec"]["containers"]


@pytest.mark.parametrize("kind", KINDS)
def test_schema(documents: dict[str, dict[str, Any]], kind: str) -> None:
    assert _problems(documents[kind], SCHEMAS[kind]) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "path",
    [
        ("workerGroupSpecs", 0, "minReplicas"),
        ("headGroupSpec", "template", "spec", "containers", 0, "livenessProbe"),
        ("authOptions", "mode"),
    ],
)
def test_schema_catches_a_typo(documents: dict[str, dict[str, Any]], kind: str, path: tuple[str | int, ...]) -> None:
    place: Any = _cluster(documents, kind)
    for step in path[:-1]:
        place = place[step]
    place[f"{path[-1]}x"] = place.pop(path[-1])
    problems = " ".join(_problems(documents[kind], SCHEMAS[kind]))
    assert f"'{path[-1]}x' was unexpected" in problems
    assert f"'{path[-1]}' is a required property" in problems


@pytest.mark.parametrize("kind", KINDS)
def test_autoscaler_reads_it(documents: dict[str, dict[str, Any]], kind: str) -> None:
    # Ray's own reader, which runs in the autoscaler's container; it validates what it makes of the cluster.
    cluster = copy.deepcopy(_cluster(documents, kind))
    config = _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": documents[kind]["metadata"]["name"], "namespace": "default"}, "spec": cluster}
    )
    types = config["available_node_types"]
    head = types[config["head_node_type"]]["resources"]
    assert head["CPU"] == 0
    # Tune needs the slots; a service has no trials.
    assert head.get("trial_slot") == (None if kind == "rayservice" else 4)
    for group in cluster["workerGroupSpecs"]:
        node, limits = types[group["groupName"]], _limits(group)
        assert (node["min_workers"], node["max_workers"]) == (group["minReplicas"], group["maxReplicas"])
        assert node["resources"]["CPU"] == int(limits["cpu"])
        assert node["resources"].get("GPU", 0) == int(limits.get("nvidia.com/gpu", 0))
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def _limits(group: dict[str, Any]) -> dict[str, str]:
    return group["template"]["spec"]["containers"][0]["resources"]["limits"]


@pytest.mark.parametrize("kind", KINDS)
def test_versions_agree_with_the_pins(
    documents: dict[str, dict[str, Any]], kind: str, version: str, ray_version: str
) -> None:
    cluster = _cluster(documents, kind)
    assert cluster["rayVersion"] == ray_version
    for container in _containers(cluster):
        flavour = "gpu" if "nvidia.com/gpu" in container["resources"]["limits"] else "cpu"
        assert container["image"].endswith(f"/rayemb:{version}-ray{ray_version}-{flavour}")


@pytest.mark.parametrize("kind", KINDS)
def test_containers(documents: dict[str, dict[str, Any]], kind: str) -> None:
    for container in _containers(_cluster(documents, kind)):
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert container["envFrom"] == [{"secretRef": {"name": "rayemb-s3"}}]
        head = container["name"] == "ray-head"
        assert container["livenessProbe"]["httpGet"] == (
            {"path": "/api/gcs_healthz", "port": 8265} if head else {"path": "/api/local_raylet_healthz", "port": 52365}
        )


def test_serve_config(documents: dict[str, dict[str, Any]]) -> None:
    from rayemb.serve.deploy import ServeArguments

    config = yaml.safe_load(documents["rayservice"]["spec"]["serveConfigV2"])
    assert _problems(config, SERVE_CONFIG) == []
    # Ray's own model of it.
    application = ServeDeploySchema.model_validate(config).applications[0]
    # And the model of what `build` takes.
    served = from_mapping(ServeArguments, application.args).serve
    assert served.topology == "spread"
    group = documents["rayservice"]["spec"]["rayClusterConfig"]["workerGroupSpecs"][0]
    assert served.keys
    # The comment in the manifest: four shards fit into the pods that are always there.
    assert served.cpus_needed(4) <= group["minReplicas"] * int(_limits(group)["cpu"])


def test_import_paths_resolve(documents: dict[str, dict[str, Any]]) -> None:
    config = yaml.safe_load(documents["rayservice"]["spec"]["serveConfigV2"])
    for application in config["applications"]:
        module, name = application["import_path"].split(":")
        assert callable(getattr(importlib.import_module(module), name))


def test_named_files_exist(repo: Path) -> None:
    for path in sorted((repo / "cluster").rglob("*")):
        if path.suffix in {".yaml", ".md", ".py"}:
            for name in re.findall(r"\b(?:jobs|cluster)/[\w/.-]+\.(?:py|yaml|sh|md)\b", path.read_text()):
                assert (repo / name).is_file(), f"{path.relative_to(repo)} names {name}"


def test_job_and_service_name_the_same_artefacts(documents: dict[str, dict[str, Any]], repo: Path) -> None:
    from rayemb.pipeline.config import RunConfig

    python, script, config, *overrides = shlex.split(documents["rayjob"]["spec"]["entrypoint"])
    assert (python, script) == ("python", "jobs/train.py")
    run = load(RunConfig, repo / config, overrides)
    arguments = yaml.safe_load(documents["rayservice"]["spec"]["serveConfigV2"])["applications"][0]["args"]
    assert run.uri("model") == arguments["model"]
    assert run.uri("index") == arguments["index"]
