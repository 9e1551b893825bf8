"""Poolings without parameters: the mean, the first token, the last token."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from rayemb.models.pooling.base import Pooling, PoolingConfig, last_token, masked_mean


class MeanPoolingConfig(PoolingConfig):
    """The mean over the tokens."""

    name: Literal["mean"] = "mean"

    def build(self, features: int, layers: int, *, causal: bool) -> Pooling:
        """The pooling."""
        return MeanPooling()


class ClsPoolingConfig(PoolingConfig):
    """The first token, for towers whose tokenizer begins each text with one (BERT's [CLS])."""

    name: Literal["cls"] = "cls"

    def build(self, features: int, layers: int, *, causal: bool) -> Pooling:
        """The pooling. Raises ValueError for causal attention: there the first token has seen nothing."""
        if causal:
            raise ValueError("with causal attention the first token has seen nothing of the text; use pooling last")
        return ClsPooling()


class LastPoolingConfig(PoolingConfig):
    """The last token, which has seen the whole text under causal attention."""

    name: Literal["last"] = "last"

    def build(self, features: int, layers: int, *, causal: bool) -> Pooling:
        """The pooling."""
        return LastPooling()


class MeanPooling(Pooling):
    """The mean over the tokens of the mask."""

    def forward(self, layers: Sequence[Tensor], mask_BL: Tensor) -> Tensor:
        """Features `(B, E)`."""
        return masked_mean(layers[-1], mask_BL)


class ClsPooling(Pooling):
    """The first token, be it in the mask or not: it stands for the text, not for itself."""

    def forward(self, layers: Sequence[Tensor], mask_BL: Tensor) -> Tensor:
        """Features `(B, E)`."""
        return layers[-1][:, 0]


class LastPooling(Pooling):
    """The last token of the mask."""

    def forward(self, layers: Sequence[Tensor], mask_BL: Tensor) -> Tensor:
        """Features `(B, E)`."""
        return last_token(layers[-1], mask_BL)
