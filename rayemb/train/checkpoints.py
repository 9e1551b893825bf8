"""A worker's checkpoints: the engine's state, and where the data and the history stand."""

import json
import tempfile
from pathlib import Path
from typing import Any

POSITION = "position.json"


def restore(engine: Any, start: int) -> tuple[int, list[dict[str, Any]]]:
    """The step and history of the last checkpoint, its state loaded into the engine; (0, []) without one.

    `start` is the step at which the data begin: the checkpoint must be the one that the driver planned them for.
    """
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        if start:
            raise RuntimeError(f"the data begin at step {start}, but there is no checkpoint")
        return 0, []
    with checkpoint.as_directory() as folder:
        position = json.loads((Path(folder) / POSITION).read_text())
        if position["step"] != start:
            raise RuntimeError(f"the data begin at step {start}, the checkpoint stands at {position['step']}")
        path, _ = engine.load_checkpoint(folder, tag=position["tag"])
        if path is None:
            raise RuntimeError(f"the checkpoint {checkpoint.path} holds no engine state")
    return position["step"], position["history"]


def report(
    engine: Any,
    metrics: dict[str, Any],
    history: list[dict[str, Any]],
    data: dict[str, Any],
    rank: int,
    *,
    save: bool,
) -> None:
    """Tells Ray Train of a step; with `save`, every rank writes its part of a checkpoint (collective)."""
    import ray.train
    from ray.train import Checkpoint

    if not save:
        ray.train.report(metrics)
        return
    # Every rank writes its own part; Ray Train merges the folders in storage.
    folder = tempfile.mkdtemp(prefix="rayemb-checkpoint-")
    tag = f"step-{metrics['step']}"
    engine.save_checkpoint(folder, tag=tag)
    if rank == 0:
        state = {"step": metrics["step"], "tag": tag, "data": data, "history": history}
        (Path(folder) / POSITION).write_text(json.dumps(state))
    ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder), delete_local_checkpoint_after_upload=True)
