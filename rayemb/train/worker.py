"""The training loop of one worker, run by Ray Train."""

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rayemb.data.decode import Member
from rayemb.data.stream import Batch, Stream
from rayemb.models import Model, TextTokenizer
from rayemb.parallel import Encoded, Exchange, Tiling, exchange_named, mean_over_ranks
from rayemb.train.checkpoints import report, restore
from rayemb.train.config import TrainConfig
from rayemb.train.engine import create_engine, full_state, learning_rate, set_learning_rate
from rayemb.train.objective import Objective, micro_batches
from rayemb.train.quarantine import Quarantine
from rayemb.train.step import train_step
from rayemb.train.validation import validate, validation_rows


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
    step, history = restore(engine, job.stream.start)
    rows = validation_rows(job.validation, job.stream.decode, config.evaluate_rows, rank, world, device)
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
        if rows and (batch.last or step % config.evaluate_every == 0):
            metrics["val_recall_at_1"] = validate(engine, objective, rows, exchange)
        history.append(metrics)
        if rank == 0:
            job.log.add.remote(metrics)
        if save:
            quarantine.write(step)
        report(engine, metrics, history, batch.state, rank, save=save)
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


def _save(job: Job, weights: dict[str, torch.Tensor], history: list[dict[str, Any]], temperature: float | None) -> None:
    model = Model.create(job.config.model, job.tokenizer, job.config.seed)
    model.network.load_state_dict(weights)
    model.info = {**job.info, "temperature": temperature, "training": history}
    model.save(job.model_uri)
