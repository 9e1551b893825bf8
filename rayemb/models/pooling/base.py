"""What every pooling offers: one vector of a text from the states of its tokens."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from rayemb.config import Config

# Shapes: B batch, L tokens, E width, N layers, R latents.


class Pooling(nn.Module, ABC):
    """States of tokens to features `(B, E)`.

    `every_layer`: whether it wants the states of all layers, not of the last alone.
    """

    every_layer: ClassVar[bool] = False

    @abstractmethod
    def forward(self, layers: Sequence[Tensor], mask_BL: Tensor) -> Tensor:
        """Features `(B, E)` of the states `(B, L, E)` of each layer, the last one last.

        `mask_BL` (bool): the tokens that count; padding does not, nor an instruction that is not to be pooled.
        """


class PoolingConfig(Config, ABC):
    """Config of a pooling."""

    @abstractmethod
    def build(self, features: int, layers: int, *, causal: bool) -> Pooling:
        """The pooling for a tower of this width, so many layers, and causal attention or not."""


def masked_mean(x_BLE: Tensor, mask_BL: Tensor) -> Tensor:
    """The mean `(B, E)` over the tokens of the mask; zeros for a text without any."""
    mask = mask_BL[..., None]
    # Not x * mask: whatever stands at a padding token, an infinity too, must not come through.
    total = x_BLE.masked_fill(~mask, 0.0).sum(1)
    mean: Tensor = total / mask.sum(1).clamp(min=1)
    return mean


def last_token(x_BLE: Tensor, mask_BL: Tensor) -> Tensor:
    """The state `(B, E)` of the last token of the mask, wherever the padding is; the first for a text without any."""
    places = torch.arange(mask_BL.shape[1], device=mask_BL.device)
    at = (places * mask_BL).amax(1)
    return x_BLE[torch.arange(len(x_BLE), device=x_BLE.device), at]
