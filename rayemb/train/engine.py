"""The DeepSpeed engine of one worker, set up as it was found to be exact on CPU and GPU."""

import logging
from typing import Any

import torch
from torch import nn

from rayemb.errors import RayembError
from rayemb.train.activations import checkpoint_blocks
from rayemb.train.config import TrainConfig
from rayemb.train.ema import keep_mean
from rayemb.train.parameters import parameter_groups

logger = logging.getLogger(__name__)


def create_engine(module: nn.Module, config: TrainConfig) -> Any:
    """A DeepSpeed engine over `module`; the process group must exist already (Ray Train made it)."""
    import deepspeed
    import deepspeed.ops

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not config.compile_ops and not config.gpus_per_worker:
        # Else the first engine of a machine compiles C++ for ~100 s, and needs g++. With a torch optimizer
        # this operator is the only one; without it the exchange goes through gloo, which it does anyway
        # between machines.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if config.checkpoint_activations:
        checkpoint_blocks(module)
    optimizer = config.optimizer.build(parameter_groups(module, config))
    if config.ema is not None:
        keep_mean(optimizer)
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=deepspeed_config(config), dist_init_required=False
    )
    return engine


def set_rates(engine: Any, config: TrainConfig, step: int) -> float:
    """Sets what every parameter group goes by in step `step` (0-based); gives the learning rate without factors."""
    rate = config.schedule.rate(config.optimizer.learning_rate, step, config.steps)
    for group in engine.optimizer.param_groups:
        group["lr"] = rate * group["learning_rate_factor"]
        if config.ema is not None:
            group["ema_decay"] = config.ema.at(step)
    return rate


# Gradients sent at once, in entries, where cores send them: what lies in the cache is sent from there, and a table of
# tokens, larger than that, is not copied (a step of MiniLM: 0.77 s, with DeepSpeed's 5e8 0.85 s).
CPU_BUCKET = 4_000_000


def deepspeed_config(config: TrainConfig) -> dict[str, Any]:
    """What `deepspeed.initialize` gets: every key that has a default which would change the gradient is said."""
    stage: dict[str, Any] = {"stage": config.zero_stage}
    if not config.gpus_per_worker:
        stage["reduce_bucket_size"] = CPU_BUCKET
    if config.offload_optimizer:
        if config.zero_stage == 0:
            raise RayembError("stage 0 cannot offload", where="offload_optimizer", fix="use zero_stage 1, 2 or 3")
        stage["offload_optimizer"] = {"device": "cpu", "pin_memory": bool(config.gpus_per_worker)}
    if config.offload_parameters:
        stage["offload_param"] = {"device": "cpu", "pin_memory": bool(config.gpus_per_worker)}
    found: dict[str, Any] = {
        # Of no consequence: ranks bring what they have, and any number of them goes on with a run.
        "train_micro_batch_size_per_gpu": 1,
        # Micro-batches are ours (`train_step`), so that DeepSpeed never divides a gradient by their number.
        "gradient_accumulation_steps": 1,
        # Always said: DeepSpeed clips at 1.0 where nothing is said.
        "gradient_clipping": config.gradient_clipping,
        "zero_optimization": stage,
        "zero_allow_untested_optimizer": True,
        # Offloaded, torch's AdamW works as it is; DeepSpeed's own is faster but compiles C++ on first use.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.precision == "bf16"},
        # The scale of the loss is DeepSpeed's to find: from 65,536 it is halved at each step that overflows.
        "fp16": {"enabled": config.precision == "fp16"},
        "steps_per_print": 10**9,
    }
    if config.precision != "fp32" and (config.zero_stage >= 2 or config.offload_optimizer):
        # The sum of 256 micro-batches is 1 % off in bf16, and 0.2 % (as much as of two) in fp32. Not at stage 1
        # without offload: DeepSpeed then takes another optimizer wrapper, with three times the gradient memory.
        found["data_types"] = {"grad_accum_dtype": "fp32"}
    return found


def fixed_values(losses: nn.Module) -> dict[str, torch.Tensor]:
    """What the losses hold and do not train, a fixed temperature say, as the config says it; before the engine."""
    return {name: p.detach().clone() for name, p in losses.named_parameters() if not p.requires_grad}


@torch.no_grad()
def keep_fixed(losses: nn.Module, values: dict[str, torch.Tensor], stage: int) -> None:
    """Sets them again (collective): a checkpoint that another training wrote brings that one's along."""
    import contextlib

    import deepspeed

    found = {name: p for name, p in losses.named_parameters() if name in values}
    if not found:
        return
    every = list(found.values())
    with deepspeed.zero.GatheredParameters(every, modifier_rank=0) if stage == 3 else contextlib.nullcontext():
        for name, parameter in found.items():
            parameter.copy_(values[name])


def full_state(engine: Any, network: nn.Module, stage: int) -> dict[str, torch.Tensor] | None:
    """The whole weights of `network` on rank 0, None elsewhere; all ranks must call it (ZeRO-3 gathers)."""
    import contextlib

    import deepspeed

    parameters = list(network.parameters())
    gathered = deepspeed.zero.GatheredParameters(parameters) if stage == 3 else contextlib.nullcontext()
    with gathered:
        if engine.global_rank != 0:
            return None
        return {name: value.detach().float().cpu().clone() for name, value in network.state_dict().items()}
