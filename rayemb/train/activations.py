"""Activation checkpointing: what a block computes is computed again in the backward instead of kept."""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from rayemb.errors import RayembError

STACKS = ("blocks", "layers", "layer")


def checkpoint_blocks(network: nn.Module) -> int:
    """Has every block of `network` keep its input alone for the backward; gives their number.

    A block is a module of several parts in a list named `blocks`, `layers` or `layer`. Numbers and gradients stay the
    same, dropout included; a step costs about one more forward of the blocks. Raises RayembError if there are none.
    """
    blocks = [
        block
        for name, stack in network.named_modules()
        if isinstance(stack, nn.ModuleList | nn.Sequential) and name.rsplit(".", 1)[-1] in STACKS
        for block in stack
        if len(list(block.children())) > 1
    ]
    if not blocks:
        raise RayembError("the model has no blocks", where="train.checkpoint_activations", fix="switch it off")
    for block in blocks:
        block.forward = _Checkpointed(block.forward)
    return len(blocks)


class _Checkpointed:
    """A forward whose activations are not kept."""

    def __init__(self, forward: Any) -> None:
        self.forward = forward

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if not torch.is_grad_enabled():
            return self.forward(*arguments, **named)
        # No check of shapes: a parameter that ZeRO-3 has taken away is saved as an empty tensor.
        return checkpoint(self.forward, *arguments, use_reentrant=False, determinism_check="none", **named)
