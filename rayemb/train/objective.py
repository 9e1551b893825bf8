"""What one step computes: both towers, the exchange between ranks, and the loss of one process with everything."""

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rayemb.losses import Batch, Loss
from rayemb.models import TwoTower
from rayemb.parallel import Encoded, Exchange, cut, split

PADDING = 0  # token id


class Objective(nn.Module):
    """Encoder and loss as one module, so that the engine trains the temperature with the weights."""

    def __init__(self, network: TwoTower, loss: Loss) -> None:
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, batch: dict[str, Tensor]) -> Encoded:
        """Vectors of `pixels` (B, 3, S, S) uint8 and `tokens` (B, L) int64, and the loss's own parameters."""
        image_BD, text_BD = self.network(batch["pixels"], batch["tokens"])
        return Encoded({"queries": image_BD, "documents": text_BD}, shared_parameters(self.loss))

    def share(self, encoded: Encoded, keys: Tensor, exchange: Exchange, progress: float = 0.0) -> Tensor:
        """This rank's share of the loss over the global batch; `keys` (B,) int64 as `encoded` has its rows."""
        batch = Batch(encoded.rows["queries"], encoded.rows["documents"], keys=keys, progress=progress)
        value: Tensor = functional_call(self.loss, encoded.shared, (batch, exchange))
        return value


def shared_parameters(loss: Loss) -> dict[str, Tensor]:
    """The loss's parameters as values on the graph: outside of the forward ZeRO-3 has taken the parameters away."""
    shared = {}
    for prefix, module in loss.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            # By attribute: that is where ZeRO-3 notices that the parameter is wanted and gathers it.
            shared[f"{prefix}.{name}".lstrip(".")] = getattr(module, name).clone()
    return shared


def micro_batches(
    batch: dict[str, Tensor], *, rows: int | None, tokens: int | None
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """The micro-batches of a batch, each with its texts cut to its own longest, and the batch in their order."""
    lengths = (batch["tokens"] != PADDING).sum(1)
    parts, whole = cut(batch, split(lengths, rows=rows, budget=tokens))
    return [{**part, "tokens": trimmed(part["tokens"])} for part in parts], whole


def trimmed(tokens: Tensor) -> Tensor:
    """Token ids `(B, L)` without the columns that are all padding."""
    longest = int((tokens != PADDING).sum(1).max()) if tokens.shape[0] else 0
    return tokens[:, : max(1, longest)]


@torch.no_grad()
def embed_pairs(network: TwoTower, pixels: Tensor, tokens: Tensor, exchange: Exchange) -> tuple[Tensor, Tensor]:
    """The vectors of all ranks' pairs, `(M, D)` each, in rank order."""
    image_BD, text_BD = network(pixels, tokens)
    return exchange.everyone(image_BD), exchange.everyone(text_BD)
