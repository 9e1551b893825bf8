"""ZeRO's state at another number of workers: its shards cut anew, whatever the optimizer keeps in them.

Not DeepSpeed's universal checkpoint: that one knows Adam's two moments and no other state (a mean of the weights would
be lost), gives every parameter group the first one's weight decay at stage 3, and fails at stages 1 and 2 where a rank
has no share of a group (seen in DeepSpeed 0.19.8).
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

FP32_12, STATE_12, PADDINGS_12 = "single_partition_of_fp32_groups", "base_optimizer_state", "group_paddings"
FP32_3, STATE_3 = "fp32_flat_groups", "optimizer_state_dict"


def load_resharded(engine: Any, folder: Path, written: int) -> None:
    """Loads the checkpoint that `written` ranks saved in `folder` into the engine of another number of ranks.

    Every rank reads what it needs of every rank's file. Collective at stage 3. Raises ValueError for a state that
    cannot be cut into other parts.
    """
    stage = engine.zero_optimization_stage()
    name = "zero_pp_rank_0_mp_rank_00_model_states.pt" if stage == 3 else "mp_rank_00_model_states.pt"
    model = _load(folder / name)
    found = [_optimizer_file(folder, rank) for rank in range(written)]
    shards = [_load(path)["optimizer_state_dict"] for path in found]
    optimizer = engine.optimizer
    if stage == 3:
        optimizer.checkpoint_event_prologue()
        # The weights come with the optimizer's state; what lies in this file of them are empty tensors.
        buffers = {name for name, _ in engine.module.named_buffers()}
        module = {name: value for name, value in model["module"].items() if name in buffers}
        engine.module.load_state_dict(module, strict=False)
        mine = _cut_stage_3(engine, model["param_shapes"], shards)
    else:
        engine.module.load_state_dict(model["module"])
        mine = _cut_stage_12(optimizer, model["param_shapes"], shards)
    states: list[Any] = [None] * dist.get_world_size()
    states[dist.get_rank()] = mine
    optimizer.load_state_dict(states, load_optimizer_states=True, load_from_fp32_weights=True)
    if stage == 3:
        optimizer.checkpoint_event_epilogue()
    for name in ("global_steps", "global_samples", "skipped_steps"):
        setattr(engine, name, model[name])


def _load(path: Path) -> dict[str, Any]:
    # Written by this run: DeepSpeed's own classes are in it. Mapped: of the others' shards only parts are read.
    found: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=False, mmap=True)
    return found


def _optimizer_file(folder: Path, rank: int) -> Path:
    names = [f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for prefix in ("", "bf16_")]
    return next((folder / name for name in names if (folder / name).exists()), folder / names[0])


def _cut_stage_12(optimizer: Any, shapes: Sequence[dict[str, Any]], shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """This rank's state at stages 1 and 2: each group is one flat tensor, padded at its end, in equal parts."""
    rank = dist.get_rank()
    weights: list[Tensor] = []
    state: dict[Any, dict[str, Any]] = {}
    groups = shards[0][STATE_12]["param_groups"]
    for number, group in enumerate(groups):
        total = sum(math.prod(shape) for shape in shapes[number].values())
        size = optimizer.single_partition_of_fp32_groups[number].numel()
        held = [shard[FP32_12][number].numel() for shard in shards]
        padded = held[0] + shards[0][PADDINGS_12][number]
        weights.append(_cut([shard[FP32_12][number] for shard in shards], rank * size, size, total))
        (key,) = group["params"]
        parts = [shard[STATE_12]["state"].get(key, {}) for shard in shards]
        state[key] = dict(parts[0])
        for name, value in parts[0].items():
            if _is_shard(value, padded, name):
                bare = [part[name][:length] for part, length in zip(parts, held, strict=True)]
                state[key][name] = _cut(bare, rank * size, size, total)
    return {
        **shards[0],
        FP32_12: weights,
        STATE_12: {"state": state, "param_groups": groups},
        PADDINGS_12: optimizer.groups_padding,
    }


def _cut_stage_3(engine: Any, shapes: Sequence[dict[str, Any]], shards: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """This rank's state at stage 3: each parameter is cut on its own, its part padded to the same size on all ranks."""
    rank, world, old = dist.get_rank(), dist.get_world_size(), len(shards)
    places = {name: place for name, *place in _places(shapes, old)}
    weights: list[Tensor] = []
    state: dict[int, dict[str, Any]] = {}
    saved = shards[0][STATE_3]["state"]
    for number, sub_group in enumerate(engine._get_zero_param_shapes()):
        first = next(iter(sub_group))
        source = places[first][0]
        length = shards[0][FP32_3][source].numel()
        kept = {name: _is_shard(value, length, name) for name, value in saved.get(source, {}).items()}
        pieces: dict[str, list[Tensor]] = {name: [] for name, shard in kept.items() if shard}
        flat: list[Tensor] = []
        for name, shape in sub_group.items():
            group, offset, part = places[name]
            total = math.prod(shape)
            size = math.ceil(total / world)

            def cut(
                tensors: list[Tensor], offset: int = offset, part: int = part, size: int = size, total: int = total
            ) -> Tensor:
                return _cut([tensor[offset : offset + part] for tensor in tensors], rank * size, size, total)

            flat.append(cut([shard[FP32_3][group] for shard in shards]))
            for key, list_ in pieces.items():
                list_.append(cut([shard[STATE_3]["state"][group][key] for shard in shards]))
        weights.append(torch.cat(flat))
        state[number] = {key: torch.cat(pieces[key]) if shard else saved[source][key] for key, shard in kept.items()}
    # Sub-groups are numbered through; their number may differ from that of the checkpoint.
    owners = [engine.optimizer.sub_group_to_group_id[number] for number in range(len(weights))]
    saved_groups = shards[0][STATE_3]["param_groups"]
    groups = [
        {**saved_groups[at], "params": [number for number, owner in enumerate(owners) if owner == at]}
        for at in range(len(saved_groups))
    ]
    return {**shards[0], FP32_3: weights, STATE_3: {"state": state, "param_groups": groups}}


def _places(shapes: Sequence[dict[str, Any]], world: int) -> Iterator[tuple[str, int, int, int]]:
    """Name, sub-group, offset in a rank's flat tensor and length of a rank's part of each parameter."""
    for group, sub_group in enumerate(shapes):
        offset = 0
        for name, shape in sub_group.items():
            part = math.ceil(math.prod(shape) / world)
            yield name, group, offset, part
            offset += part


def _cut(parts: Sequence[Tensor], start: int, size: int, total: int) -> Tensor:
    """`size` entries from `start` on of the parts one after the other; zeros beyond `total`."""
    out = torch.zeros(size, dtype=parts[0].dtype)
    stop, at = min(start + size, total), 0
    for part in parts:
        low, high = max(start, at), min(stop, at + part.numel())
        if low < high:
            out[low - start : high - start] = part[low - at : high - at]
        at += part.numel()
    return out


def _is_shard(value: Any, length: int, name: str) -> bool:
    """Whether a state belongs to the entries of a shard, rather than to the whole group."""
    if not torch.is_tensor(value) or value.ndim == 0:
        return False
    if value.ndim == 1 and value.numel() == length:
        return True
    raise ValueError(
        f"the optimizer's state {name!r} of shape {tuple(value.shape)} cannot be cut for another number of workers"
    )
