"""The DeepSpeed engine of one worker, set up as it was found to be exact on CPU and GPU."""

import logging
import math
from typing import Any

import torch
from torch import nn

from rayemb.errors import RayembError
from rayemb.train.config import TrainConfig

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
    optimizer = torch.optim.AdamW(
        parameter_groups(module, config.weight_decay), lr=config.learning_rate, betas=config.betas
    )
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=deepspeed_config(config), dist_init_required=False
    )
    return engine


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of step `step` (0-based): linear warm-up, then cosine to zero at the end."""
    warm = min(1.0, (step + 1) / max(1, config.warmup_steps))
    return config.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / config.steps))


def set_learning_rate(engine: Any, rate: float) -> None:
    """Sets the rate of every parameter group."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; norms, biases, positions' offsets and the temperature do not."""
    trainable = [p for p in module.parameters() if p.requires_grad]
    matrices = [p for p in trainable if p.ndim > 1]
    vectors = [p for p in trainable if p.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]


def deepspeed_config(config: TrainConfig) -> dict[str, Any]:
    """What `deepspeed.initialize` gets: every key that has a default which would change the gradient is said."""
    stage: dict[str, Any] = {"stage": config.zero_stage}
    if config.offload_optimizer:
        if config.zero_stage == 0:
            raise RayembError("stage 0 cannot offload", where="offload_optimizer", fix="use zero_stage 1, 2 or 3")
        stage["offload_optimizer"] = {"device": "cpu", "pin_memory": bool(config.gpus_per_worker)}
    found: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": config.batch_size // config.workers,
        # Micro-batches are ours (`train_step`), so that DeepSpeed never divides a gradient by their number.
        "gradient_accumulation_steps": 1,
        # Always said: DeepSpeed clips at 1.0 where nothing is said.
        "gradient_clipping": config.gradient_clipping,
        "zero_optimization": stage,
        "zero_allow_untested_optimizer": True,
        # Offloaded, torch's AdamW works as it is; DeepSpeed's own is faster but compiles C++ on first use.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": config.precision == "bf16"},
        "steps_per_print": 10**9,
    }
    if config.precision == "bf16" and (config.zero_stage >= 2 or config.offload_optimizer):
        # The sum of 256 micro-batches is 1 % off in bf16, and 0.2 % (as much as of two) in fp32. Not at stage 1
        # without offload: DeepSpeed then takes another optimizer wrapper, with three times the gradient memory.
        found["data_types"] = {"grad_accum_dtype": "fp32"}
    return found


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
