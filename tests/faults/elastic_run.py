"""A training on three real nodes of which one is killed and one is added; run as a process of its own."""

import importlib.util
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import ray

from rayemb.cluster import ClusterConfig, connect
from rayemb.config import load
from rayemb.data import CorpusConfig, build_corpus
from rayemb.data.sources import DemoSource
from rayemb.train import TrainConfig, train
from tests.faults.test_training import QUICK

SCRIPT = Path(__file__).resolve().parents[2] / "cluster/local.py"
# One worker and its decoder fill a node. The batch is no multiple of two or three.
WORK = ["zero_stage=2", "steps=100", "batch_size=31", "cpus_per_worker=1.5", "checkpoints.every=3", "workers=3"]


def nodes_module() -> Any:
    spec = importlib.util.spec_from_file_location("local", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["local"] = module
    spec.loader.exec_module(module)
    return module


def main(folder: Path) -> None:
    local = nodes_module()
    times: dict[str, float] = {}
    rows: list[tuple[float, int]] = []

    def wait_for(world: int) -> None:
        """Until a checkpoint of so many workers lies there."""
        while True:
            for path in (folder / "runs").glob("train-*/checkpoints/*/position.json"):
                if json.loads(path.read_text())["world"] == world:
                    return
            time.sleep(0.2)

    with local.local_cluster(3, 2, 150) as (head, workers):
        os.environ.update(local.client_environment(head))

        def disturb() -> None:
            wait_for(3)
            # Not the node that this process speaks to: a driver does not outlive that one.
            own = ray.get_runtime_context().get_node_id()
            names = {node["NodeName"] for node in ray.nodes() if node["NodeID"] != own}
            victim = next(worker for worker in workers if worker.name in names)
            workers.remove(victim)
            times["killed"] = time.monotonic()
            for process in [*psutil.Process(victim.process.pid).children(recursive=True), victim.process]:
                os.kill(process.pid, signal.SIGKILL)
            wait_for(2)
            times["added"] = time.monotonic()
            workers.append(local._start_worker("node-9", head, local.client_environment(head), 2, 150))

        with connect(ClusterConfig(address=head.address)):
            source = DemoSource(limit=800, rows_per_unit=256, image_size=32)
            corpus = build_corpus(CorpusConfig(source=source), str(folder / "corpus")).uri
            whole = train(
                load(TrainConfig, None, [*QUICK, *WORK, "workers=2"]), corpus, f"{folder}/m0", f"{folder}/whole"
            )
            thread = threading.Thread(target=disturb, daemon=True)
            thread.start()
            model = train(
                load(TrainConfig, None, [*QUICK, *WORK, "min_workers=1"]),
                corpus,
                f"{folder}/m1",
                f"{folder}/runs",
                progress=lambda done, _, __: rows.append((time.monotonic(), done)),
            )
            thread.join(timeout=1)
    found = {
        "whole": [row["loss"] for row in whole.info["training"]],
        "losses": [row["loss"] for row in model.info["training"]],
        "steps": [row["step"] for row in model.info["training"]],
        "workers": [row["workers"] for row in model.info["training"]],
        "times": times,
        "rows": rows,
    }
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    # An exception rather than sudden death: the nodes are stopped on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    main(Path(sys.argv[1]))
