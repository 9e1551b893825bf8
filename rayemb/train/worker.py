"""The training loop of one worker, run by Ray Train."""

import contextlib
import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch

from rayemb.data.stream import Batch, Stream
from rayemb.losses import Loss
from rayemb.models import Model, TextTokenizer, TwoTower
from rayemb.parallel import Encoded, Exchange, ExchangeError, Tiling, exchange_named, mean_over_ranks
from rayemb.train.adapters import add_adapters, merged
from rayemb.train.checkpoints import Checkpoints, restore
from rayemb.train.clock import Clock
from rayemb.train.config import TrainConfig
from rayemb.train.ema import averaged
from rayemb.train.engine import create_engine, fixed_values, full_state, keep_fixed, set_rates
from rayemb.train.evaluation import EarlyStopping, Evaluator
from rayemb.train.evaluation.base import Task
from rayemb.train.meter import Meter
from rayemb.train.noise import GradientNoise
from rayemb.train.not_finite import end_not_finite
from rayemb.train.objective import Objective, micro_batches
from rayemb.train.quarantine import Quarantine
from rayemb.train.step import Step, train_step
from rayemb.train.watch import Pulse


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know; it comes by pickle from the driver of the same run."""

    config: TrainConfig
    tokenizer: TextTokenizer
    stream: Stream
    tasks: dict[str, Task]  # of the evaluations
    model_uri: str
    run_uri: str
    info: dict[str, Any]  # goes into the model's manifest
    log: Any  # handle of the TrainingLog actor
    checkpoint: str | None  # the one that `stream` goes on from
    attempt: str  # names what this attempt writes


def run_worker(job_config: dict[str, Any]) -> dict[str, Any]:
    """Trains from the last checkpoint, or from the start, to the last step; rank 0 saves the model."""
    import ray.train

    pulse = Pulse(job_config["job"].log, ray.train.get_context().get_world_rank())
    try:
        return _train(job_config["job"], pulse)
    finally:
        pulse.stop()


def _train(job: Job, pulse: Pulse) -> dict[str, Any]:
    import ray.train

    config, context = job.config, ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(config.threads_per_worker)
    device = torch.device("cuda" if config.gpus_per_worker else "cpu")
    if rank == 0:
        compiling = config.compile_ops and not config.gpus_per_worker
        note = "compiling its operators, once on this machine" if compiling else "nothing to compile"
        job.log.say.remote(f"starting {world} DeepSpeed engines, ZeRO-{config.zero_stage} ({note})")
    objective = create_objective(config, job.tokenizer).to(device)
    fixed = fixed_values(objective.losses)
    engine = create_engine(objective, config)
    exchange = exchange_named(config.exchange, Tiling(*config.tile) if config.tile else None)
    step, history = restore(engine, job.checkpoint, context.get_local_rank())
    keep_fixed(objective.losses, fixed, config.zero_stage)
    checkpoints = Checkpoints(config.checkpoints, job.run_uri, job.attempt, job.log, rank, world)
    settings = config.evaluation
    evaluator = Evaluator(job.tasks, engine, exchange, job.stream.decode, batch_size=settings.batch_size)
    stopping = EarlyStopping(config.early_stopping, history) if config.early_stopping else None
    quarantine = Quarantine(job.run_uri, config.max_bad_fraction, rank)
    pulse.clock = Clock(device)
    meter = Meter(pulse.clock, exchange)
    noise = GradientNoise(objective.network.parameters(), objective.losses.parameters(), exchange)
    paused, over = False, stopping is not None and stopping.over
    pulse.at("data", step)
    for batch in () if over else job.stream.batches(rank, config.steps):
        shown = (step + 1) % config.logging.every == 0
        pulse.clock.begin_step(exact=shown)
        # In fp16 gradients are scaled by a factor that is DeepSpeed's own.
        noise.begin_step(shown and config.precision != "fp16")
        pulse.at("forward")
        rate = set_rates(engine, config, step)
        _seed(config.seed, rank, step)
        tensors = objective.prepared(_tensors(batch, device), step)
        if not meter.measured:
            meter.measure(engine, _first_part(tensors, config), config.precision, config.peak_flops)
        done = _step(engine, objective, tensors, exchange, job, step, pulse)
        step += 1
        pulse.at("report")
        meter.take(batch)
        quarantine.add(batch)
        paused = batch.pause and not batch.last
        save = batch.last or paused or step % config.checkpoints.every == 0
        evaluate = bool(evaluator) and (batch.last or step % settings.every == 0)
        if not (save or evaluate or step % config.logging.every == 0):
            pulse.at("data", step)
            continue
        metrics = {
            "step": step,
            "time": time.time(),
            "loss": float(mean_over_ranks(done.loss)),
            "temperature": objective.temperature,
            "learning_rate": rate,
            "gradient_norm": done.gradient_norm if math.isfinite(done.gradient_norm) else None,
            **({"skipped_steps": engine.skipped_steps} if config.precision == "fp16" else {}),
            **noise.figures(done.micro_batches, batch.rows, done.gradient_norm, history),
            **meter.figures(),
            "bad_rows": quarantine.check(),
            "workers": world,
        }
        if evaluate:
            pulse.at("evaluate")
            with _weights(engine, objective, config):
                metrics |= evaluator.run()
            for warning in evaluator.warnings if rank == 0 else ():
                job.log.say.remote(f"step {step}: {warning}", warning=True)
            # One rank's answer for all: rounding may differ between machines.
            over = stopping is not None and _any_rank(stopping.update(metrics), exchange)
        history.append(metrics)
        if rank == 0:
            job.log.add.remote(metrics)
        ray.train.report(metrics)
        if save or over:
            pulse.at("checkpoint")
            quarantine.write(step)
            checkpoints.save(engine, metrics, history, batch.state)
        if over:
            paused = False
            break
        pulse.at("data", step)
    pulse.at("checkpoint")
    checkpoints.wait()
    if paused:
        return {"step": step, "paused": True}
    with _weights(engine, objective, config):
        weights = full_state(engine, objective.network, config.zero_stage)
    if weights is not None:
        if config.precision != "fp32":
            weights |= _frozen(objective, config, job.tokenizer)
        if stopping:
            job.info["best"] = {**stopping.info, "stopped_early": over}
        _save(job, weights, history, objective.temperature)
    return {"step": step, "history": history}


def create_objective(config: TrainConfig, tokenizer: TextTokenizer) -> Objective:
    """The towers and the losses as they are before the first step."""
    model = Model.load(config.init) if config.init else Model.create(config.model, tokenizer, config.seed)
    losses: list[Loss] = [loss.build(config.model.dim) for loss in config.losses.values()]
    objective = config.objective.build(model.network.train(), losses, tokenizer, config.seed)
    if config.adapters is not None:
        add_adapters(model.network, config.adapters, config.seed)
    return objective.train()


def _frozen(objective: Objective, config: TrainConfig, tokenizer: TextTokenizer) -> dict[str, torch.Tensor]:
    """The weights that are not trained as they were given: the engine has rounded them to 16 bits."""
    frozen = [name for name, parameter in objective.network.named_parameters() if not parameter.requires_grad]
    given = create_objective(config, tokenizer).network.state_dict() if frozen else {}
    return {name: given[name] for name in frozen}


def _weights(engine: Any, objective: Objective, config: TrainConfig) -> contextlib.AbstractContextManager[None]:
    """Within it the objective has the weights that are validated and saved."""
    return averaged(engine, objective, stage=config.zero_stage) if config.ema else contextlib.nullcontext()


def _first_part(batch: dict[str, torch.Tensor], config: TrainConfig) -> dict[str, torch.Tensor]:
    return micro_batches(batch, rows=config.micro_batch_size, tokens=config.micro_batch_tokens)[0][0]


def _any_rank(said: bool, exchange: Exchange) -> bool:
    return bool(exchange.everyone(torch.tensor([said])).any())


def _seed(seed: int, rank: int, step: int) -> None:
    """What is drawn in a step (dropout) follows from these alone, wherever a run was taken up again."""
    # Nor from what its process did before: Ray gives processes to one run after the other.
    state = np.random.SeedSequence((seed, rank, step)).generate_state(1, np.uint64)[0]
    torch.manual_seed(int(state >> np.uint64(1)))


def _tensors(batch: Batch, device: torch.device) -> dict[str, torch.Tensor]:
    # Copied: arrays lie read-only in the object store.
    return {name: torch.from_numpy(np.array(values)).to(device) for name, values in batch.arrays.items()}


def _step(
    engine: Any,
    objective: Objective,
    batch: dict[str, torch.Tensor],
    exchange: Exchange,
    job: Job,
    step: int,
    pulse: Pulse,
) -> Step:
    config = job.config
    parts, batch = micro_batches(batch, rows=config.micro_batch_size, tokens=config.micro_batch_tokens)
    vectors: dict[str, torch.Tensor] = {}

    def loss(encoded: Encoded) -> torch.Tensor:
        vectors.update({kind: rows.detach() for kind, rows in encoded.rows.items()})
        pulse.at("exchange")
        value = objective.share(encoded, batch, exchange, step / config.steps)
        pulse.at("backward")
        return value

    problem, cause = "", None
    try:
        done = train_step(engine, parts, loss, reduction=config.gradient_reduction, at=pulse.at)
        # Of the whole batch, and so the same on all ranks. In fp16 an infinite one is a step that was skipped.
        if not math.isfinite(done.gradient_norm) and config.precision != "fp16":
            problem = (
                f"the gradient's norm is {done.gradient_norm} and the loss {float(mean_over_ranks(done.loss)):.4g}"
            )
    except ExchangeError as error:
        # All ranks raise it together.
        problem, cause = str(error), error
    if problem:
        members, names = ray.get(job.stream.members), list(config.corpora)
        raise end_not_finite(problem, step + 1, batch, vectors, members, names, job.run_uri) from cause
    return done


def _save(job: Job, weights: dict[str, torch.Tensor], history: list[dict[str, Any]], temperature: float | None) -> None:
    network, adapters = TwoTower(job.config.model.resolved(), job.tokenizer.vocab_size), job.config.adapters
    network.load_state_dict(merged(network, adapters, weights) if adapters else weights)
    model = Model(network, job.tokenizer)
    model.info = {**job.info, "temperature": temperature, "training": history}
    model.save(job.model_uri)
