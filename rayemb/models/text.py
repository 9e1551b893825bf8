"""A pre-norm text transformer."""

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F

from rayemb.models.context import interpolated, positions
from rayemb.models.errors import ModelError
from rayemb.models.packing import pack
from rayemb.models.tokenizer import PADDING
from rayemb.models.towers import TextTower, TextTowerConfig

# Shapes: B batch, L tokens, E width, H heads, D embedding.


class TextTransformerConfig(TextTowerConfig):
    """Pre-norm transformer encoder over token ids."""

    name: Literal["transformer"] = "transformer"
    width: int = Field(128, gt=0, description="model width E")
    depth: int = Field(3, gt=0, description="number of blocks")
    heads: int = Field(4, gt=0, description="attention heads; divides width")
    mlp_ratio: float = Field(4.0, gt=0, description="hidden width of the MLP over E")
    dropout: float = Field(0.0, ge=0, lt=1, description="probability, on attention and MLP outputs")
    drop_heads: float = Field(
        0.0, ge=0, lt=1, description="probability of an attention head to be left out of a text (drophead, Mirror-BERT)"
    )
    causal: bool = Field(False, description="whether a token sees only those before it, as in a decoder")

    @model_validator(mode="after")
    def _divides(self) -> "TextTransformerConfig":
        if self.width % self.heads:
            raise ValueError(f"heads ({self.heads}) must divide width ({self.width})")
        return self

    def cut(self, layers: int) -> "TextTransformerConfig":
        """The same with its first so many layers alone."""
        return self.model_copy(update={"depth": layers})

    def build(self, vocab_size: int, max_length: int) -> TextTower:
        """The tower, with random weights."""
        return TextTransformer(self, vocab_size, max_length)


def heads_dropped(attended_BHLE: Tensor, probability: float) -> Tensor:
    """What heads attend to, `(B, H, L, E)`, some heads of each text at zero and the others H / kept times as large.

    One head is always kept (Zhou et al., Scheduled DropHead, 2020; as Mirror-BERT uses it).
    """
    drawn_BH = torch.rand(attended_BHLE.shape[:2], device=attended_BHLE.device)
    kept_BH = (drawn_BH >= probability) | (drawn_BH == drawn_BH.amax(1, keepdim=True))
    scale_BH = kept_BH * kept_BH.shape[1] / kept_BH.sum(1, keepdim=True)
    return attended_BHLE * scale_BH[..., None, None].to(attended_BHLE.dtype)


class _Block(nn.Module):
    def __init__(self, config: TextTransformerConfig) -> None:
        super().__init__()
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.heads = config.heads
        self.scale = (width // config.heads) ** -0.5 / config.attention_temperature
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout, self.drop_heads = nn.Dropout(config.dropout), config.drop_heads

    def forward(self, x_BLE: Tensor, mask_B1LL: Tensor) -> Tensor:
        B, L, E = x_BLE.shape
        q, k, v = self.qkv(self.norm_attention(x_BLE)).view(B, L, 3, self.heads, E // self.heads).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_B1LL, scale=self.scale)
        if self.training and self.drop_heads:
            attended = heads_dropped(attended, self.drop_heads)
        x_BLE = x_BLE + self.dropout(self.out(attended.transpose(1, 2).reshape(B, L, E)))
        hidden = F.gelu(self.up(self.norm_mlp(x_BLE)))
        out: Tensor = x_BLE + self.dropout(self.down(hidden))
        return out


class TextTransformer(TextTower):
    """Token ids to the states of its blocks; those of the last one are normed."""

    def __init__(self, config: TextTransformerConfig, vocab_size: int, max_length: int) -> None:
        super().__init__()
        self.features, self.layers, self.causal = config.width, config.depth, config.causal
        self.tokens = nn.Embedding(vocab_size, config.width)
        self.context, self._trained = config.context, max_length
        if config.context is not None:
            if config.context.trained is None or config.context.mode == "ntk":
                raise ModelError(
                    "its positions are a table: say how many there are, and no mode of rotary ones",
                    where="model.text.context",
                    fix="give trained, and one of grouped, recurrent and interpolated; or use Model.longer",
                )
            self._trained, self._scale = config.context.trained, -(-max_length // config.context.trained)
        self.longest = self._trained
        self.positions = nn.Parameter(torch.empty(self._trained, config.width))
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width)
        self.packs, self._drop_heads = True, config.drop_heads > 0
        nn.init.normal_(self.tokens.weight, std=0.02)
        nn.init.normal_(self.positions, std=0.01)

    @property
    def embedding(self) -> nn.Embedding:
        """The vectors of its tokens."""
        return self.tokens

    def finished(self, state_BLE: Tensor) -> Tensor:
        """The states behind the last norm."""
        normed: Tensor = self.norm(state_BLE)
        return normed

    def forward(self, ids_BL: Tensor, *, every_layer: bool = False) -> list[Tensor]:
        """States `(B, L, E)` in the compute dtype."""
        # Heads are left out of a text and not of a row.
        whole = self._stretched(ids_BL) or (self.training and self._drop_heads)
        packed = pack(ids_BL) if self.packs and not whole else None
        if packed is None:
            x = self.tokens(ids_BL.clamp(min=0)) + self._positions(ids_BL)
            mask = (ids_BL != PADDING)[:, None, None, :]
            if self.causal:
                mask = mask & torch.ones(mask.shape[-1], mask.shape[-1], dtype=torch.bool, device=mask.device).tril()
        else:
            x = self.tokens(packed.ids.clamp(min=0)) + F.embedding(packed.positions, self.positions)
            mask = packed.mask(causal=self.causal)
        states = []
        for block in self.blocks:
            x = block(x, mask)
            states.append(x)
        states[-1] = self.norm(x)
        wanted = states if every_layer else states[-1:]
        return wanted if packed is None else [packed.unpacked(state) for state in wanted]

    def _stretched(self, ids_BL: Tensor) -> bool:
        """Whether there are texts beyond the trained positions."""
        return self.context is not None and ids_BL.shape[1] > self._trained

    def _positions(self, ids_BL: Tensor) -> Tensor:
        """What is added for the places of the tokens, `(L, E)` or `(B, L, E)`."""
        if self.context is None or not self._stretched(ids_BL):
            return self.positions[: ids_BL.shape[1]]
        return interpolated(self.positions, positions(ids_BL, self._trained, self._scale, self.context.mode))
