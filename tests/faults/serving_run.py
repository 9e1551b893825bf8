"""A service on three real nodes, from an S3 server that goes away; then a node is killed. A process of its own."""

import json
import os
import signal
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import ray
from moto.server import ThreadedMotoServer

from rayemb.cluster import ClusterConfig, connect
from rayemb.serve.deploy import start
from tests.faults.elastic_run import nodes_module
from tests.faults.test_serving import CONFIG, Load, ask, replicas
from tests.serve.conftest import make_world

BUCKET = "rayemb-serving"


def store(port: int = 0) -> tuple[ThreadedMotoServer, int]:
    """A running S3 server; what it holds outlives it in this process."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=port, verbose=False)
    server.start()
    return server, int(server.get_host_and_port()[1])


def diverse(url: str) -> int:
    """The status of a search that reads vectors from the table."""
    body = json.dumps({"text": "star", "k": 3, "diversity": 0.5}).encode()
    request = urllib.request.Request(f"{url}/v1/search", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def kill_a_node(workers: list[psutil.Process]) -> float:
    """SIGKILL to a whole node."""
    for worker in workers:
        for process in [*worker.children(recursive=True), worker]:
            process.send_signal(signal.SIGKILL)
    return time.monotonic()


def main(folder: Path) -> None:
    local = nodes_module()
    server, port = store()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ALLOW_HTTP": "true",
    }
    urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/{BUCKET}", method="PUT")).close()
    with local.local_cluster(3, 2, 150) as (head, workers):
        os.environ.update(local.client_environment(head))
        with connect(ClusterConfig(address=head.address)):
            world = make_world(f"s3://{BUCKET}/world")
            with start(world.model_uri, world.index_uri, CONFIG) as service:
                found: dict[str, object] = {}
                whole = ask(service.url).ids
                found["whole"] = list(whole)
                # The parent of a replica is its node's raylet.
                parts = ("gateway", "embedder", "shard-0", "shard-1")
                found["nodes"] = {part: len({each.ppid() for each in replicas(part)}) for part in parts}
                found["expected"] = world.expected(world.model.embed_texts(["red circle"])[0], 50)
                found["diverse_with_store"] = diverse(service.url)

                server.stop()
                answers = [ask(service.url) for _ in range(10)]
                found["asked"], found["without_store"] = 10, sum(answer.ids == whole for answer in answers)
                found["diverse_without_store"] = diverse(service.url)
                server, _ = store(port)

                own = ray.get_runtime_context().get_node_id()
                names = {node["NodeName"] for node in ray.nodes() if node["NodeID"] != own}
                victim = next(worker for worker in workers if worker.name in names)
                workers.remove(victim)
                with Load(service.url) as load:
                    killed = kill_a_node([psutil.Process(victim.process.pid)])
                    while time.monotonic() < killed + 60:
                        time.sleep(2.0)
                        late = [answer for answer in load.answers if answer.at > time.monotonic() - 3.0]
                        if late and all(answer.ids == whole for answer in late):
                            break
                wrong = [answer for answer in load.answers if answer.status != 200 or answer.missing]
                found["node"] = {
                    "statuses": load.statuses,
                    "partial": sum(bool(answer.missing) for answer in load.answers),
                    "wrong": sum(a.status == 200 and not a.missing and a.ids != whole for a in load.answers),
                    "whole_after_s": round(max((answer.at - killed for answer in wrong), default=0.0), 1),
                }
                (folder / "found.json").write_text(json.dumps(found))
    server.stop()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
