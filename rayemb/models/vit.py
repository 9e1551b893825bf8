"""A vision transformer (Dosovitskiy et al., 2021): pre-norm, mean over patches."""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from rayemb.models.towers import ImageTower, ImageTowerConfig

# Shapes: B batch, P patches, E width.


class ViTConfig(ImageTowerConfig):
    """Patches as tokens, learned positions, the mean over the patches (Beyer et al., Better plain ViT, 2022)."""

    name: Literal["vit"] = "vit"
    image_size: int = Field(48, ge=8, description="side of the square input, in pixels")
    patch: int = Field(8, gt=0, description="side of a patch, in pixels; divides image_size")
    width: int = Field(192, gt=0, description="model width E")
    depth: int = Field(6, gt=0, description="number of blocks")
    heads: int = Field(3, gt=0, description="attention heads; divides width")
    mlp_ratio: float = Field(4.0, gt=0, description="hidden width of the MLP over E")

    @model_validator(mode="after")
    def _divide(self) -> "ViTConfig":
        if self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width})")
        if self.image_size % self.patch:
            raise ValueError(f"patch ({self.patch}) must divide image_size ({self.image_size})")
        return self

    def build(self) -> ImageTower:
        """The tower, with random weights."""
        return ViT(self)


class _Block(nn.Module):
    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.heads = config.heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x_BPE: Tensor) -> Tensor:
        B, P, E = x_BPE.shape
        q, k, v = self.qkv(self.norm_attention(x_BPE)).view(B, P, 3, self.heads, E // self.heads).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v)
        x_BPE = x_BPE + self.out(seen.transpose(1, 2).reshape(B, P, E))
        out: Tensor = x_BPE + self.down(F.gelu(self.up(self.norm_mlp(x_BPE))))
        return out


class ViT(ImageTower):
    """Pixels `(B, 3, S, S)` uint8 to features `(B, E)`."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.features, self.image_size = config.width, config.image_size
        self.patches = nn.Conv2d(3, config.width, config.patch, stride=config.patch)
        self.positions = nn.Parameter(torch.randn((config.image_size // config.patch) ** 2, config.width) * 0.02)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)

    def forward(self, pixels: Tensor) -> Tensor:
        """Features `(B, E)` in the dtype of the weights."""
        x = (pixels.to(self.norm.weight.dtype) / 255.0 - 0.5) / 0.5
        x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            x = block(x)
        pooled: Tensor = self.norm(x).mean(1)
        return pooled
