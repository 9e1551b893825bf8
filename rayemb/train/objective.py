"""What one step computes: both towers, the exchange between ranks, and the loss of one process with everything."""

import torch
from torch import Tensor, nn

from rayemb.losses import InfoNCE, pair_by_group
from rayemb.models import TwoTower
from rayemb.parallel import gather_rows


class Objective(nn.Module):
    """Encoder and loss as one module, so that the engine trains the temperature with the weights."""

    def __init__(self, network: TwoTower, loss: InfoNCE) -> None:
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, pixels: Tensor, tokens: Tensor, groups: Tensor) -> Tensor:
        """This rank's share of the symmetric loss: its mean over ranks is the loss over the global batch.

        `pixels` (B, 3, S, S) uint8, `tokens` (B, L) int64, `groups` (B,) int64; B may differ between ranks.
        """
        image_BD, text_BD = self.network(pixels, tokens)
        return symmetric_loss(image_BD, text_BD, groups, self.loss)


def symmetric_loss(image_BD: Tensor, text_BD: Tensor, groups_B: Tensor, loss: InfoNCE) -> Tensor:
    """Image→text and text→image against the candidates of all ranks, averaged; a scalar, see `Objective`."""
    images, texts, groups = gather_rows(image_BD), gather_rows(text_BD), gather_rows(groups_B)
    pairs = pair_by_group(groups_B, groups.rows, images.start, loss.config.duplicates)
    rows = loss(image_BD, texts.rows, pairs) + loss(text_BD, images.rows, pairs)
    total: Tensor = rows.sum() * (images.weight / 2)
    return total


@torch.no_grad()
def embed_pairs(network: TwoTower, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The vectors of all ranks' pairs, `(M, D)` each, in rank order."""
    image_BD, text_BD = network(pixels, tokens)
    return gather_rows(image_BD).rows, gather_rows(text_BD).rows
