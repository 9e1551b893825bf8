"""A compact ConvNeXt-style image encoder (Liu et al., A ConvNet for the 2020s, 2022) for small pictures."""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from rayemb.models.towers import ImageTower, ImageTowerConfig


class ConvNetConfig(ImageTowerConfig):
    """Stages of depthwise-convolution blocks; each stage halves the resolution of the one before."""

    name: Literal["convnet"] = "convnet"
    image_size: int = Field(48, ge=8, description="side of the square input, in pixels")
    patch: int = Field(4, gt=0, description="side of the patches of the stem, in pixels")
    widths: tuple[int, ...] = Field((48, 96, 192), min_length=1, description="channels of each stage")
    depths: tuple[int, ...] = Field((1, 2, 2), min_length=1, description="blocks of each stage")

    @model_validator(mode="after")
    def _agree(self) -> "ConvNetConfig":
        if len(self.widths) != len(self.depths):
            raise ValueError(f"widths has {len(self.widths)} stages, depths {len(self.depths)}")
        if self.image_size % (self.patch * 2 ** (len(self.widths) - 1)):
            raise ValueError("image_size must be a multiple of patch * 2^(stages - 1)")
        return self

    def build(self) -> ImageTower:
        """The tower, with random weights."""
        return ConvNet(self)


class _ChannelNorm(nn.Module):
    """Layer norm over the channels of `(B, C, H, W)`."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return normed


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        # Channels last from here on: the 1x1 convolutions of the paper are plain matrix products.
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        out: Tensor = x + self.down(F.gelu(self.up(y))).permute(0, 3, 1, 2)
        return out


class ConvNet(ImageTower):
    """Pixels `(B, 3, S, S)` uint8 to features `(B, E)`, E = the last width."""

    def __init__(self, config: ConvNetConfig) -> None:
        super().__init__()
        self.features, self.image_size = config.widths[-1], config.image_size
        layers: list[nn.Module] = [nn.Conv2d(3, config.widths[0], config.patch, stride=config.patch)]
        for stage, (width, depth) in enumerate(zip(config.widths, config.depths, strict=True)):
            if stage:
                layers += [_ChannelNorm(config.widths[stage - 1])]
                layers += [nn.Conv2d(config.widths[stage - 1], width, 2, stride=2)]
            layers += [_Block(width) for _ in range(depth)]
        self.layers = nn.Sequential(*layers)
        self.norm = nn.LayerNorm(self.features)

    def forward(self, pixels: Tensor) -> Tensor:
        """Features `(B, E)` in the dtype of the weights."""
        weight = self.norm.weight
        x = (pixels.to(weight.dtype) / 255.0 - 0.5) / 0.5
        x = self.layers(x.contiguous(memory_format=torch.channels_last))
        pooled: Tensor = self.norm(x.mean((2, 3)))
        return pooled
