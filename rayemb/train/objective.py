"""What a step of contrastive learning computes (Oord et al., 2018): the towers, the exchange, one process's loss."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from rayemb.config import Config
from rayemb.errors import RayembError
from rayemb.losses import Batch, Loss, Starbucks
from rayemb.models import PADDING, TextTokenizer, TwoTower, TwoTowerConfig
from rayemb.parallel import Encoded, Exchange, cut, split

# What belongs to a row and is several entries, with the counts of each row's.
RAGGED = dict.fromkeys(("negative_tokens", "negative_keys", "negative_skips"), "negative_counts")


class ObjectiveConfig(Config, ABC):
    """Config of what a training is about."""

    def misfit(self, towers: TwoTowerConfig) -> str | None:
        """Why it cannot be had over such towers; None if it can."""
        return None

    @abstractmethod
    def build(self, network: TwoTower, losses: list[Loss], tokenizer: TextTokenizer, seed: int) -> "Objective":
        """The objective over a network; `losses` as `Objective` takes them, `seed` for weights and draws."""


class ContrastiveConfig(ObjectiveConfig):
    """Pairs are told from other pairs, by `train.loss`."""

    name: Literal["contrastive"] = "contrastive"

    def build(self, network: TwoTower, losses: list[Loss], tokenizer: TextTokenizer, seed: int) -> "Objective":
        """The objective."""
        return Objective(network, losses)


class Objective(nn.Module):
    """Encoder and losses as one module, so that the engine trains the temperatures with the weights.

    `losses`: one for all corpora, or one for each, in the order of the mixture.

    This one is contrastive. Another is a class below it with a `forward` and a `share` of its own, exact as these are:
    whatever rows `forward` gives, the mean of the shares over ranks is the loss of one process with the whole batch.
    """

    def __init__(self, network: TwoTower, losses: Loss | Sequence[Loss]) -> None:
        super().__init__()
        self.network = network
        self.losses = nn.ModuleList([losses] if isinstance(losses, Loss) else losses)
        self.exits = sorted({layers for loss in self.losses for layers in _exits(loss, network.text.layers)})

    def prepared(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """This rank's whole batch of a step as `forward` wants it; what is random in it is a row's own."""
        return batch

    def forward(self, batch: dict[str, Tensor]) -> Encoded:
        """Vectors of a batch's rows (`queries`, `documents`, `negatives` if any), and the losses' own parameters.

        Queries are `pixels` (B, 3, S, S) uint8 or `query_tokens` (B, M) int64; documents `tokens` (B, L) and hard
        negatives `negative_tokens` (N, L) go through the text tower, without pooling as many tokens as `query_skips`,
        `skips` and `negative_skips` say.
        """
        rows: dict[str, Tensor] = {}
        texts = {"documents": (batch["tokens"], batch.get("skips"))}
        if "pixels" in batch:
            rows["queries"] = self.network.encode_image(batch["pixels"])
        else:
            texts["queries"] = (batch["query_tokens"], batch.get("query_skips"))
        if "negative_tokens" in batch:
            texts["negatives"] = (batch["negative_tokens"], batch.get("negative_skips"))
        if self.network.text.packs:
            sizes = [ids.shape[0] for ids, _ in texts.values()]
            together = [vectors.split_with_sizes(sizes) for vectors in self._texts(*_joined(list(texts.values())))]
            found = [list(parts) for parts in zip(*together, strict=True)]
        else:
            found = [self._texts(ids, skips) for ids, skips in texts.values()]
        for kind, (*early, last) in zip(texts, found, strict=True):
            rows |= {kind: last, **{f"{kind}@{n}": vectors for n, vectors in zip(self.exits, early, strict=False)}}
        return Encoded(rows, shared_parameters(self.losses))

    def _texts(self, ids: Tensor, skips: Tensor | None) -> list[Tensor]:
        """The vectors of texts and, in training, before them those after fewer layers that a loss wants (`exits`)."""
        if not (self.exits and self.training):
            return [self.network.encode_text(ids, skips)]
        return self.network.encode_text_exits(ids, skips, [*self.exits, self.network.text.layers])

    def share(self, encoded: Encoded, batch: Mapping[str, Tensor], exchange: Exchange, progress: float = 0.0) -> Tensor:
        """This rank's share of the loss over the global batch; `batch` as `encoded` has its rows.

        With several losses, all rows of a global batch are of one corpus (`task`), whose loss it is.
        """
        number = 0
        if len(self.losses) > 1:
            # Agreed on by all ranks: one without rows has no task to look at.
            tasks = batch["task"]
            mine = tasks.max().reshape(1) if tasks.numel() else tasks.new_full((1,), -1)
            number = int(exchange.everyone(mine).max())
        prefix = f"{number}."
        own = {name.removeprefix(prefix): value for name, value in encoded.shared.items() if name.startswith(prefix)}
        owners = None
        if "negative_counts" in batch:
            counts = batch["negative_counts"]
            owners = torch.arange(len(counts), device=counts.device).repeat_interleave(counts)
        pairs = Batch(
            encoded.rows["queries"],
            encoded.rows["documents"],
            negatives=encoded.rows.get("negatives"),
            negative_rows=owners,
            keys=batch.get("keys"),
            negative_keys=batch.get("negative_keys"),
            tasks=batch.get("task"),
            labels=batch.get("labels"),
            progress=progress,
        )
        exits = {
            n: replace(
                pairs,
                queries=encoded.rows.get(f"queries@{n}", pairs.queries),  # images have no smaller tower
                documents=encoded.rows[f"documents@{n}"],
                negatives=encoded.rows.get(f"negatives@{n}"),
            )
            for n in self.exits
        }
        value: Tensor = functional_call(self.losses[number], own, (replace(pairs, exits=exits), exchange))
        return value

    @property
    def temperature(self) -> float | None:
        """The current temperature, the mean over the losses that have one."""
        found = [loss.temperature for loss in self.losses if isinstance(loss, Loss) and loss.temperature is not None]
        return sum(found) / len(found) if found else None


def _joined(texts: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor]:
    """Texts of several kinds, `(n, L)` each, and how many tokens of each are not pooled, as if they were one."""
    longest = max(ids.shape[1] for ids, _ in texts)
    ids = [functional.pad(ids, (0, longest - ids.shape[1]), value=PADDING) for ids, _ in texts]
    skips = [ids.new_zeros(ids.shape[0]) if skips is None else skips for ids, skips in texts]
    return torch.cat(ids), torch.cat(skips)


def _exits(loss: nn.Module, layers: int) -> tuple[int, ...]:
    """The layers after which a loss wants vectors. Raises RayembError for a tower that is not as deep as it says."""
    found = [part.config for part in loss.modules() if isinstance(part, Starbucks)]
    for config in found:
        if config.sizes[-1][0] != layers:
            raise RayembError(
                f"the last size has {config.sizes[-1][0]} layers and the text tower {layers}",
                where="train.loss.sizes",
                fix=f"let it be [{layers}, {config.sizes[-1][1]}]",
            )
    return tuple(n for config in found for n in config.exits)


def shared_parameters(losses: nn.Module) -> dict[str, Tensor]:
    """The losses' parameters as values on the graph: outside of the forward ZeRO-3 has taken the parameters away."""
    shared = {}
    for prefix, module in losses.named_modules():
        for name, _ in module.named_parameters(recurse=False):
            # By attribute: that is where ZeRO-3 notices that the parameter is wanted and gathers it.
            shared[f"{prefix}.{name}".lstrip(".")] = getattr(module, name).clone()
    return shared


def micro_batches(
    batch: dict[str, Tensor], *, rows: int | None, tokens: int | None
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """The micro-batches of a batch, each with its texts cut to its own longest, and the batch in their order."""
    texts = [name for name in batch if name.endswith("tokens")]
    lengths = torch.stack([(batch[name] != PADDING).sum(1) for name in texts if name not in RAGGED]).amax(0)
    ragged = {name: counts for name, counts in RAGGED.items() if name in batch}
    parts, whole = cut(batch, split(lengths, rows=rows, budget=tokens), ragged)
    return [{**part, **{name: trimmed(part[name]) for name in texts}} for part in parts], whole


def trimmed(tokens: Tensor) -> Tensor:
    """Token ids `(B, L)` without the columns that are all padding."""
    longest = int((tokens != PADDING).sum(1).max()) if tokens.shape[0] else 0
    return tokens[:, : max(1, longest)]


@torch.no_grad()
def embed_pairs(objective: Objective, batch: dict[str, Tensor], exchange: Exchange) -> tuple[Tensor, Tensor]:
    """The vectors of all ranks' queries and documents, `(M, D)` each, in rank order."""
    rows = objective(batch).rows
    return exchange.everyone(rows["queries"]), exchange.everyone(rows["documents"])
