"""Pre-training of a text tower for retrieval by duplex masked auto-encoding (DupMAE, Xiao et al., 2022; card S179)."""

from collections.abc import Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from rayemb.losses import Loss
from rayemb.models import TextTokenizer, TwoTower, TwoTowerConfig
from rayemb.models.errors import ModelError
from rayemb.models.reconstruction import Masked, Reconstruction
from rayemb.parallel import Encoded, Exchange
from rayemb.train.masking import Vocabulary, hide
from rayemb.train.objective import Objective, ObjectiveConfig

KEPT = ("tokens", "keys", "task", "row")


class RetroMAEConfig(ObjectiveConfig):
    """A masked text's [CLS] state must tell a one-layer decoder its words, and its other states the bag of them.

    Trains the text tower alone, on the texts of the pairs; a later run begins from the model with `train.init`.
    `bag_weight: 0` is RetroMAE (Xiao et al., 2022a) without the second task of its second version.
    """

    name: Literal["retromae"] = "retromae"
    encoder_mask: float = Field(0.3, gt=0, lt=1, description="share of the words that the tower does not see")
    decoder_mask: float = Field(
        0.5, gt=0, lt=1, description="share of the words that the decoder does not see while it tells one of them"
    )
    bag_weight: float = Field(0.1, ge=0, description="of the loss of the bag of words, beside 1 and 1 of the others")

    def misfit(self, towers: TwoTowerConfig) -> str | None:
        """A pooling of other states than the one that is trained."""
        if towers.text.pooling.name != "cls":
            return "it trains the state of the first token: model.text.pooling must be cls"
        return None

    def build(self, network: TwoTower, losses: list[Loss], tokenizer: TextTokenizer, seed: int) -> Objective:
        """The objective; `losses` are not for it. Raises ModelError for a tower or tokenizer that it cannot have."""
        return RetroMAE(self, network, tokenizer, seed)


class RetroMAE(Objective):
    """Choose it before contrastive training, on many texts without pairs. Its loss is a sum of means over tokens."""

    def __init__(self, config: RetroMAEConfig, network: TwoTower, tokenizer: TextTokenizer, seed: int) -> None:
        super().__init__(network, [])
        self.config, self.seed, self.words = config, seed, Vocabulary.of(tokenizer)
        if not self.words.special[tokenizer(["a"])[0, 0]]:
            raise ModelError(
                "its texts begin with a word; the first token must be one that stands for the text, as [CLS] does",
                where="model.tokenizer",
            )
        # What it does not train must not be in the optimizer: no gradient ever comes.
        network.requires_grad_(False)
        network.text.requires_grad_(True)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.reconstruction = Reconstruction(network.text, tokenizer.max_length)

    def prepared(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """The texts of the batch with what is hidden of them, by seed, step and row."""
        device = batch["tokens"].device
        rows = batch["row"] + (batch["task"] << 40)
        found = hide(
            batch["tokens"].cpu().numpy(),
            rows.cpu().numpy(),
            (self.seed, step),
            self.words,
            encoder=self.config.encoder_mask,
            decoder=self.config.decoder_mask,
        )
        made = {name: torch.from_numpy(values).to(device) for name, values in found._asdict().items()}
        made["masked_tokens"] = made.pop("masked")
        return {name: batch[name] for name in KEPT if name in batch} | made

    def forward(self, batch: dict[str, Tensor]) -> Encoded:
        """`losses` (B, 3) of the texts of a prepared batch; of any other, in an evaluation, its vectors."""
        if "masked_tokens" not in batch:
            return super().forward(batch)
        # A micro-batch is cut to its own longest text, and what is as long as the texts here.
        ids = batch["tokens"]
        L = ids.shape[1]
        hidden, ordinary, visible = batch["hidden"][:, :L], batch["ordinary"][:, :L], batch["visible"][:, :L, :L]
        texts = Masked(ids, batch["masked_tokens"][:, :L], hidden, ordinary, visible)
        return Encoded({"losses": self.reconstruction(self.network.text, texts)}, {})

    def share(self, encoded: Encoded, batch: Mapping[str, Tensor], exchange: Exchange, progress: float = 0.0) -> Tensor:
        """This rank's share of the means over all hidden tokens, all ordinary ones, and all texts."""
        sums = encoded.rows["losses"].sum(0)
        hidden, ordinary = batch["hidden"].sum(), batch["ordinary"].sum()
        numbers = torch.stack([hidden, ordinary, ordinary.new_tensor(len(batch["tokens"]))]).to(sums.dtype)
        weights = sums.new_tensor([1.0, 1.0, self.config.bag_weight])
        # Total and not own: ranks are averaged afterwards, and one with few tokens must not count like the others.
        return (weights * sums * exchange.world / exchange.reduce(numbers).clamp(min=1)).sum()
