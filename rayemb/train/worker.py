"""The training loop of one worker, run by Ray Train."""

import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayemb.data.corpus import Corpus, read_row_group
from rayemb.data.keys import keys_of
from rayemb.evaluate.metrics import ranks, recall_at
from rayemb.models import Model, TextTokenizer, decode_image, image_tensor
from rayemb.parallel import Encoded, Exchange, Tiling, exchange_named, mean_over_ranks
from rayemb.train.config import TrainConfig
from rayemb.train.engine import create_engine, full_state, learning_rate, set_learning_rate
from rayemb.train.objective import Objective, embed_pairs, micro_batches
from rayemb.train.step import train_step

POSITION = "position.json"


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know; it comes by pickle from the driver of the same run."""

    config: TrainConfig
    tokenizer: TextTokenizer
    corpus_uri: str
    model_uri: str
    info: dict[str, Any]  # goes into the model's manifest
    log: Any  # handle of the TrainingLog actor


def run_worker(job_config: dict[str, Any]) -> dict[str, Any]:
    """Trains from the last checkpoint, or from the start, to the last step; rank 0 saves the model."""
    import ray.train

    job: Job = job_config["job"]
    config, context = job.config, ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(config.threads_per_worker)
    device = torch.device("cuda" if config.gpus_per_worker else "cpu")
    if rank == 0:
        compiling = config.compile_ops and not config.gpus_per_worker
        note = "compiling its operators, once on this machine" if compiling else "nothing to compile"
        job.log.say.remote(f"starting {world} DeepSpeed engines, ZeRO-{config.zero_stage} ({note})")
    model = Model.create(config.model, job.tokenizer, config.seed)
    objective = Objective(model.network.train(), config.loss.build(config.model.dim)).to(device)
    engine = create_engine(objective, config)
    exchange = exchange_named(config.exchange, Tiling(*config.tile) if config.tile else None)
    step, history = _restore(engine, job_config["start_row"])
    validation = _validation_rows(job, rank, world, device)
    batches = _batches(ray.train.get_dataset_shard("train"), config.batch_size // world, device)
    started, first_step = time.monotonic(), step
    for batch in batches:
        rate = learning_rate(config, step)
        set_learning_rate(engine, rate)
        loss = _step(engine, objective, batch, exchange, config, progress=step / config.steps)
        step += 1
        last = step == config.steps
        if not (last or step % config.log_every == 0 or step % config.checkpoint_every == 0):
            continue
        metrics = {
            "step": step,
            "loss": float(mean_over_ranks(loss)),
            "temperature": objective.loss.temperature,
            "learning_rate": rate,
            "pairs_per_second": (step - first_step) * config.batch_size / (time.monotonic() - started),
        }
        if validation and (last or step % config.evaluate_every == 0):
            metrics["val_recall_at_1"] = _validate(engine, objective, validation, exchange)
        history.append(metrics)
        if rank == 0:
            job.log.add.remote(metrics)
        _report(engine, metrics, history, batch, rank, save=last or step % config.checkpoint_every == 0)
    weights = full_state(engine, objective.network, config.zero_stage)
    if weights is not None:
        _save(job, weights, history, objective.loss.temperature)
    return {"step": step, "history": history}


def _batches(shard: Any, rows: int, device: torch.device) -> Iterator[dict[str, torch.Tensor]]:
    for batch in shard.iter_batches(batch_size=rows, batch_format="numpy", prefetch_batches=2):
        # Copied: batches lie read-only in the object store.
        tensors = {name: torch.from_numpy(np.array(values)).to(device) for name, values in batch.items()}
        yield tensors


def _step(
    engine: Any,
    objective: Objective,
    batch: dict[str, torch.Tensor],
    exchange: Exchange,
    config: TrainConfig,
    *,
    progress: float,
) -> torch.Tensor:
    parts, batch = micro_batches(batch, rows=config.micro_batch_size, tokens=config.micro_batch_tokens)

    def loss(encoded: Encoded) -> torch.Tensor:
        return objective.share(encoded, batch["group"], exchange, progress)

    return train_step(engine, parts, loss, reduction=config.gradient_reduction)


def _restore(engine: Any, start_row: int) -> tuple[int, list[dict[str, Any]]]:
    """The step and history of the last checkpoint, its state loaded into the engine; (0, []) without one.

    `start_row` is where the data begin: the checkpoint must be the one that the driver planned them for.
    """
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        if start_row:
            raise RuntimeError(f"the data begin at row {start_row}, but there is no checkpoint")
        return 0, []
    with checkpoint.as_directory() as folder:
        position = json.loads((Path(folder) / POSITION).read_text())
        if position["row"] != start_row:
            raise RuntimeError(f"the data begin at row {start_row}, the checkpoint stands at {position['row']}")
        path, _ = engine.load_checkpoint(folder, tag=position["tag"])
        if path is None:
            raise RuntimeError(f"the checkpoint {checkpoint.path} holds no engine state")
    return position["step"], position["history"]


def _report(
    engine: Any,
    metrics: dict[str, Any],
    history: list[dict[str, Any]],
    batch: dict[str, torch.Tensor],
    rank: int,
    *,
    save: bool,
) -> None:
    import ray.train
    from ray.train import Checkpoint

    if not save:
        ray.train.report(metrics)
        return
    # Every rank writes its own part; Ray Train merges the folders in storage.
    folder = tempfile.mkdtemp(prefix="rayemb-checkpoint-")
    tag = f"step-{metrics['step']}"
    # The row after the last one of *any* rank: a rank holds only its slice of the global batch.
    row = batch["position"].max() + 1
    torch.distributed.all_reduce(row, op=torch.distributed.ReduceOp.MAX)
    engine.save_checkpoint(folder, tag=tag)
    if rank == 0:
        state = {"step": metrics["step"], "tag": tag, "row": int(row), "history": history}
        (Path(folder) / POSITION).write_text(json.dumps(state))
    ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder), delete_local_checkpoint_after_upload=True)


def _validation_rows(job: Job, rank: int, world: int, device: torch.device) -> dict[str, Any] | None:
    """This rank's share of the validation pairs, the same number on every rank."""
    corpus = Corpus.open(job.corpus_uri)
    split = job.config.val_split
    if split is None or split not in corpus.splits:
        return None
    rows: list[dict[str, Any]] = []
    for group in corpus.row_groups(split):
        rows += read_row_group(group, ("image", "text", "concept")).to_pylist()
        if len(rows) >= job.config.evaluate_rows:
            break
    rows = rows[: min(len(rows), job.config.evaluate_rows) // world * world]
    if not rows:
        return None
    # Rank order after the gather: rank 0's rows, then rank 1's, ...
    share = len(rows) // world
    mine = rows[rank * share : (rank + 1) * share]
    size, limits = job.config.model.image.image_size, corpus.image_limits
    pixels = [image_tensor(decode_image(row["image"], limits), size) for row in mine]
    return {
        "pixels": torch.from_numpy(np.stack(pixels)).to(device),
        "tokens": torch.from_numpy(job.tokenizer([row["text"] for row in mine])).to(device),
        "groups": keys_of([row["concept"] for row in rows]),
    }


def _validate(engine: Any, objective: Objective, validation: dict[str, Any], exchange: Exchange) -> float:
    """Recall@1, the mean of both directions, over all ranks' validation pairs."""
    engine.eval()
    images, texts = embed_pairs(objective.network, validation["pixels"], validation["tokens"], exchange)
    engine.train()
    image, text, groups = images.float().cpu().numpy(), texts.float().cpu().numpy(), validation["groups"]
    forward, backward = ranks(image, text, groups, groups), ranks(text, image, groups, groups)
    return (recall_at(forward, 1) + recall_at(backward, 1)) / 2


def _save(job: Job, weights: dict[str, torch.Tensor], history: list[dict[str, Any]], temperature: float | None) -> None:
    model = Model.create(job.config.model, job.tokenizer, job.config.seed)
    model.network.load_state_dict(weights)
    model.info = {**job.info, "temperature": temperature, "training": history}
    model.save(job.model_uri)
