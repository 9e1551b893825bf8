"""What a text tower is pre-trained with: the parts that put its texts together again (DupMAE, Xiao et al., 2022)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rayemb.models.errors import ModelError
from rayemb.models.towers import TextTower

# Shapes: B batch, L tokens, E width, H heads, V vocabulary. Position 0 is the text's first token, [CLS].

HEAD_WIDTH = 64


class Masked(NamedTuple):
    """Texts and what is hidden of them.

    ids:      `(B, L)` int64, the whole texts, -1 = padding
    masked:   `(B, L)` int64, the same as the tower reads them
    hidden:   `(B, L)` bool, what the tower has to tell of its own states
    ordinary: `(B, L)` bool, neither padding nor a special token: what the decoder has to tell
    visible:  `(B, L, L)` bool, which tokens the decoder sees while it tells each; at least the first one everywhere,
              never the token itself
    """

    ids: Tensor
    masked: Tensor
    hidden: Tensor
    ordinary: Tensor
    visible: Tensor


class Reconstruction(nn.Module):
    """The masked-language-model head and the one-layer enhanced decoder beside a text tower; thrown away afterwards.

    Both share the tower's token embeddings. The decoder sees of the tower nothing but the state of the first token, and
    has one layer: so whatever a text says must be in that state.
    """

    def __init__(self, tower: TextTower, max_length: int) -> None:
        """Raises ModelError for a tower whose token embeddings are not as wide as its states."""
        super().__init__()
        vocabulary, width = tower.embedding.weight.shape
        if width != tower.features:
            raise ModelError(
                f"its token embeddings have {width} dimensions and its states {tower.features}",
                where="model.text",
                fix="pre-train a tower where they are as wide",
            )
        self.head = _Head(width, vocabulary)
        self.decoder = _Decoder(width, max_length)

    def forward(self, tower: TextTower, texts: Masked) -> Tensor:
        """Sums `(B, 3)` fp32 of each text's losses.

        Cross-entropies of its hidden tokens from their own states; of its ordinary tokens from the decoder; and of its
        bag of words: each distinct one by 1 / (its ordinary tokens), from the largest logits over its states.
        """
        states = tower(texts.masked)[-1]
        # By attribute: that is where ZeRO-3 notices that the weight is wanted and gathers it.
        words = tower.embedding.weight
        logits = self.head(states, words)
        decoded = self.decoder(states[:, 0], F.embedding(texts.ids.clamp(min=0), words), texts.visible)
        return torch.stack(
            [
                _told(logits[texts.hidden], texts.ids, texts.hidden),
                _told(self.head(decoded[texts.ordinary], words), texts.ids, texts.ordinary),
                bag_of_words(logits, texts.ids, texts.ordinary),
            ],
            1,
        )


def bag_of_words(logits_BLV: Tensor, ids_BL: Tensor, ordinary_BL: Tensor) -> Tensor:
    """The loss `(B,)` fp32 of telling a text's distinct words from the largest logits over its ordinary tokens.

    Each distinct word counts 1 / (ordinary tokens), as in the released code: a repeated one no more than another.
    """
    wide = logits_BLV if logits_BLV.element_size() == 8 else logits_BLV.float()
    largest_BV = wide.masked_fill(~ordinary_BL[..., None], torch.finfo(wide.dtype).min).amax(1)
    found_BL = F.log_softmax(largest_BV, -1).gather(1, ids_BL.clamp(min=0))
    same_BLL = (ids_BL[:, :, None] == ids_BL[:, None, :]) & ordinary_BL[:, None, :]
    first_BL = ordinary_BL & ~same_BLL.tril(-1).any(-1)
    return -(found_BL * first_BL).sum(1) / ordinary_BL.sum(1).clamp(min=1)


def _told(logits_NV: Tensor, ids_BL: Tensor, which_BL: Tensor) -> Tensor:
    """Sum `(B,)` of the cross-entropies of the tokens `which_BL`, whose logits come in their order."""
    wide = logits_NV if logits_NV.element_size() == 8 else logits_NV.float()
    losses = F.cross_entropy(wide, ids_BL[which_BL], reduction="none")
    rows = torch.arange(len(ids_BL), device=ids_BL.device)[:, None].expand_as(ids_BL)[which_BL]
    return losses.new_zeros(len(ids_BL)).index_add(0, rows, losses)


class _Head(nn.Module):
    """States to logits over the vocabulary, by the tower's own token embeddings."""

    def __init__(self, width: int, vocabulary: int) -> None:
        super().__init__()
        self.dense, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        self.bias = nn.Parameter(torch.zeros(vocabulary))

    def forward(self, states: Tensor, words_VE: Tensor) -> Tensor:
        return F.linear(self.norm(F.gelu(self.dense(states))), words_VE, self.bias)


class _Decoder(nn.Module):
    """RetroMAE's enhanced decoder: at each position the first token's state asks, other words of the text answer."""

    def __init__(self, width: int, max_length: int) -> None:
        super().__init__()
        self.heads = next(heads for heads in range(max(1, width // HEAD_WIDTH), 0, -1) if width % heads == 0)
        self.positions = nn.Parameter(torch.randn(max_length, width) * 0.02)
        self.norm_queries, self.norm_words, self.norm_mlp = (nn.LayerNorm(width) for _ in range(3))
        self.query, self.key_value, self.out = (
            nn.Linear(width, width),
            nn.Linear(width, 2 * width),
            nn.Linear(width, width),
        )
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, first_BE: Tensor, words_BLE: Tensor, visible_BLL: Tensor) -> Tensor:
        B, L, E = words_BLE.shape
        queries = self.norm_queries(first_BE[:, None] + self.positions[:L])
        words = torch.cat([first_BE[:, None], words_BLE[:, 1:]], 1) + self.positions[:L]
        q = self.query(queries).view(B, L, self.heads, -1).transpose(1, 2)
        k, v = self.key_value(self.norm_words(words)).view(B, L, 2, self.heads, -1).permute(2, 0, 3, 1, 4)
        seen = F.scaled_dot_product_attention(q, k, v, attn_mask=visible_BLL[:, None])
        x = queries + self.out(seen.transpose(1, 2).reshape(B, L, E))
        told: Tensor = x + self.down(F.gelu(self.up(self.norm_mlp(x))))
        return told
