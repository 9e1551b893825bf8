"""Texts longer than a tower was trained for, without training (LongEmbed, Zhu et al., 2024; card S175).

A text within the trained positions is read exactly as before, whatever stands beside it in the batch.
Shapes: B batch, L tokens, M trained positions, E width, H half of a head's width.
"""

from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from rayemb.config import Config
from rayemb.models.errors import ModelError
from rayemb.models.tokenizer import PADDING

ContextMode = Literal["grouped", "recurrent", "interpolated", "ntk"]


class ContextConfig(Config):
    """How positions beyond the trained ones are told; which of these is best is for an evaluation to say."""

    mode: ContextMode = Field(
        description="grouped: neighbours share a position, as few as the text needs; recurrent: positions begin anew; "
        "interpolated: positions between the trained ones; ntk: rotary ones of a larger base, which turn slower"
    )
    trained: int | None = Field(None, ge=1, description="positions M that it was trained with; null: all it has")
    factor: float = Field(10.0, gt=0, description="of mode ntk: times the base of the rotary positions")


def positions(ids_BL: Tensor, trained: int, scale: int, mode: ContextMode) -> Tensor:
    """The position `(B, L)` float of each token, 0 to M - 1 (ntk: beyond); 0 where there is none.

    Of ids `(B, L)` int64, -1 = padding. `scale`: how many times the trained positions the longest text has, a whole
    number: interpolated positions are so many times as near. Texts of at most M tokens have 0, 1, 2, ...
    """
    real_BL = ids_BL != PADDING
    place_BL = (real_BL.cumsum(1) - 1).clamp(min=0)
    length_B1 = real_BL.sum(1, keepdim=True)
    if mode == "grouped":
        long = place_BL // ((length_B1 + trained - 1) // trained).clamp(min=1)
        found = long.float()
    elif mode == "recurrent":
        found = (place_BL % trained).float()
    elif mode == "interpolated":
        found = torch.where(length_B1 > trained, place_BL / scale, place_BL.float())
    else:
        found = place_BL.float()
    return found.masked_fill(~real_BL, 0.0)


def interpolated(table_ME: Tensor, at_BL: Tensor) -> Tensor:
    """Rows `(B, L, E)` of a table at fractional places, linearly between two neighbours; beyond the last: the last."""
    low = at_BL.floor().long().clamp(max=table_ME.shape[0] - 1)
    share = (at_BL - low).clamp(0, 1).to(table_ME.dtype)[..., None]
    upper = F.embedding((low + 1).clamp(max=table_ME.shape[0] - 1), table_ME)
    return torch.lerp(F.embedding(low, table_ME), upper, share)


class StretchedTable(nn.Module):
    """A learned table of positions that is read between its rows; in place of an `nn.Embedding`, with its weight.

    `before`: rows before the one of position 0.
    """

    def __init__(self, table: nn.Embedding, before: int) -> None:
        super().__init__()
        self.weight, self.before = table.weight, before

    def forward(self, at_BL: Tensor) -> Tensor:
        """Rows `(B, L, E)`; whole numbers are rows of the table, as of an embedding."""
        if not at_BL.is_floating_point():
            return F.embedding(at_BL, self.weight)
        return interpolated(self.weight[self.before :], at_BL)


class SlowRotation(nn.Module):
    """Rotary positions whose base is larger for texts beyond the trained length: high frequencies stay, low ones slow.

    In place of a rotary module of `transformers` with one table of frequencies `inv_freq` (H,).
    """

    def __init__(self, rotary: Any, trained: int, factor: float) -> None:
        super().__init__()
        self.rotary, self.trained, self.factor = rotary, trained, factor

    def forward(self, x: Tensor, position_ids: Tensor, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        """Cosines and sines `(B, L, 2 H)` of positions `(B, L)`."""
        plain = self.rotary(x, position_ids, *more, **named)
        long = position_ids.amax(1) >= self.trained
        if not bool(long.any()):
            return plain  # type: ignore[no-any-return]
        kept = self.rotary.inv_freq
        share = torch.arange(len(kept), device=kept.device) / len(kept)
        try:
            self.rotary.inv_freq = kept * self.factor**-share
            slow = self.rotary(x, position_ids, *more, **named)
        finally:
            self.rotary.inv_freq = kept
        cos, sin = (torch.where(long[:, None, None], b, a) for a, b in zip(plain, slow, strict=True))
        return cos, sin


class LongContext(nn.Module):
    """What a network of `transformers` is given so that it reads on. Changes its modules, not its weights' names."""

    def __init__(self, config: ContextConfig, model: Any, trained: int, max_length: int) -> None:
        """Raises ModelError for a network whose positions cannot be told so."""
        super().__init__()
        self.mode, self.trained, self.scale = config.mode, trained, -(-max_length // trained)
        tables = _tables(model)
        rotary = [(n, m) for n, m in model.named_modules() if isinstance(getattr(m, "inv_freq", None), Tensor)]
        self.learned = len(tables) == 1
        self.before = 0
        if len(tables) + len(rotary) != 1 or (self.learned and config.mode == "ntk"):
            what = f"{len(tables)} tables of positions and {len(rotary)} of rotary frequencies"
            raise ModelError(
                f"{type(model).__name__} has {what}: mode {config.mode} is not for it",
                where="model.text.context",
                fix="grouped, recurrent and interpolated need one of either, ntk rotary ones",
            )
        if self.learned:
            name, table = tables[0]
            self.before = _before(table)
            if config.mode == "interpolated":
                model.set_submodule(name, StretchedTable(table, self.before))
        elif config.mode == "ntk":
            name, module = rotary[0]
            model.set_submodule(name, SlowRotation(module, trained, config.factor))

    def inputs(self, ids_BL: Tensor) -> dict[str, Tensor]:
        """Further inputs of the network's forward for ids `(B, L)`; none where every text is within its positions."""
        if ids_BL.shape[1] <= self.trained:
            return {}
        at = positions(ids_BL, self.trained, self.scale, self.mode)
        if self.learned and self.mode != "interpolated":
            at = at.long() + self.before
        return {"position_ids": at}


def trained_positions(model: Any, settings: Any) -> int | None:
    """How many positions a network of `transformers` was made for; None if nothing says it."""
    for _, table in _tables(model):
        return int(table.num_embeddings - _before(table))
    found = getattr(settings, "max_position_embeddings", None)
    return None if found is None else int(found)


def first_position(model: Any) -> int:
    """What a network of `transformers` calls the position of a text's first token."""
    return max((_before(table) for _, table in _tables(model)), default=0)


def _tables(model: Any) -> list[tuple[str, nn.Embedding]]:
    """The learned tables of positions in a network of `transformers`, by name."""
    names = ("position_embeddings", "position_embedding", "wpe")
    modules = model.named_modules()
    return [(n, m) for n, m in modules if isinstance(m, nn.Embedding) and n.rsplit(".", 1)[-1] in names]


def _before(table: nn.Embedding) -> int:
    """Rows of a table of positions before the one of a text's first token."""
    return 0 if table.padding_idx is None else table.padding_idx + 1
