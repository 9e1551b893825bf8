"""Short texts side by side in one row instead of padding each to the longest (Krell et al., 2021).

A token sees those of its own text alone and is told its place in it, so that states are what they would be without
neighbours. Of texts of a corpus, padded to the longest of their batch, a half is often padding.
Shapes: B texts, L tokens of the longest, R rows, W width of a row, E features.
"""

from heapq import heappush, heapreplace
from typing import NamedTuple

import torch
from torch import Tensor

from rayemb.models.tokenizer import PADDING

# Below it, what is saved does not pay for moving the tokens.
LEAST_SAVED = 0.1


class Packed(NamedTuple):
    """Texts in rows of several.

    ids:       (R, W) int64, -1 = padding.
    positions: (R, W) int64, the place of each token in its text; 0 for padding.
    texts:     (R, W) int64, which text of its row a token is of, from 0; -1 for padding.
    places:    (B, L) int64, where in the R W tokens each one is; anywhere for padding.
    """

    ids: Tensor
    positions: Tensor
    texts: Tensor
    places: Tensor

    def mask(self, *, causal: bool = False) -> Tensor:
        """Who sees whom, `(R, 1, W, W)` bool: the tokens of one text each other, or those before them alone."""
        # Padding sees padding: a row of a softmax over nothing would be NaN.
        own = self.texts[:, None, :, None] == self.texts[:, None, None, :]
        return own.tril() if causal else own

    def unpacked(self, states_RWE: Tensor) -> Tensor:
        """The states `(B, L, E)` of the texts; those of padding are some token's."""
        B, L = self.places.shape
        return states_RWE.flatten(0, 1).index_select(0, self.places.flatten()).view(B, L, -1)


def pack(ids_BL: Tensor) -> Packed | None:
    """Texts of ids `(B, L)` int64, -1 = padding at the end, in rows as wide as the longest; None if it saves little.

    The longest first, each into the row with most room (O(B log B)). The same on every machine.
    """
    if torch.compiler.is_compiling():
        return None  # what is packed how depends on the texts, and a graph does not
    lengths = (ids_BL != PADDING).sum(1).tolist()
    width = max(lengths, default=0)
    if not width or sum(lengths) > (1 - LEAST_SAVED) * ids_BL.numel():
        return None
    room: list[tuple[int, int]] = []  # (minus the tokens that still fit, row): the first has most
    rows, starts, numbers, held = [0] * len(lengths), [0] * len(lengths), [0] * len(lengths), [0] * len(lengths)
    for text in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length = lengths[text]
        free, row = (-room[0][0], room[0][1]) if room else (0, 0)
        if length > free:
            free, row = width, len(room)
            heappush(room, (length - free, row))
        else:
            heapreplace(room, (length - free, row))
        rows[text], starts[text], numbers[text] = row, width - free, held[row]
        held[row] += 1
    row_B, start_B, number_B = torch.tensor([rows, starts, numbers], device=ids_BL.device)
    own_BL = torch.arange(ids_BL.shape[1], device=ids_BL.device).expand_as(ids_BL)
    places_BL = (row_B * width + start_B)[:, None] + own_BL
    real_BL = ids_BL != PADDING
    at = places_BL[real_BL]

    def laid(values_BL: Tensor, padding: int) -> Tensor:
        out = ids_BL.new_full((len(room) * width,), padding)
        out[at] = values_BL[real_BL]
        return out.view(len(room), width)

    ids, positions = laid(ids_BL, PADDING), laid(own_BL, 0)
    texts = laid(number_B[:, None].expand_as(ids_BL), PADDING)
    return Packed(ids, positions, texts, places_BL.clamp(max=ids.numel() - 1))
