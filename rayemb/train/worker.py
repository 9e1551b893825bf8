"""The training loop of one worker, run by Ray Train."""

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayemb.data.decode import ColumnReader, Decoder, Member, Piece
from rayemb.data.stream import Batch, Stream
from rayemb.evaluate.metrics import ranks, recall_at
from rayemb.models import Model, TextTokenizer
from rayemb.parallel import Encoded, Exchange, Tiling, exchange_named, mean_over_ranks
from rayemb.train.config import TrainConfig
from rayemb.train.engine import create_engine, full_state, learning_rate, set_learning_rate
from rayemb.train.objective import Objective, embed_pairs, micro_batches
from rayemb.train.quarantine import Quarantine
from rayemb.train.step import train_step

POSITION = "position.json"


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know; it comes by pickle from the driver of the same run."""

    config: TrainConfig
    tokenizer: TextTokenizer
    stream: Stream
    validation: Member | None
    model_uri: str
    run_uri: str
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
    losses = [loss.build(config.model.dim) for loss in config.losses.values()]
    objective = Objective(model.network.train(), losses).to(device)
    engine = create_engine(objective, config)
    exchange = exchange_named(config.exchange, Tiling(*config.tile) if config.tile else None)
    step, history = _restore(engine, job.stream.start)
    validation = _validation_rows(job, rank, world, device)
    quarantine = Quarantine(job.run_uri, config.max_bad_fraction, rank)
    started, seen, waited, spent = time.monotonic(), 0, 0.0, time.monotonic()
    for batch in job.stream.batches(rank, config.steps):
        rate = learning_rate(config, step)
        set_learning_rate(engine, rate)
        loss = _step(engine, objective, _tensors(batch, device), exchange, config, progress=step / config.steps)
        step += 1
        seen, waited = seen + batch.rows, waited + batch.waited
        quarantine.add(batch)
        save = batch.last or step % config.checkpoint_every == 0
        if not (save or step % config.log_every == 0):
            continue
        now = time.monotonic()
        metrics = {
            "step": step,
            "loss": float(mean_over_ranks(loss)),
            "temperature": objective.temperature,
            "learning_rate": rate,
            "pairs_per_second": seen / (now - started),
            "data_wait": waited / (now - spent),
            "bad_rows": quarantine.check(),
        }
        waited, spent = 0.0, now
        if validation and (batch.last or step % config.evaluate_every == 0):
            metrics["val_recall_at_1"] = _validate(engine, objective, validation, exchange)
        history.append(metrics)
        if rank == 0:
            job.log.add.remote(metrics)
        if save:
            quarantine.write(step)
        _report(engine, metrics, history, batch.state, rank, save=save)
    weights = full_state(engine, objective.network, config.zero_stage)
    if weights is not None:
        _save(job, weights, history, objective.temperature)
    return {"step": step, "history": history}


def _tensors(batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    # Copied: arrays lie read-only in the object store.
    return {name: torch.from_numpy(np.array(values)).to(device) for name, values in batch.arrays.items()}


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
        return objective.share(encoded, batch, exchange, progress)

    return train_step(engine, parts, loss, reduction=config.gradient_reduction)


def _restore(engine: Any, start: int) -> tuple[int, list[dict[str, Any]]]:
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


def _report(
    engine: Any,
    metrics: dict[str, Any],
    history: list[dict[str, Any]],
    data: dict[str, Any],
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
    engine.save_checkpoint(folder, tag=tag)
    if rank == 0:
        state = {"step": metrics["step"], "tag": tag, "data": data, "history": history}
        (Path(folder) / POSITION).write_text(json.dumps(state))
    ray.train.report(metrics, checkpoint=Checkpoint.from_directory(folder), delete_local_checkpoint_after_upload=True)


def _validation_rows(job: Job, rank: int, world: int, device: torch.device) -> dict[str, Any] | None:
    """This rank's share of the validation pairs, the same number on every rank."""
    member = job.validation
    share = min(job.config.evaluate_rows, sum(group.rows for group in member.groups)) // world if member else 0
    if member is None or not share:
        return None
    # Rank order after the gather: rank 0's rows, then rank 1's, ...
    mine = np.arange(rank * share, (rank + 1) * share)
    arrays, bad = Decoder([member], job.stream.decode)(Piece(0, ((0, mine),)))
    if bad:
        raise RuntimeError(f"a validation row cannot be used: {bad[0].source}: {bad[0].what}")
    return {
        "batch": {name: torch.from_numpy(values).to(device) for name, values in arrays.items()},
        "groups": ColumnReader(member)(member.groups, "concept")[: share * world],
    }


def _validate(engine: Any, objective: Objective, validation: dict[str, Any], exchange: Exchange) -> float:
    """Recall@1, the mean of both directions, over all ranks' validation pairs."""
    engine.eval()
    queries, documents = embed_pairs(objective, validation["batch"], exchange)
    engine.train()
    query, document, groups = queries.float().cpu().numpy(), documents.float().cpu().numpy(), validation["groups"]
    forward, backward = ranks(query, document, groups, groups), ranks(document, query, groups, groups)
    return (recall_at(forward, 1) + recall_at(backward, 1)) / 2


def _save(job: Job, weights: dict[str, torch.Tensor], history: list[dict[str, Any]], temperature: float | None) -> None:
    model = Model.create(job.config.model, job.tokenizer, job.config.seed)
    model.network.load_state_dict(weights)
    model.info = {**job.info, "temperature": temperature, "training": history}
    model.save(job.model_uri)
