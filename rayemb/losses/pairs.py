"""The idea that holds the house together: an objective is a choice of pairs."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Duplicates = Literal["positive", "ignore", "negative"]


@dataclass(frozen=True)
class Pairs:
    """Which candidates are positives of which anchors, and which are left out.

    `positives` `(B, M)` float >= 0, each row with at least one positive weight; `ignore` `(B, M)` bool or None.
    """

    positives: Tensor
    ignore: Tensor | None = None


def pair_by_group(groups_B: Tensor, groups_M: Tensor, start: int, duplicates: Duplicates) -> Pairs:
    """Pairs of anchors with candidates by group id (int64): anchor `i`'s own positive is candidate `start + i`.

    Other candidates of the same group are false negatives. `duplicates` says what becomes of them: further
    positives, ignored, or (as plain CLIP has it) negatives after all.
    """
    own = torch.arange(groups_B.shape[0], device=groups_B.device)
    diagonal = torch.zeros(groups_B.shape[0], groups_M.shape[0], dtype=torch.bool, device=groups_B.device)
    diagonal[own, own + start] = True
    same = groups_B[:, None] == groups_M[None, :]
    if duplicates == "positive":
        return Pairs((same | diagonal).to(torch.float32))
    return Pairs(diagonal.to(torch.float32), same & ~diagonal if duplicates == "ignore" else None)
