"""Poolings with attention of their own: a learned query, latents as keys, latents as queries over all layers."""

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from rayemb.models.pooling.base import Pooling, PoolingConfig, last_token, masked_mean


class AttentionPoolingConfig(PoolingConfig):
    """One learned query looks at all tokens (the `map` head of Zhai et al., Scaling Vision Transformers, 2022)."""

    name: Literal["attention"] = "attention"
    heads: int = Field(4, gt=0, description="attention heads; divides the width of the tower")

    def build(self, features: int, layers: int, *, causal: bool) -> Pooling:
        """The pooling. Raises ValueError if the heads do not divide the width."""
        return AttentionPooling(features, _divides(self.heads, features))


class LatentAttentionPoolingConfig(PoolingConfig):
    """Tokens look up a learned dictionary, then their mean (NV-Embed, Lee et al., 2024)."""

    name: Literal["latent_attention"] = "latent_attention"
    latents: int = Field(64, gt=0, description="entries R of the dictionary; 512 in the paper, for a 7B model")
    heads: int = Field(4, gt=0, description="attention heads; divides the width of the tower")

    def build(self, features: int, layers: int, *, causal: bool) -> Pooling:
        """The pooling. Raises ValueError if the heads do not divide the width."""
        return LatentAttentionPooling(features, self.latents, _divides(self.heads, features))


class MultiLayerPoolingConfig(PoolingConfig):
    """Learned latents look at one vector of each layer (Tang and Yang, Pooling And Attention, 2024)."""

    name: Literal["multi_layer"] = "multi_layer"
    latents: int = Field(32, gt=0, description="learned queries R; 768 in the paper, for a 7B model")
    heads: int = Field(4, gt=0, description="attention heads; divides the width of the tower")

    def build(self, features: int, layers: int, *, causal: bool) -> Pooling:
        """The pooling. Raises ValueError if the heads do not divide the width."""
        return MultiLayerPooling(features, layers, self.latents, _divides(self.heads, features), causal=causal)


class _CrossAttention(nn.Module):
    """`context` looks at `memory`, both normed first, without biases; what it saw, projected."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_context, self.norm_memory = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.keys_values = nn.Linear(width, 2 * width, bias=False)

    def forward(self, context_BQE: Tensor, memory_BKE: Tensor, mask_BK: Tensor | None = None) -> Tensor:
        B, Q, E = context_BQE.shape
        K = memory_BKE.shape[1]
        q = self.query(self.norm_context(context_BQE)).view(B, Q, self.heads, -1).transpose(1, 2)
        k, v = self.keys_values(self.norm_memory(memory_BKE)).view(B, K, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask_BK is None else mask_BK[:, None, None])
        out: Tensor = self.out(seen.transpose(1, 2).reshape(B, Q, E))
        return out


class _GegluFeedForward(nn.Module):
    """GELU-gated feed-forward (Shazeer, 2020), four times as wide inside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.up(self.norm(x)).chunk(2, dim=-1)
        out: Tensor = self.down(value * F.gelu(gate))
        return out


class AttentionPooling(Pooling):
    """A learned query over the tokens of the mask, and a feed-forward with a residual."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.randn(1, width) * width**-0.5)
        self.attention, self.feed_forward = _CrossAttention(width, heads), _GegluFeedForward(width)

    def forward(self, layers: Sequence[Tensor], mask_BL: Tensor) -> Tensor:
        """Features `(B, E)`."""
        states = layers[-1]
        # A text without a token that counts: all of it, rather than a softmax over nothing.
        mask = mask_BL | ~mask_BL.any(1, keepdim=True)
        x = self.attention(self.latent.expand(len(states), -1, -1), states, mask)
        pooled: Tensor = (x + self.feed_forward(x))[:, 0]
        return pooled


class LatentAttentionPooling(Pooling):
    """`O = H + A(H, Z)`, `O + FF(O)`, masked mean: tokens H are the queries, latents Z are keys and values.

    As many states come out as went in, so that the mask stays what it was.
    """

    def __init__(self, width: int, latents: int, heads: int) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(latents, width))
        self.attention, self.feed_forward = _CrossAttention(width, heads), _GegluFeedForward(width)

    def forward(self, layers: Sequence[Tensor], mask_BL: Tensor) -> Tensor:
        """Features `(B, E)`."""
        states = layers[-1]
        x = states + self.attention(states, self.latents.expand(len(states), -1, -1))
        return masked_mean(x + self.feed_forward(x), mask_BL)


class MultiLayerPooling(Pooling):
    """Latents are the queries; keys and values are one vector of each layer plus that layer's learned position.

    The vector of a layer is its last token under causal attention, else the mean over its tokens. The mean over the
    latents comes out.
    """

    every_layer: ClassVar[bool] = True

    def __init__(self, width: int, layers: int, latents: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.causal = causal
        self.latents = nn.Parameter(torch.randn(latents, width))
        self.layer_positions = nn.Parameter(torch.randn(layers, width) * 0.02)
        self.attention, self.feed_forward = _CrossAttention(width, heads), _GegluFeedForward(width)

    def forward(self, layers: Sequence[Tensor], mask_BL: Tensor) -> Tensor:
        """Features `(B, E)`. Raises ValueError for another number of layers than it was built for."""
        if len(layers) != len(self.layer_positions):
            raise ValueError(f"built for {len(self.layer_positions)} layers, got the states of {len(layers)}")
        pool = last_token if self.causal else masked_mean
        memory_BNE = torch.stack([pool(layer, mask_BL) for layer in layers], dim=1) + self.layer_positions
        latents = self.latents.expand(len(memory_BNE), -1, -1)
        x = latents + self.attention(latents, memory_BNE)
        pooled: Tensor = (x + self.feed_forward(x)).mean(1)
        return pooled


def _divides(heads: int, width: int) -> int:
    if width % heads:
        raise ValueError(f"pooling.heads ({heads}) must divide the width of the tower ({width})")
    return heads
